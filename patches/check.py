"""Apply the patches of this directory to `datasets` one by one, and check each where it stands.

    python -m patches.check                                  # apply, ruff, the patches' own tests with and without them
    python -m patches.check --upstream ../datasets           # and upstream's own tests of the files that each touches
    python -m patches.check --upstream ../datasets --all     # and all of upstream's tests before the first and after the last

How it works:

- The base is the source distribution of the release from the package index, kept in `--work` and made a git repository. A checkout
  of upstream has the same files, so what applies here applies there.
- After each patch: `ruff check` and `ruff format --check` with upstream's configuration, then the tests that the patch brings. These
  run twice: on the source with the patch, where all pass, and on the source before it, where at least one fails.
- Upstream's tests need its `conftest.py` and fixtures, which are not in the source distribution: `--upstream` names a checkout that
  has them. They run before the series and after each patch; what passed before has to pass after.
- At the end `tests/test_patches.py` runs on the patched library: the project's property tests and its checks of each defect without
  anything replaced, and that `datasets_bids` beside it replaces only what no patch mends (the list is in `__init__.py`).

The interpreter has to have what `datasets` and its tests import: `pip install -e '.[test]' ruff`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path


RELEASE = "5.2.0"
HERE = Path(__file__).parent
ROOT = HERE.parent

UPSTREAM_TESTS = {
    "src/datasets/features/": ["tests/features", "tests/packaged_modules/test_niftifolder.py"],
    "src/datasets/packaged_modules/": ["tests/packaged_modules"],
    "src/datasets/table.py": ["tests/test_table.py", "tests/features"],
    "src/datasets/arrow_dataset.py": ["tests/test_arrow_dataset.py", "tests/io/test_parquet.py"],
    "src/datasets/arrow_writer.py": ["tests/test_arrow_writer.py", "tests/io/test_parquet.py"],
    "src/datasets/iterable_dataset.py": ["tests/test_iterable_dataset.py"],
    "src/datasets/io/parquet.py": ["tests/io/test_parquet.py"],
    "src/datasets/formatting/": ["tests/test_formatting.py"],
    "src/datasets/load.py": ["tests/test_load.py"],
    "src/datasets/data_files.py": ["tests/test_data_files.py"],
}
"""Which of upstream's tests look at a file."""


def patch_files() -> list[Path]:
    """The series, in order."""
    return sorted(HERE.glob("[0-9]*.patch"))


def run(*command: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, **options)


