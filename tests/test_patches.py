"""The library that the patches of `patches/` make, without this package's replacements and beside it.

`python -m patches.check` runs this on it; elsewhere it is skipped. It is what keeps the patches and the package from drifting
apart: the checks of defects of `test_stock` and `test_nifti`, which the package passes, have to pass on the patched library too,
save for those listed here.
"""

import io

import datasets
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import patches
from datasets_bids import patching

from . import test_nifti, test_stock
from .strategies import columns, embedded, make_files


pytestmark = pytest.mark.skipif(
    not hasattr(datasets.table, "embed_bytes_or_path_storage"),
    reason="needs the patched library: python -m patches.check",
)


@pytest.fixture(autouse=True)
def without_replacements(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patching.undo()
    yield
    patching.apply()


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path / "files", [500, 3000, 70_000, 20])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tables_of_any_layout(files, data):
    feature, column, expected = data.draw(columns(files))
    table = Dataset.from_dict({}).data.table.from_arrays([column], schema=Features({"x": feature}).arrow_schema)
    expected = [embedded(value, feature) for value in expected]
    result = datasets.table.embed_table_storage(table)
    assert result.schema == table.schema
    assert result["x"].to_pylist() == expected
    assert datasets.table.embed_table_storage(result)["x"].to_pylist() == expected
    # a stream without a row cannot be made
    for dataset in [Dataset(table), *([Dataset(table).to_iterable_dataset()] if expected else [])]:
        file = io.BytesIO()
        dataset.to_parquet(file)
        assert pq.read_table(file)["x"].to_pylist() == expected


def test_the_package_replaces_nothing_else():
    patching.apply()
    assert {patch.target for patch in patching.applied()} == patches.LEFT_TO_THE_PACKAGE


@pytest.mark.parametrize(
    "check", [param.values[0] for param in test_stock.DEFECTS + test_nifti.DEFECTS], ids=lambda f: f.__name__
)
def test_defects(check, files):
    try:
        check(files) if check.__code__.co_argcount else check()
    except (Exception, pytest.fail.Exception):
        assert check.__name__ in patches.CHECKS_LEFT_TO_THE_PACKAGE
    else:
        assert check.__name__ not in patches.CHECKS_LEFT_TO_THE_PACKAGE, "mended: take it off the list"
