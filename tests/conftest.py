import pytest


@pytest.fixture(autouse=True)
def isolated_hf_home(tmp_path_factory, monkeypatch):
    """Every test gets its own `datasets` cache, so that none passes on what another left behind."""
    cache = tmp_path_factory.mktemp("hf")
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
    return cache