def must(*command: object, cwd: Path, **options) -> str:
    done = run(*command, cwd=cwd, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def make_base(work: Path) -> Path:
    """A git repository of the release, one commit; made anew each time."""
    archive = work / f"datasets-{RELEASE}.tar.gz"
    if not archive.exists():
        must(
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            f"datasets=={RELEASE}",
            cwd=work,
        )
    repository = work / "datasets"
    shutil.rmtree(repository, ignore_errors=True)
    with tarfile.open(archive) as f:
        f.extractall(work, filter="data")
    (work / f"datasets-{RELEASE}").rename(repository)
    shutil.rmtree(repository / "src/datasets.egg-info", ignore_errors=True)
    (repository / ".gitignore").write_text("__pycache__/\n")
    git(repository, "init", "-q")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", f"datasets {RELEASE}")
    return repository


def git(repository: Path, *arguments: object) -> str:
    who = ["-c", "user.name=check", "-c", "user.email=check@localhost", "-c", "core.autocrlf=false"]
    return must("git", *who, *arguments, cwd=repository)


class Checker:
    def __init__(self, work: Path, upstream: Path | None):
        self.work, self.upstream = work, upstream
        self.repository = make_base(work)
        self.overlay = work / "upstream-tests"
        self.before: dict[str, dict[str, str]] = {}
        if upstream is not None:
            self._lay_out_upstream_tests()

    # Running tests

    def environment(self, source: Path, *more: Path) -> dict[str, str]:
        path = os.pathsep.join(map(str, (source / "src", *more)))
        return os.environ | {
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.work / "hf"),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }

    def pytest(self, source: Path, tests: list[str], cwd: Path, *more: Path, options: tuple = ()) -> dict[str, str]:
        """Each test and how it ended: "passed", "failed" or "skipped"."""
        report = self.work / "report.xml"
        report.unlink(missing_ok=True)
        done = run(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *options,
            *tests,
            cwd=cwd,
            env=self.environment(source, *more),
        )
        self.output = done.stdout + done.stderr
        if not report.exists():
            raise SystemExit(self.output)
        results = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            name = f"{case.get('classname')}::{case.get('name')}"
            results[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        return results

    def _lay_out_upstream_tests(self) -> None:
        shutil.rmtree(self.overlay, ignore_errors=True)
        shutil.copytree(self.upstream / "tests", self.overlay / "tests")
        shutil.copy(self.repository / "pyproject.toml", self.overlay)
        (self.overlay / "src").symlink_to(self.repository / "src")
        # The release's own tests where they run with the checkout's fixtures, as they do with a checkout of the release.
        for test in sorted((self.repository / "tests").glob("*.py")):
            theirs = self.overlay / "tests" / test.name
            kept = theirs.read_bytes() if theirs.exists() else None
            if kept == test.read_bytes():
                continue
            shutil.copy(test, theirs)
            collected = run(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "--co",
                "-p",
                "no:cacheprovider",
                theirs,
                cwd=self.overlay,
                env=self.environment(self.repository),
            )
            if collected.returncode and kept is not None:
                print(f"  {test.name}: the checkout's instead of the release's, which needs newer fixtures")
                theirs.write_bytes(kept)

    def upstream_tests(self, name: str) -> dict[str, str]:
        options = ("--dist=loadfile", "-n2") if has("xdist") else ()
        return self.pytest(self.repository, [name], self.overlay, options=("-m", "not integration", *options))

    def compare_upstream(self, names: list[str], first: bool = False) -> str:
        words = []
        for name in names:
            if not (self.overlay / name).exists():
                words.append(f"{name}: not in the checkout")
                continue
            after = self.upstream_tests(name)
            if first:
                self.before[name] = after
            before = self.before[name]
            lost = sorted(
                test for test, result in before.items() if result == "passed" and after.get(test) != "passed"
            )
            if lost:
                raise SystemExit(
                    f"{name}: passed before and does not now:\n  " + "\n  ".join(lost) + "\n" + self.output[-5000:]
                )
            words.append(f"{name}: {count(after)} (before: {count(before)})")
        return "\n    ".join(words)

    # One patch

    def check(self, patch: Path) -> None:
        git(self.repository, "am", "-q", patch)
        changed = git(self.repository, "diff", "--name-only", "--diff-filter=AM", "HEAD~1").split()
        python = [name for name in changed if name.endswith(".py")]
        must(sys.executable, "-m", "ruff", "check", "-q", *python, cwd=self.repository)
        must(sys.executable, "-m", "ruff", "format", "-q", "--check", *python, cwd=self.repository)
        tests = [name for name in python if name.startswith("tests/")]
        if not tests:
            raise SystemExit(f"{patch.name} brings no test")
        own = self.pytest(self.repository, tests, self.repository)
        if "failed" in own.values() or "passed" not in own.values():
            raise SystemExit(f"{patch.name}: its own tests fail\n{self.output[-5000:]}")
        previous = self.work / "previous"
        git(self.repository, "worktree", "add", "-q", "--force", "--detach", previous, "HEAD~1")
        try:
            without = self.pytest(previous, tests, self.repository)
        finally:
            git(self.repository, "worktree", "remove", "--force", previous)
        proofs = [
            test for test, result in own.items() if result == "passed" and without.get(test, "failed") == "failed"
        ]
        if not proofs:
            raise SystemExit(f"{patch.name}: its tests pass without it too")
        added, removed = numstat(self.repository)
        print(
            f"{patch.name}: +{added} -{removed} in {len(changed)} files; own tests: {count(own)}, of which {len(proofs)} fail without it"
        )
        if self.upstream is not None:
            names = sorted(
                {
                    name
                    for path in changed
                    for prefix, tests in UPSTREAM_TESTS.items()
                    if path.startswith(prefix)
                    for name in tests
                }
            )
            names = [name for name in names if (self.overlay / name).exists()]
            for name in names:
                if name not in self.before:
                    raise SystemExit(f"{name} did not run before the series")
            print(f"    {self.compare_upstream(names)}")

    def check_own_tests(self) -> None:
        """The project beside a library that has the fixes."""
        tests = ["tests/test_patches.py"]
        results = self.pytest(self.repository, tests, ROOT, ROOT)
        if "failed" in results.values() or "passed" not in results.values():
            raise SystemExit(self.output[-8000:])
        print(f"the project's own tests on the patched library: {count(results)}")


def numstat(repository: Path) -> tuple[int, int]:
    lines = [line.split("\t") for line in git(repository, "diff", "--numstat", "HEAD~1").splitlines()]
    return sum(int(line[0]) for line in lines), sum(int(line[1]) for line in lines)


def count(results: dict[str, str]) -> str:
    values = list(results.values())
    return (
        ", ".join(f"{values.count(kind)} {kind}" for kind in ("passed", "failed", "skipped") if kind in values)
        or "none"
    )


def has(plugin: str) -> bool:
    return run(sys.executable, "-c", f"import {plugin}", cwd=ROOT).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m patches.check", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--upstream", type=Path, help="a checkout of huggingface/datasets, for its conftest.py and fixtures"
    )
    parser.add_argument(
        "--all", action="store_true", help="all of upstream's tests that the series may concern, before and after it"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/patches", help="where to work (default: build/patches)"
    )
    parser.add_argument("--until", metavar="NUMBER", help="stop after the patch with this number, e.g. 0004")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    upstream = arguments.upstream.resolve() if arguments.upstream else None
    checker = Checker(arguments.work.resolve(), upstream)
    patches = patch_files()
    if arguments.until:
        patches = [patch for patch in patches if patch.name[:4] <= arguments.until]
    names = sorted({name for tests in UPSTREAM_TESTS.values() for name in tests})
    if upstream is None:
        print("left out without --upstream: upstream's own tests")
    else:
        print(f"upstream's tests before the series:\n    {checker.compare_upstream(names, first=True)}")
    for patch in patches:
        checker.check(patch)
    if upstream is not None and arguments.all:
        print(f"upstream's tests after the series:\n    {checker.compare_upstream(names)}")
    if patches == patch_files():
        checker.check_own_tests()


if __name__ == "__main__":
    main()
