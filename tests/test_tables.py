import pytest

from datasets_bids.index import index_tree
from datasets_bids.schema import SchemaError
from datasets_bids.tables import parse_metadata_from, read_metadata, read_table

from .trees import write_sheet


def read(root, metadata_from, by_session=False):
    return read_metadata(parse_metadata_from(metadata_from), index_tree(str(root)), by_session)


def test_types_are_inferred_from_all_cells(tmp_path):
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tweight\tsite\tsex\tnothing\n"
        "sub-01\t34\t62.5\t007\tF\tn/a\n"
        "sub-02\tn/a\t70\t012\t\tn/a\n"
        "03\t22\t1e2\t100\tM\tn/a\n"
    )
    metadata = read(tmp_path, "participants.tsv")
    assert metadata.dtypes == {
        "age": "int64",
        "weight": "float64",
        "site": "string",
        "sex": "string",
        "nothing": "string",
    }
    row = {"age": None, "weight": 70.0, "site": "012", "sex": None, "nothing": None}
    assert metadata.get(("sub-02",)) == row
    assert metadata.get(("sub-03",))["age"] == 22
    assert metadata.get(("sub-99",)) == dict.fromkeys(row)
    assert metadata.listed == {"participants.tsv": {("sub-01",), ("sub-02",), ("sub-03",)}}


def test_columns_are_renamed_typed_and_mapped(tmp_path):
    (tmp_path / "data.csv").write_text('ID,"Age, years",Group,Other\nsub-1,61.0,0,x\nsub-2,"n/a",1,y\n')
    columns = {
        "age": {"column": "Age, years", "dtype": "int64"},
        "group": {"column": "Group", "labels": {"0": "control", "1": "patient"}},
    }
    metadata = read(tmp_path, {"path": "data.csv", "key": "ID", "columns": columns})
    assert metadata.dtypes == {"age": "int64", "group": "string"}
    assert metadata.get(("sub-1",)) == {"age": None, "group": "control"}, '"61.0" is no integer'
    metadata = read(tmp_path, {"path": "data.csv", "key": "ID", "columns": columns, "rest": True})
    assert list(metadata.dtypes) == ["age", "group", "Other"]


def test_an_unparsable_cell_is_null_with_a_warning_that_names_it(tmp_path, caplog):
    path = tmp_path / "participants.tsv"
    path.write_text("participant_id\tage\nsub-01\t34\n\nsub-02\tabout sixty\nsub-03\tn/a\n")
    metadata = read(tmp_path, {"path": "participants.tsv", "columns": {"age": {"column": "age", "dtype": "int64"}}})
    assert [metadata.get((f"sub-0{i}",))["age"] for i in (1, 2, 3)] == [34, None, None]
    (warning,) = caplog.messages
    assert warning == f"{path}, row 4, column 'age': 'about sixty' is not of type int64; stored as null"


def test_xlsx_cells_keep_their_types(tmp_path):
    write_sheet(tmp_path / "a.xlsx", {"participant_id": "sub-1", "age": 61, "score": 1.5, "code": "007", "ok": True})
    metadata = read(tmp_path, "a.xlsx")
    assert metadata.dtypes == {"age": "int64", "score": "float64", "code": "string", "ok": "bool"}
    assert metadata.get(("sub-1",)) == {"age": 61, "score": 1.5, "code": "007", "ok": True}


def test_one_sheet_a_subject(tmp_path, caplog):
    for i in (1, 2, 3):
        write_sheet(tmp_path / f"phenotype/sub-{i}/ses-01/sub-{i}_baseline.xlsx", {"Age": 60 + i, "Comment": "a"})
        write_sheet(tmp_path / f"phenotype/sub-{i}/ses-02/sub-{i}_outcome.xlsx", {"mRS": i, "Comment": "b"})
    damaged = tmp_path / "phenotype/sub-3/ses-01/sub-3_baseline.xlsx"
    damaged.write_bytes(b"PK\x03\x04")
    metadata = read(
        tmp_path,
        [
            {"path": "phenotype/{subject}/ses-01/*_baseline.xlsx", "columns": {"age": "Age"}, "rest": True},
            {"path": "phenotype/{subject}/ses-02/*_outcome.xlsx"},
        ],
    )
    assert list(metadata.dtypes) == ["age", "Comment", "mRS", "Comment (outcome)"]
    assert metadata.get(("sub-2",)) == {"age": 62, "Comment": "a", "mRS": 2, "Comment (outcome)": "b"}
    assert metadata.get(("sub-3",)) == {"age": None, "Comment": None, "mRS": 3, "Comment (outcome)": "b"}
    (warning,) = caplog.messages
    assert str(damaged) in warning and "its values are null" in warning


