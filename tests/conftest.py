import os

import pytest


# Where these are set, pytest spells every failed comparison out, also those that a test expects of stock `datasets`: of megabytes
# of bytes that takes hours.
for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def isolated_hf_home(tmp_path_factory, monkeypatch):
    """Every test gets its own `datasets` cache, so that none passes on what another left behind."""
    cache = tmp_path_factory.mktemp("hf")
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
    return cache
