import pytest
from datasets import DatasetInfo, Features, Nifti, SplitDict, SplitInfo, Value
from huggingface_hub import DatasetCard

from datasets_bids.card import builder_card, update_card


CARD = DatasetCard("---\nlicense: cc0-1.0\ntags:\n- medical\n---\n\n# Title\n\nProse.\n")


def info(config_name="default", rows=10):
    splits = SplitDict()
    splits.add(SplitInfo("train", num_bytes=100, num_examples=rows))
    features = Features({"subject_id": Value("string"), "t1w": Nifti()})
    return DatasetInfo(config_name=config_name, features=features, splits=splits, download_size=90, dataset_size=100)


def test_a_first_push_takes_the_builders_card():
    card = update_card(CARD, None, info(), {"train": "data/train-*"})
    assert card.text == CARD.text
    assert card.data["license"] == "cc0-1.0"
    assert card.data["dataset_info"]["features"][1] == {"name": "t1w", "dtype": "nifti"}
    assert "dataset_info" not in CARD.data.to_dict(), "the argument is left alone"


def test_what_was_edited_by_hand_stays():
    existing = update_card(CARD, None, info("full"), {"train": "full/train-*"})
    existing.text = "# Edited\n"
    existing.data["license"] = "cc-by-4.0"
    existing.data["extra_gated_prompt"] = "Agree."
    card = update_card(CARD, existing, info(), {"train": "data/train-*"})
    assert card.text.strip() == "# Edited"
    assert card.data["license"] == "cc-by-4.0" and card.data["extra_gated_prompt"] == "Agree."
    assert card.data["tags"] == ["medical"]
    assert [config["config_name"] for config in card.data["configs"]] == ["default", "full"]
    assert [config["config_name"] for config in card.data["dataset_info"]] == ["default", "full"]


@pytest.mark.parametrize("rows, category", [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**7, "n>10M")])
def test_size_category(rows, category):
    card = update_card(CARD, None, info(rows=rows), {"train": "data/train-*"})
    assert card.data["size_categories"] == [category]


def test_a_card_with_a_broken_header_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="README.md: its YAML header cannot be read"):
        builder_card(type("Builder", (), {"base_path": str(tmp_path)}))
