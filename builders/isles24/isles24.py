"""ISLES'24: acute CT, follow-up MRI and outcome of stroke patients (Zenodo record 17652035, release v7)."""

from datasets_bids import BidsBuilder, BidsConfig


_RELEASE = (
    "ISLES'24 release v7 (Zenodo record 17652035), whose train/ directory holds raw_data/, derivatives/ and phenotype/ "
    "with sessions ses-01 and ses-02; releases up to v2 name them ses-0001 and ses-0002"
)

_RAW_CT = "raw_data/{subject}/ses-01/{subject}_ses-01_"
_RAW_MAP = "raw_data/{subject}/ses-01/perfusion-maps/{subject}_ses-01_"
_RAW_MRI = "raw_data/{subject}/ses-02/{subject}_ses-02_"
_CT = "derivatives/{subject}/ses-01/{subject}_ses-01_space-ncct_"
_MAP = "derivatives/{subject}/ses-01/perfusion-maps/{subject}_ses-01_space-ncct_"
_MRI = "derivatives/{subject}/ses-02/{subject}_ses-02_space-ncct_"

_BASELINE = {
    "path": "phenotype/{subject}/ses-01/*_demographic_baseline.xlsx",
    "columns": {
        "age": {"column": "Age", "dtype": "float64"},
        "sex": {"column": "Sex", "dtype": "string"},
        "nihss_admission": {"column": "NIHSS at admission", "dtype": "int64"},
        "mrs_admission": {"column": "mRS at admission", "dtype": "int64"},
    },
    "optional": True,
}
_OUTCOME = {
    "path": "phenotype/{subject}/ses-02/*_outcome.xlsx",
    "columns": {"mrs_3month": {"column": "mRS 3 months", "dtype": "int64"}},
    "optional": True,
}

_MD5 = "4959a5dd2438d53e3c86d6858484e781"  # of the release's archive

# Not published to the last file.
_PERFUSION = {"count": 140, "tolerance": 5}
_VESSELS = {"count": 100, "tolerance": 10}


def _optional(*paths: str) -> dict:
    """An image that the release has for some subjects only."""
    return {"path": list(paths), "optional": True}