def test_sessions_have_values_of_their_own(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-1\tF\n")
    (tmp_path / "sub-1").mkdir()
    (tmp_path / "sub-1/sub-1_sessions.tsv").write_text("session_id\tage\nses-1\t60\n2\t61\n")
    tables = ["participants.tsv", "{subject}/{subject}_sessions.tsv"]
    metadata = read(tmp_path, tables, by_session=True)
    assert metadata.get(("sub-1", "ses-1")) == {"sex": "F", "age": 60}
    assert metadata.get(("sub-1", "ses-2")) == {"sex": "F", "age": 61}
    with pytest.raises(ValueError, match='row 3: sub-1 stands in row 2 already.*say row="session"'):
        read(tmp_path, tables)


@pytest.mark.parametrize(
    "metadata_from, message",
    [
        (3, "expected a path or a dictionary"),
        ({"path": "a.tsv", "colums": {}}, "'a.tsv': unknown key 'colums'; did you mean 'columns'"),
        ({"path": "a.tsv", "columns": ["age"]}, "'columns' is a dictionary"),
        ({"path": "a.tsv", "columns": {"age": {"dtype": "int64"}}}, "column 'age': needs 'column'"),
        ({"path": "a.tsv", "columns": {"age": {"column": "Age", "typ": 1}}}, "column 'age': unknown key 'typ'"),
        ({"path": "a.tsv", "columns": {"age": {"column": "Age", "dtype": "int"}}}, "'int' is none of string, int64"),
        ({"path": "{subjct}/a.tsv"}, "did you mean {subject}"),
    ],
)
def test_a_mistake_in_metadata_from_is_explained(metadata_from, message):
    with pytest.raises(SchemaError, match=message):
        parse_metadata_from(metadata_from)


@pytest.mark.parametrize(
    "text, metadata_from, message",
    [
        ("participant_id\tage\nsub-1\t1\nsub-1\t2\n", "t.tsv", "t.tsv, row 3: sub-1 stands in row 2 already"),
        ("name\tage\nsub-1\t1\n", "t.tsv", "t.tsv has no column 'participant_id or subject_id'.*set 'key'"),
        ("participant_id\tage\n\t1\n", "t.tsv", "t.tsv, row 2, column 'participant_id': no subject"),
        ("participant_id\tage\nsub-1\t1\t2\t3\n", "t.tsv", "t.tsv: cannot be read as a table"),
        ("", "t.tsv", "t.tsv: cannot be read as a table"),
        ("participant_id\tage\n", {"path": "t.tsv", "columns": {"age": "Age"}}, "no column 'Age'; did you mean 'age'"),
        ("", "u.tsv", "there is no such file under .*it holds t.tsv"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, text, metadata_from, message):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, metadata_from)


def test_a_table_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "t.tsv").write_bytes("participant_id\tname\nsub-1\tMüller\n".encode("latin-1"))
    with pytest.raises(ValueError, match="t.tsv: cannot be read as UTF-8.*save it as UTF-8"):
        read_table(str(tmp_path / "t.tsv"))


def test_an_optional_table_may_be_missing(tmp_path, caplog):
    metadata = read(
        tmp_path, {"path": "t.tsv", "columns": {"age": {"column": "Age", "dtype": "int64"}}, "optional": True}
    )
    assert metadata.dtypes == {"age": "int64"}
    assert "there is no such file" in caplog.text
