"""The dataset card: the builder's README.md with what the Hub and `load_dataset` need to know in its YAML header."""

import copy
from collections.abc import Mapping
from pathlib import Path

import datasets
import yaml
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData


# The Hub's categories, by number of examples.
_SIZE_CATEGORIES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")


def builder_card(builder: datasets.DatasetBuilder) -> DatasetCard:
    """The README.md beside a builder script; a plain one for a builder that has none.

    Raises:
        ValueError: its YAML header cannot be read
    """
    readme = Path(builder.base_path or "", "README.md")
    if builder.base_path and readme.is_file():
        try:
            return DatasetCard.load(readme, ignore_metadata_errors=False)
        except (ValueError, yaml.YAMLError) as e:
            raise ValueError(f"{readme}: its YAML header cannot be read ({e})") from e
    descriptions = getattr(builder, "descriptions", {})
    columns = "\n".join(
        f"| `{name}` | `{feature}` | {' '.join(descriptions.get(name, '').replace('|', '/').split())} |"
        for name, feature in (builder.info.features or {}).items()
    )
    return DatasetCard(
        "---\ntags:\n- medical\n- neuroimaging\n---\n\n# Brain images\n\nMade from a BIDS tree with datasets-bids.\n\n"
        f"| column | type | |\n|---|---|---|\n{columns}\n"
    )


def update_card(
    card: DatasetCard, existing: DatasetCard | None, info: datasets.DatasetInfo, data_files: Mapping[str, str]
) -> DatasetCard:
    """A card that describes one config as it was just written.

    Args:
        card (`DatasetCard`): the builder's card
        existing (`DatasetCard`, *optional*): the card that stands at the destination; its prose, its other configs and
            what its header says beyond what is computed here are kept
        info (`DatasetInfo`): of the config, with features and splits
        data_files (`dict[str, str]`): split -> glob of its shards

    Returns:
        `DatasetCard`: a new card; the arguments are left alone
    """
    updated = copy.deepcopy(existing or card)
    for key, value in card.data.to_dict().items():
        if updated.data.get(key) is None:
            updated.data[key] = value
    DatasetInfosDict({info.config_name: info}).to_dataset_card_data(updated.data)
    config = {"data_files": [{"split": split, "path": path} for split, path in data_files.items()]}
    former = MetadataConfigs.from_dataset_card_data(updated.data).get(info.config_name, {})
    if "default" in former:
        config["default"] = former["default"]
    MetadataConfigs({info.config_name: config}).to_dataset_card_data(updated.data)
    _settle_default(updated.data)
    infos = DatasetInfosDict.from_dataset_card_data(updated.data).values()
    largest = max(sum(split.num_examples for split in info.splits.values()) for info in infos if info.splits)
    updated.data["size_categories"] = [_size_category(largest)]
    return updated


def is_preview(config_name: str) -> bool:
    """Whether a config is the preview of another one."""
    return config_name == "preview" or config_name.endswith("-preview")


def remove_config(card: DatasetCard, config_name: str) -> DatasetCard:
    """A card without what its header says of a config."""
    updated = copy.deepcopy(card)
    configs = [config for config in updated.data.get("configs") or [] if config.get("config_name") != config_name]
    infos = DatasetInfosDict.from_dataset_card_data(updated.data)
    if infos.pop(config_name, None) is not None:
        updated.data["dataset_info"] = None
        infos.to_dataset_card_data(updated.data)
    if configs:
        updated.data["configs"] = configs
        _settle_default(updated.data)
    return updated


def _settle_default(data: DatasetCardData) -> None:
    """Says which config `load_dataset` takes if none is named: as without the previews, if there is one config beside them.

    `datasets` takes a config called `default` anyway, and refuses two.
    """
    configs = data["configs"]
    volumes = [config for config in configs if not is_preview(config["config_name"])]
    if any(config["config_name"] == "default" for config in volumes):
        for config in configs:
            config.pop("default", None)
    elif len(volumes) == 1 and len(configs) > 1 and not any(config.get("default") for config in configs):
        volumes[0]["default"] = True


def _size_category(num_examples: int) -> str:
    for digits, category in enumerate(_SIZE_CATEGORIES, start=3):
        if num_examples < 10**digits:
            return category
    return "n>10M" if num_examples >= 10**7 else _SIZE_CATEGORIES[-1]
