"""The Aphasia Recovery Cohort (OpenNeuro ds004884): MRI of chronic stroke patients."""

from datasets_bids import BidsBuilder, BidsConfig


_SESSION = "{subject}/{session}/"
_FILE = "{subject}_{session}_"


def _runs(path: str) -> dict:
    """All runs of a modality, which few sessions have all of."""
    return {"path": path, "many": True, "optional": True}


class Arc(BidsBuilder):
    """One row a session, every run kept."""

    BUILDER_CONFIGS = [
        BidsConfig(
            name="default",
            description="One row a session; the runs of a modality are a list.",
            release="the Aphasia Recovery Cohort (OpenNeuro ds004884), the directory with participants.tsv",
            row="session",
            schema={
                "t1w": _runs(_SESSION + "anat/" + _FILE + "*T1w.nii.gz"),
                "t2w": _runs(_SESSION + "anat/" + _FILE + "*T2w.nii.gz"),
                "t2w_acquisition": {
                    "of": "t2w",
                    "entity": "acq",
                    "labels": {"spc3p2": "SPACE 2x", "spc3": "SPACE", "tse3": "turbo spin echo"},
                },
                "flair": _runs(_SESSION + "anat/" + _FILE + "*FLAIR.nii.gz"),
                "bold_naming40": _runs(_SESSION + "func/" + _FILE + "*task-naming40_*bold.nii.gz"),
                "bold_rest": _runs(_SESSION + "func/" + _FILE + "*task-rest_*bold.nii.gz"),
                "dwi": _runs(_SESSION + "dwi/" + _FILE + "*dwi.nii.gz"),
                "dwi_bvals": {"of": "dwi", "companion": ".bval"},
                "dwi_bvecs": {"of": "dwi", "companion": ".bvec"},
                "sbref": _runs(_SESSION + "*/" + _FILE + "*sbref.nii.gz"),
                "lesion": {
                    "path": "derivatives/lesion_masks/" + _SESSION + "anat/" + _FILE + "*desc-lesion_mask.nii.gz",
                    "optional": True,
                },
            },
            metadata_from={
                "path": "participants.tsv",
                "columns": {
                    "sex": {"column": "sex", "dtype": "string"},
                    "race": {"column": "race", "dtype": "string"},
                    "age_at_stroke": {"column": "age_at_stroke", "dtype": "float64"},
                    "wab_aq": {"column": "wab_aq", "dtype": "float64"},
                    "wab_days": {"column": "wab_days", "dtype": "float64"},
                    "wab_type": {"column": "wab_type", "dtype": "string"},
                },
            },
            expected={
                "paths": ["participants.tsv", "derivatives/lesion_masks"],
                "subjects": 230,
                "sessions": 902,
                # Both tasks together are what is published of the BOLD series.
                "columns": {"t1w": 444, "t2w": 440, "flair": 233, "bold_*": 850, "dwi": 613, "sbref": 88, "lesion": 228},
                "images": {"t1w": 447, "t2w": 441, "flair": 235, "bold_*": 1402, "dwi": 2089, "sbref": 322},
            },
        )
    ]
