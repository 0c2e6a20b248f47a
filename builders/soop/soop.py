"""The Stroke Outcome Optimization Project (OpenNeuro ds004889): clinical MRI of acute stroke."""

from datasets_bids import BidsBuilder, BidsConfig


_ANAT = "{subject}/anat/{subject}_"
_DWI = "{subject}/dwi/{subject}_"
_MASK = "derivatives/lesion_masks/{subject}/dwi/{subject}_space-TRACE_desc-"


class Soop(BidsBuilder):
    """One row a subject; every subject has one session."""

    BUILDER_CONFIGS = [
        BidsConfig(
            name="default",
            description="One row a subject: anatomical and diffusion-weighted images and lesion masks.",
            release="SOOP (OpenNeuro ds004889, versions 1.x), the directory with participants.tsv",
            row="subject",
            schema={
                "t1w": _ANAT + "T1w.nii.gz",
                "flair": _ANAT + "FLAIR.nii.gz",
                "trace": _DWI + "rec-TRACE_dwi.nii.gz",
                "adc": _DWI + "rec-ADC_dwi.nii.gz",
                "lesion_mask": {"path": _MASK + "lesion_mask.nii.gz", "optional": True},
                "acute_lesion_mask": {"path": _MASK + "lesionAcute_mask.nii.gz", "optional": True},
                "chronic_lesion_mask": {"path": _MASK + "lesionChronic_mask.nii.gz", "optional": True},
            },
            metadata_from={
                "path": "participants.tsv",
                "columns": {
                    "sex": {"column": "sex", "dtype": "string"},
                    # The release groups everyone above 88.
                    "age": {"column": "age", "dtype": "int64", "labels": {"89+": 89}},
                    "race": {"column": "race", "dtype": "string"},
                    "acute_ischaemic_stroke": {"column": "acuteischaemicstroke", "dtype": "bool"},
                    "prior_stroke": {"column": "priorstroke", "dtype": "bool"},
                    "bmi": {"column": "bmi", "dtype": "float64"},
                    "nihss": {"column": "nihss", "dtype": "int64"},
                    "mrs_discharge": {"column": "gs_rankin_6isdeath", "dtype": "int64"},
                    "etiology": {"column": "etiology", "dtype": "string"},
                },
            },
            expected={
                "paths": ["participants.tsv", "derivatives/lesion_masks"],
                # The paper and version 1.1.2 have 1,715 subjects, other counts of the release 1,714.
                "subjects": {"count": 1715, "tolerance": 1},
                "columns": {
                    "t1w": {"count": 1715, "tolerance": 1},
                    "flair": {"count": 1715, "tolerance": 1},
                    "trace": {"count": 1715, "tolerance": 1},
                    "adc": {"count": 1715, "tolerance": 1},
                    "lesion_mask": 1455,
                    "acute_lesion_mask": 1451,
                    "chronic_lesion_mask": 203,
                    "sex": 1106,
                    "age": 1106,
                    "nihss": 1106,
                    "etiology": 1080,
                },
                "same_grid": [["trace", "lesion_mask", "acute_lesion_mask", "chronic_lesion_mask"]],
            },
        )
    ]
