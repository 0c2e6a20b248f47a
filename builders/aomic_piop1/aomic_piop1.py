"""AOMIC-PIOP1 (OpenNeuro ds002785): structural, diffusion and functional MRI of university students."""

from datasets_bids import BidsBuilder, BidsConfig


def _bold(task: str) -> dict:
    """The runs of a task; acq- says how it was acquired (seq: sequential, mb3: multiband factor 3)."""
    return {"path": f"{{subject}}/func/{{subject}}_task-{task}_*bold.nii.gz", "many": True, "optional": True}


class AomicPiop1(BidsBuilder):
    """One row a subject; the dataset has no sessions."""

    BUILDER_CONFIGS = [
        BidsConfig(
            name="default",
            description="One row a subject; the runs of a task are a list.",
            release="AOMIC-PIOP1 (OpenNeuro ds002785), the directory with participants.tsv",
            row="subject",
            schema={
                "t1w": "{subject}/anat/{subject}_T1w.nii.gz",
                "dwi": {"path": "{subject}/dwi/{subject}_dwi.nii.gz", "optional": True},
                "dwi_bvals": {"of": "dwi", "companion": ".bval"},
                "dwi_bvecs": {"of": "dwi", "companion": ".bvec"},
                "bold_restingstate": _bold("restingstate"),
                "bold_anticipation": _bold("anticipation"),
                "bold_emomatching": _bold("emomatching"),
                "bold_faces": _bold("faces"),
                "bold_gstroop": _bold("gstroop"),
                "bold_workingmemory": _bold("workingmemory"),
            },
            metadata_from={
                "path": "participants.tsv",
                "rest": True,
                "columns": {
                    "age": {"column": "age", "dtype": "float64"},
                    "sex": {"column": "sex", "dtype": "string"},
                    "handedness": {"column": "handedness", "dtype": "string"},
                },
            },
            expected={
                "paths": ["dataset_description.json", "participants.tsv"],
                "subjects": 216,
                "columns": {"t1w": 216, "dwi": 211, "dwi_bvals": 211, "dwi_bvecs": 211},
            },
        )
    ]
