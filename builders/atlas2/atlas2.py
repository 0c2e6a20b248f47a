"""ATLAS v2.0, Anatomical Tracings of Lesions After Stroke (ICPSR 36684): T1-weighted MRI and lesion masks."""

from datasets_bids import BidsBuilder, BidsConfig


_IMAGE = "{site}/{subject}/{session}/anat/{subject}_{session}_"


class Atlas2(BidsBuilder):
    """One row a session, two splits."""

    PRIVATE_BECAUSE = "the data use agreement of ATLAS forbids to redistribute it"

    BUILDER_CONFIGS = [
        BidsConfig(
            name="default",
            description="One row a session: the T1-weighted image and, in the training split, the lesion's mask.",
            release="ATLAS v2.0, whose directory holds Training/, Testing/ and 20220425_ATLAS_2.0_MetaData.xlsx",
            row="session",
            splits={"train": "Training", "test": "Testing"},
            schema={
                # Some copies name the space (space-MNI152NLin2009aSym), others do not.
                "t1w": _IMAGE + "*T1w.nii.gz",
                "lesion_mask": {"path": _IMAGE + "*desc-T1lesion_mask.nii.gz", "optional": True},
                "site": {"capture": "site"},
            },
            metadata_from={
                "path": "*_ATLAS_2.0_MetaData.*",  # .xlsx as released; some copies hold it as .csv
                "key": "Subject ID",
                "session_key": "Session",
                "rest": True,
                "columns": {
                    "lesions_left_cortical": {
                        "column": "# Lesions LH Cortical and White Matter",
                        "dtype": "int64",
                    },
                    "lesions_left_subcortical": {"column": "# Lesions LH Subcortical", "dtype": "int64"},
                    "lesions_right_cortical": {
                        "column": "# Lesions RH Cortical and White Matter",
                        "dtype": "int64",
                    },
                    "lesions_right_subcortical": {"column": "# Lesions RH Subcortical", "dtype": "int64"},
                    "lesions_other": {"column": "# Lesions Other Location", "dtype": "int64"},
                },
            },
            expected={
                "paths": ["Training", "Testing", "*_ATLAS_2.0_MetaData.*"],
                "rows": {"train": 655, "test": 300},
                "columns": {"t1w": 955, "lesion_mask": 655, "site": 955},
                "same_grid": [["t1w", "lesion_mask"]],
            },
        )
    ]
