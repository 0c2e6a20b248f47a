"""`python -m datasets_bids.validate`, of trees and of what was pushed; and what a public push asks for."""

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import nibabel as nib
import numpy as np
import pytest

from datasets_bids import push, validate
from datasets_bids.bids import BidsConfig, build_rows
from datasets_bids.index import NIFTI_EXTENSIONS
from datasets_bids.push import load_builder
from datasets_bids.validation import Expected, _tally_parquet, anatomical_columns, tally_rows, validate_repository

from .hub_server import Client, HubServer
from .test_bids_examples import EXAMPLES
from .trees import aomic_piop1_tree, arc_tree, atlas2_tree, bids_tree, isles24_tree, soop_tree, write_json, write_text


ROOT = Path(__file__).parent.parent
TREES = {
    "isles24": lambda root: isles24_tree(root, count=6, without_perfusion=2, without_vessels=3, odd_sheets=False),
    "arc": arc_tree,
    "atlas2": atlas2_tree,
    "soop": soop_tree,
    "aomic_piop1": aomic_piop1_tree,
}


def run(*args):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "datasets_bids.validate", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_isles24_as_released_passes(tmp_path, capsys):
    isles24_tree(tmp_path, odd_sheets=False)
    options = [str(ROOT / "builders/isles24"), "--data-dir", str(tmp_path)]
    assert validate.main(options) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ok", "subjects", "149", "149"] in table and ["ok", "rows", "with", "ctp", "140", "±", "5", "140"] in table
    assert validate.main([*options, "--config", "full", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["all_passed"] and {"native_lesion_mask"} & {c["name"].split()[-1] for c in result["checks"]}


def test_the_command_says_with_its_status_what_it_found(tmp_path):
    bids_tree(tmp_path / "tree", subjects=1)
    schema = tmp_path / "schema.yaml"
    schema.write_text("schema: {t1w: 'anat/*_T1w.nii.gz'}\nexpected: {subjects: 1, columns: {t1w: 2}}\n")
    options = ("bids", "--schema", schema, "--data-dir", tmp_path / "tree")
    passed = run(*options, "--json")
    assert passed.returncode == 0 and json.loads(passed.stdout)["all_passed"] and not passed.stderr
    empty = "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz"
    (tmp_path / "tree" / empty).write_bytes(b"")
    failed = run(*options)
    assert failed.returncode == 1 and f"{empty}: is empty (0 bytes)" in failed.stdout and not failed.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        (["bids", "--data-dir", "nowhere"], "There is no directory"),
        (["builders/none", "--data-dir", "."], "is no builder directory"),
        (["bids", "--output-dir", "nowhere", "--schema", "none.yaml"], "none.yaml"),
        (["bids", "--data-dir", ".", "--schema", "wrong.yaml"], "did you mean 'subjects'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("schema: {t1w: 'anat/*.nii'}\nexpected: {subject: 1}\n")
    assert validate.main(options) == 1
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("error: ") and words in printed.err and printed.err.count("\n") == 1 and not printed.out
    )


@pytest.mark.parametrize(
    "options", [[], ["--data-dir", "a", "--repo-id", "b/c"], ["--repo-id", "b/c", "--deep"], ["--data-dir", "s3://b"]]
)
def test_what_to_check_has_to_be_said(options):
    with pytest.raises(SystemExit) as error:
        validate.parse_args(["bids", *options])
    assert error.value.code == 2


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason=f"{EXAMPLES} is not there; set BIDS_EXAMPLES")
@pytest.mark.parametrize("name", sorted(os.listdir(EXAMPLES)) if EXAMPLES.is_dir() else [])
def test_bids_examples(name):
    """Empty and unreadable images are named, all of them; nothing crashes."""
    result = validate.check_tree(validate.parse_args(["bids", "--data-dir", str(EXAMPLES / name), "--deep"]))
    checks = {check.name: check for check in result.checks}
    images = [path for path in (EXAMPLES / name).rglob("*") if path.name.endswith(NIFTI_EXTENSIONS)]
    images = [path for path in images if not path.name.startswith(".")]
    empty = {str(path.relative_to(EXAMPLES / name)) for path in images if path.stat().st_size == 0}
    assert {finding.path for finding in checks["image files"].findings} == empty
    unreadable = {finding.path for finding in checks["image data"].findings}
    if name in ("pet002", "pet005"):
        assert unreadable == {
            str(path.relative_to(EXAMPLES / name)) for path in images if name == "pet002" or path.stat().st_size < 9
        }
        words = "is an HTML page" if name == "pet002" else "is no NIfTI image"
        assert all(words in finding.problem for finding in checks["image data"].findings)
    if name == "ieeg_visual":
        assert not unreadable - empty


# -- after a push --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", ["1", "3"])
@pytest.mark.parametrize("name", TREES)
def test_a_pushed_directory_has_the_counts_of_its_tree(tmp_path, name, num_shards, capsys):
    TREES[name](tmp_path / "tree")
    options = [str(ROOT / "builders" / name), "--data-dir", str(tmp_path / "tree")]
    where = ["--output-dir", str(tmp_path / "out")]
    assert push.main([*options, *where, "--num-shards", num_shards]) == 0
    builder = load_builder(validate.parse_args(options), data_dir=str(tmp_path / "tree"))
    for split, rows in builder._rows.items():
        local = tally_rows(rows, builder.info.features)
        pushed = _tally_parquet(sorted(map(str, (tmp_path / "out/data").glob(f"{split}-*.parquet"))))
        assert (pushed.subjects, pushed.sessions) == (local.subjects, local.sessions)
        assert pushed.lengths.keys() == local.lengths.keys()
        assert all((pushed.lengths[column] == local.lengths[column]).all() for column in local.lengths)
    capsys.readouterr()
    status = {where: validate.main([*options[:1], "--json", *where]) for where in (tuple(options[1:]), tuple(where))}
    tree, repository = (json.loads(text + "}")["checks"] for text in capsys.readouterr().out.split("\n}")[:2])
    counts = [
        {c["name"]: c["actual"] for c in checks if c["name"].startswith(("subj", "sess", "rows", "images in"))}
        for checks in (tree, repository)
    ]
    by_the_card = {key for key in counts[1] if "by the card" in key}
    assert by_the_card and {key: counts[1][key] for key in counts[1].keys() - by_the_card} == counts[0]
    assert set(status.values()) == {1}, "small trees do not have the declared counts"


def test_a_repository_that_lost_something_fails(tmp_path):
    bids_tree(tmp_path / "tree", subjects=3)
    schema = tmp_path / "schema.yaml"
    schema.write_text("schema: {t1w: 'anat/*_T1w.nii.gz', bold: {path: 'func/*_bold.nii', many: true}}\n")
    options = ["bids", "--schema", str(schema), "--output-dir", str(tmp_path / "out")]
    assert push.main([*options, "--data-dir", str(tmp_path / "tree"), "--num-shards", "3"]) == 0
    assert validate.main(options) == 0
    expected = Expected()
    missing = validate_repository(str(tmp_path / "out"), "default", expected, ["t1w", "flair"])
    assert [str(finding) for check in missing.checks for finding in check.findings] == ["there is no column 'flair'"]
    next((tmp_path / "out/data").glob("*.parquet")).unlink()
    lost = validate_repository(str(tmp_path / "out"), "default", expected)
    assert [(c.name, c.expected, c.actual) for c in lost.checks if not c.passed] == [
        ("rows of train by the card", "6", "4")
    ]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    imports = "hub_scripts, datasets_bids.push, datasets_bids.validate"
    with Client(hub.env(), tmp_path_factory.mktemp("client"), imports=imports) as client:
        yield client


def command(client, module, *options):
    """(exit status, what it printed)"""
    code = "from datasets_bids import upload; upload.FIRST_WAIT, upload.PATIENCE = 0.05, 5.0\n"
    script = client.start(
        f"{code}import sys; from datasets_bids import {module}; sys.exit({module}.main({list(map(str, options))!r}))"
    )
    return script.wait(), script.text


def large_tree(root, subjects=5):
    """Images of 2 MB that do not compress."""
    voxels = np.random.default_rng(0)
    for i in range(1, subjects + 1):
        for name in ("func/sub-{}_bold", "dwi/sub-{}_dwi"):
            path = root / f"sub-{i}" / (name.format(i) + ".nii")
            path.parent.mkdir(parents=True, exist_ok=True)
            if (i, name[0]) != (2, "d"):
                nib.save(nib.Nifti1Image(voxels.integers(0, 255, (128, 128, 128), "u1"), np.eye(4)), path)
    write_text(
        root / "participants.tsv",
        "participant_id\tage\n" + "".join(f"sub-{i}\t{50 + i}\n" for i in range(1, subjects)),
    )
    return root


LARGE = """
schema: {bold: {path: 'func/*_bold.nii', many: true}, dwi: {path: 'dwi/*_dwi.nii', optional: true}}
metadata_from: participants.tsv
expected: {subjects: 5, columns: {bold: 5, dwi: 4, age: 4}, images: {bold: 5}}
"""


def test_a_repository_is_counted_without_its_volumes(hub, client, tmp_path):
    tree, schema = large_tree(tmp_path / "tree"), tmp_path / "schema.yaml"
    schema.write_text(LARGE)
    options = ("bids", "--schema", schema, "--repo-id", "alice/large")
    status, text = command(client, "push", *options, "--data-dir", tree, "--num-shards", 2)
    assert status == 0, text
    hub.clear_log()
    status, text = command(client, "validate", *options)
    assert status == 0 and "rows with dwi" in text, text
    sent = [entry.get("sent", 0) for entry in hub.log() if entry.get("route") in ("cdn", "resolve")]
    assert 0 < sum(sent) < 300_000 and max(sent) < 128**3 / 10, sent
    schema.write_text(LARGE.replace("dwi: 4", "dwi: 5").replace("subjects: 5", "subjects: 6"))
    status, text = command(client, "validate", *options)
    assert status == 1 and text.count("FAILED") == 2, text
    status, text = command(client, "validate", "bids", "--schema", schema, "--repo-id", "alice/none")
    assert status == 1 and text.splitlines()[-1].startswith("error: ") and "alice/none" in text, text


# -- a public push -------------------------------------------------------------------------------------------------------


def test_a_public_push_of_anatomical_images_has_to_be_affirmed(hub, client, tmp_path):
    bids_tree(tmp_path / "tree", subjects=1)
    schema = tmp_path / "schema.yaml"
    schema.write_text("schema: {t1w: 'anat/*_T1w.nii.gz', bold: 'func/*_bold.nii'}\n")
    options = ("bids", "--schema", schema, "--data-dir", tmp_path / "tree", "--repo-id")
    status, text = command(client, "push", *options, "alice/faces")
    last = text.splitlines()[-1]
    assert status == 1 and "anatomical images (t1w) needs --affirm-defaced" in last and "--private" in last, text
    assert not hub.exists("alice/faces")
    assert command(client, "push", *options, "alice/faces", "--private")[0] == 0
    assert command(client, "push", *options, "alice/faces")[0] == 0, "the repository is private"
    status, text = command(client, "push", *options, "alice/shown", "--affirm-defaced")
    assert status == 0 and "defaced" not in text, "it is a person who affirms; the program never says so"
    assert command(client, "push", *options, "alice/shown")[0] == 1, "the repository is public"
    assert command(client, "push", *options, "alice/shown", "--dry-run")[0] == 0
    schema.write_text(
        "schema: {bold: 'func/*_bold.nii', mask: 'derivatives/masks/{subject}/{session}/anat/*_mask.nii.gz'}\n"
    )
    assert command(client, "push", *options, "alice/functional")[0] == 0


def test_a_public_push_stops_on_identity_fields(hub, client, tmp_path):
    tree = bids_tree(tmp_path / "tree", subjects=1)
    image = nib.load(tree / "sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii")
    image = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    image.header["descrip"] = b"scanned 2019-03-04"
    bold = tree / "sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii"
    bold.write_bytes(image.to_bytes())
    write_json(tree / "sub-01/ses-1/dwi/sub-01_ses-1_dwi.json", source={"PatientName": "Doe^Jane"})
    write_text(tree / "participants.tsv", "participant_id\tage\nsub-01\t97\n")
    schema = tmp_path / "schema.yaml"
    schema.write_text(
        "schema: {bold: 'func/*_bold.nii', dwi: 'dwi/*_dwi.nii.gz', dwi_json: {of: dwi, companion: json}}\n"
        "metadata_from: participants.tsv\n"
    )
    options = ("bids", "--schema", schema, "--data-dir", tree, "--repo-id", "alice/named")
    status, text = command(client, "push", *options)
    assert status == 1 and not hub.exists("alice/named"), text
    error = text[text.index("error: ") :]
    assert "participants can be identified by 3 fields;" in error and "--allow-identity-fields" in error
    assert f"{bold}, header field descrip: holds a date" in error
    assert "train, row 0, column 'dwi_json', source.PatientName: identifies" in error
    assert "train, column 'age': is above 89 years: write 89 (rows 0, 1)" in error and "Jane" not in text
    assert command(client, "push", *options, "--allow-identity-fields")[0] == 0
    assert hub.exists("alice/named")


def test_atlas_goes_into_no_public_repository(hub, client, tmp_path):
    options = (ROOT / "builders/atlas2", "--data-dir", atlas2_tree(tmp_path), "--repo-id", "alice/atlas2")
    status, text = command(client, "push", *options, "--affirm-defaced")
    assert status == 1 and "must be private (--private): the data use agreement of ATLAS forbids" in text, text
    assert not hub.exists("alice/atlas2")
    assert command(client, "push", *options, "--private")[0] == 0


@pytest.mark.parametrize(
    "column, path, anatomical",
    [
        ("t1w", "scans/a.nii", True),
        ("image", "sub-1/anat/sub-1_acq-x_inplaneT2.nii.gz", True),
        ("image", "sub-1/sub-1_FLAIR.nii", True),
        ("ncct", "raw/sub-1_ncct.nii.gz", True),
        ("image", "sub-1/anat/sub-1_other.nii.gz", True),
        ("lesion", "sub-1/anat/sub-1_desc-lesion_mask.nii.gz", False),
        ("t1w_mask", "sub-1/sub-1.nii", False),
        ("bold", "sub-1/func/sub-1_task-rest_bold.nii.gz", False),
        ("adc", "sub-1/dwi/sub-1_adc.nii.gz", False),
    ],
)
def test_which_images_are_anatomical(tmp_path, column, path, anatomical):
    from datasets import Dataset, Features, List, Nifti

    for feature, value in ((Nifti(), str(tmp_path / path)), (List(Nifti()), [str(tmp_path / path)])):
        dataset = Dataset.from_dict({column: [None, value]}, features=Features({column: feature}))
        assert anatomical_columns({"train": dataset}) == [column] * anatomical


def test_what_cannot_be_looked_into_stops_a_public_push(tmp_path):
    """Files by URL are looked into as well."""
    from datasets import Dataset, Features, Nifti

    from datasets_bids.validation import refuse_exposure

    def rows(*paths):
        return {"train": Dataset.from_dict({"bold": list(paths)}, features=Features({"bold": Nifti()}))}

    for name, descrip in (("clean", b"spm"), ("dated", b"2019-03-04")):
        image = nib.Nifti1Image(np.zeros((99, 99, 99), "u1"), np.eye(4))
        image.header["descrip"] = descrip
        for ending in (".nii", ".nii.gz"):
            nib.save(image, tmp_path / f"{name}{ending}")
            with fsspec.open(f"memory://identity/{name}{ending}", "wb") as file:
                file.write((tmp_path / f"{name}{ending}").read_bytes())
    (tmp_path / "noise.nii").write_bytes(b"noise" * 100)
    for root in (f"{tmp_path}/", "memory://identity/"):
        refuse_exposure(rows(None, f"{root}clean.nii", f"{root}clean.nii.gz"))
        for name in ("dated.nii", "dated.nii.gz", "noise.nii"):
            with pytest.raises(
                ValueError, match=f"(?s)identified by 1 field;.*{name}.* (holds a date|cannot be looked into)"
            ):
                refuse_exposure(rows(f"{root}clean.nii", f"{root}{name}"))
            refuse_exposure(rows(f"{root}{name}"), allow_identity_fields=True)


def test_every_builder_declares_what_its_columns_hold():
    """Counts and grids name columns that there are."""
    for name in TREES:
        builder = load_builder(validate.parse_args([str(ROOT / "builders" / name), "--data-dir", "."]))
        for config in builder.BUILDER_CONFIGS:
            expected = validate.parse_expected(config.expected)
            assert expected != Expected() and isinstance(config, BidsConfig)
            build_rows(config, None)
            tables = config.metadata_from if isinstance(config.metadata_from, list) else [config.metadata_from or {}]
            columns = {*config.schema, *(column for table in tables for column in table.get("columns", {}))}
            named = {*expected.columns, *expected.images, *(c for group in expected.same_grid for c in group)}
            unknown = [name for name in named if not fnmatch.filter(columns, name)]
            assert not unknown