class Isles24(BidsBuilder):
    """One row a subject, volumes as released."""

    BUILDER_CONFIGS = [
        BidsConfig(
            name="default",
            description="One volume a modality: CT raw where there is one, else registered; the rest registered to NCCT.",
            release=_RELEASE,
            row="subject",
            schema={
                "ncct": _RAW_CT + "ncct.nii.gz",
                "cta": _optional(_RAW_CT + "cta.nii.gz", _CT + "cta.nii.gz"),
                "ctp": _optional(_RAW_CT + "ctp.nii.gz", _CT + "ctp.nii.gz"),
                "tmax": _optional(_MAP + "tmax.nii.gz"),
                "mtt": _optional(_MAP + "mtt.nii.gz"),
                "cbf": _optional(_MAP + "cbf.nii.gz"),
                "cbv": _optional(_MAP + "cbv.nii.gz"),
                "dwi": _MRI + "dwi.nii.gz",
                "adc": _MRI + "adc.nii.gz",
                "lesion_mask": _MRI + "lesion-msk.nii.gz",
                "lvo_mask": _optional(_CT + "lvo-msk.nii.gz"),
                "cow_mask": _optional(_CT + "cow-msk.nii.gz"),
            },
            metadata_from=[_BASELINE, _OUTCOME],
            expected={
                "paths": ["raw_data", "derivatives", "phenotype"],
                "subjects": 149,
                "columns": {
                    **dict.fromkeys(("ncct", "cta", "dwi", "adc", "lesion_mask"), 149),
                    **dict.fromkeys(("ctp", "tmax", "mtt", "cbf", "cbv"), _PERFUSION),
                    **dict.fromkeys(("lvo_mask", "cow_mask"), _VESSELS),
                },
                "same_grid": [["dwi", "adc", "lesion_mask"], ["tmax", "mtt", "cbf", "cbv"]],
                "archive_md5": _MD5,
            },
        ),
        BidsConfig(
            name="full",
            description="Every released volume in a column of its own, and every phenotype variable.",
            release=_RELEASE,
            row="subject",
            schema={
                "raw_ncct": _RAW_CT + "ncct.nii.gz",
                "raw_cta": _optional(_RAW_CT + "cta.nii.gz"),
                "raw_ctp": _optional(_RAW_CT + "ctp.nii.gz"),
                "raw_tmax": _optional(_RAW_MAP + "tmax.nii.gz"),
                "raw_mtt": _optional(_RAW_MAP + "mtt.nii.gz"),
                "raw_cbf": _optional(_RAW_MAP + "cbf.nii.gz"),
                "raw_cbv": _optional(_RAW_MAP + "cbv.nii.gz"),
                "raw_dwi": _optional(_RAW_MRI + "dwi.nii.gz"),
                "raw_adc": _optional(_RAW_MRI + "adc.nii.gz"),
                "space_ncct_cta": _optional(_CT + "cta.nii.gz"),
                "space_ncct_ctp": _optional(_CT + "ctp.nii.gz"),
                "space_ncct_tmax": _optional(_MAP + "tmax.nii.gz"),
                "space_ncct_mtt": _optional(_MAP + "mtt.nii.gz"),
                "space_ncct_cbf": _optional(_MAP + "cbf.nii.gz"),
                "space_ncct_cbv": _optional(_MAP + "cbv.nii.gz"),
                "space_ncct_dwi": _MRI + "dwi.nii.gz",
                "space_ncct_adc": _MRI + "adc.nii.gz",
                "space_ncct_lesion_mask": _MRI + "lesion-msk.nii.gz",
                "space_ncct_lvo_mask": _optional(_CT + "lvo-msk.nii.gz"),
                "space_ncct_cow_mask": _optional(_CT + "cow-msk.nii.gz"),
                # One subject's mask was released in its native space too, uncompressed.
                "native_lesion_mask": _optional("derivatives/{subject}/ses-02/{subject}_ses-02_lesion-msk.nii"),
            },
            metadata_from=[{**_BASELINE, "rest": True}, {**_OUTCOME, "rest": True}],
            expected={
                "paths": ["raw_data", "derivatives", "phenotype"],
                "subjects": 149,
                "columns": {
                    **dict.fromkeys(("raw_ncct", "space_ncct_dwi", "space_ncct_adc", "space_ncct_lesion_mask"), 149),
                    **dict.fromkeys(("raw_ctp", "space_ncct_ctp", "space_ncct_tmax", "space_ncct_mtt"), _PERFUSION),
                    **dict.fromkeys(("space_ncct_cbf", "space_ncct_cbv"), _PERFUSION),
                    **dict.fromkeys(("space_ncct_lvo_mask", "space_ncct_cow_mask"), _VESSELS),
                    "native_lesion_mask": 1,
                },
                "same_grid": [
                    ["space_ncct_dwi", "space_ncct_adc", "space_ncct_lesion_mask"],
                    ["space_ncct_tmax", "space_ncct_mtt", "space_ncct_cbf", "space_ncct_cbv"],
                ],
                "archive_md5": _MD5,
            },
        ),
        BidsConfig(
            name="mr-lite",
            description="The flat ISLES24-MR-Lite layout: diffusion MRI and lesion masks.",
            release="ISLES24-MR-Lite, whose directory holds Images-DWI/, Images-ADC/ and Masks/",
            row="session",
            schema={
                "dwi": "Images-DWI/{subject}_{session}_dwi.nii.gz",
                "adc": "Images-ADC/{subject}_{session}_adc.nii.gz",
                "lesion_mask": "Masks/{subject}_{session}_lesion-msk.nii.gz",
            },
            expected={
                "paths": ["Images-DWI", "Images-ADC", "Masks"],
                "subjects": 149,
                "columns": {"dwi": 149, "adc": 149, "lesion_mask": 149},
                "same_grid": [["dwi", "adc", "lesion_mask"]],
            },
        ),
    ]
    DEFAULT_CONFIG_NAME = "default"
