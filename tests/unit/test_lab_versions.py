"""The table of results by version of megatron-core: counts, verdicts, page, and the pinned set."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab import megatron_versions
from lab.versions import records
from lab.versions.checkpoints import digest, judge_pairs
from lab.versions.fine_tuning import prepare_task
from lab.versions.page import write_results
from lab.versions.rows import count_results, run_tests, split_tests, totals
from lab.versions.training import Run, train
from megatron_sorted.errors import DataError, SettingsError
from megatron_sorted.platform.supported import MEGATRON_CORE_TESTED
from megatron_sorted.platform.versions import check_megatron_version

ROOT = Path(__file__).resolve().parents[2]
TESTS = """\
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_that_passes(number):
    pass

def test_that_fails():
    assert False

@pytest.fixture
def broken():
    raise ValueError

def test_with_an_error(broken):
    pass

@pytest.mark.skip(reason="nothing here")
def test_that_is_skipped():
    pass

class TestClass:
    def test_in_it(self):
        pass
"""
FACTS = {"date": "2026-11-30", "command": "python -m lab.megatron_versions"}


def session(passed: int, failed: int, not_run: int) -> dict:
    counts = {"passed": passed, "failed": failed, "not run": not_run, "names": ["test_a"] * failed}
    counts["reasons"] = {"no GPU": not_run} if not_run else {}
    return {"files": {"tests/ranks/test_a.py": counts}, "status": int(failed > 0), "seconds": 90.0}


def test_every_kind_of_end_is_counted_by_file(tmp_path):
    folder = tmp_path / "tests" / "unit"
    folder.mkdir(parents=True)
    (folder / "test_ends.py").write_text(TESTS)
    (folder / "test_unreadable.py").write_text("import no_such_module\n")
    report = tmp_path / "report.xml"
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"),
            *("--import-mode=importlib", "--continue-on-collection-errors"),
            *(f"--rootdir={tmp_path}", f"--junitxml={report}", "tests"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1, ended.stdout
    files = count_results(report)
    assert files.keys() == {"tests/unit/test_ends.py", "tests/unit/test_unreadable.py"}
    counts = files["tests/unit/test_ends.py"]
    assert (counts["passed"], counts["failed"], counts["not run"]) == (3, 2, 1)
    assert counts["names"] == ["test_that_fails", "test_with_an_error"]
    assert counts["reasons"] == {"nothing here": 1}
    assert files["tests/unit/test_unreadable.py"]["failed"] == 1
    assert totals({"files": files}) == {"passed": 3, "failed": 3, "not run": 1}


def test_a_session_runs_under_the_given_python(tmp_path):
    result = run_tests(
        Path(sys.executable), "tests/unit/test_files.py", ["-k", "place"], tmp_path, 0
    )
    assert result["status"] == 0 and list(result["files"]) == ["tests/unit/test_files.py"]
    assert totals(result)["passed"] > 0
    with pytest.raises(RuntimeError, match="pytest wrote no report"):
        run_tests(Path(sys.executable), "tests/unit", ["--no-such-option"], tmp_path, 0)


def test_files_and_options_of_pytest_are_separated():
    assert split_tests("tests/unit tests/ranks/test_fsdp.py -k 'docs or lab'") == (
        ["tests/unit", "tests/ranks/test_fsdp.py"],
        ["-k", "docs or lab"],
    )


def test_results_are_kept_for_these_sources_only(tmp_path, monkeypatch):
    kept = records.Records(tmp_path)
    assert kept.get("a/b") is None
    kept.put("a/b", {"hash": "1"})
    assert records.Records(tmp_path).get("a/b") == {"hash": "1"}
    kept.forget("a/b")
    assert kept.get("a/b") is None
    kept.put("a/b", {"hash": "1"})
    monkeypatch.setattr(records, "sources_key", lambda: "changed")
    assert records.Records(tmp_path).get("a/b") is None


def test_the_key_of_sources_follows_every_file_but_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "docs").mkdir()
    seen = []
    for name, text in (("a.py", "1"), ("docs/page.md", "1"), ("a.py", "2"), ("b.py", "1")):
        (tmp_path / name).write_text(text)
        seen.append(records.sources_key())
    assert seen[0] == seen[1] and len(set(seen)) == 3


def test_pairs_are_compared_with_the_run_that_changed_no_version():
    one, two = {"hash": "1", "tensors": 3}, {"hash": "2", "tensors": 3}
    hashes = {"a": one, "b": one}
    for saved, version in ("aa", "ab", "ba", "bb"):
        hashes[f"{saved} under {version}, same"] = one
        hashes[f"{saved} under {version}, other"] = two
    assert all(pair["equal"] for pair in judge_pairs("ab", hashes))
    hashes["a under b, other"] = one
    hashes["b under a, same"] = two
    different = [pair for pair in judge_pairs("ab", hashes) if not pair["equal"]]
    assert [(p["saved by"], p["continued by"], p["layout"]) for p in different] == [
        ("a", "b", "other"),
        ("b", "a", "same"),
    ]
    result = {"hashes": hashes, "pairs": judge_pairs("ab", hashes)}
    assert len(megatron_versions.faults("checkpoints", result)) == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_hash_of_a_checkpoint_follows_every_bit_and_name(tmp_path):
    import torch
    from torch.distributed.checkpoint import FileSystemWriter, save

    def digest_of(name: str, tensors: dict) -> tuple[str, int]:
        save(tensors, storage_writer=FileSystemWriter(tmp_path / name), no_dist=True)
        return digest(tmp_path / name)

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3)}
    expected = digest_of("first", tensors)
    assert expected[1] == 2 and digest_of("again", tensors) == expected
    bits = tensors["a"].view(torch.int32).clone()
    bits[1, 2] += 1
    for name, changed in (
        ("bit", {**tensors, "a": bits.view(torch.float32)}),
        ("name", {"b": tensors["a"], "step": tensors["step"]}),
        ("shape", {**tensors, "a": tensors["a"].reshape(3, 2)}),
    ):
        assert digest_of(name, changed) != expected


def test_the_page_keeps_parts_of_earlier_calls(tmp_path):
    numbers = {"steps": [{"losses": {"2": 2.5, "4": 1.25}, "gradient norm": 0.5}], "sha256": "ab"}
    other = {**numbers, "sha256": "cd"}
    tuned = {"model": "small", "versions": {"0.16.1": numbers, "0.19.2": other}}
    write_results(tmp_path, "fine-tuning of small", FACTS, tuned)
    tests = {
        "0.16.1": {"tests/ranks": session(1200, 0, 1)},
        "0.19.2": {"tests/ranks": session(9, 1, 0)},
    }
    page = write_results(tmp_path, "tests", FACTS, tests)
    assert "| `tests/ranks` | 1,200 / 0 / 1 | 9 / 1 / 0 |" in page and "| minutes | 2 | 2 |" in page
    assert "- 0.16.1, tests/ranks/test_a.py: 1 not run: no GPU" in page
    assert "- 0.19.2, tests/ranks/test_a.py: failed: test_a" in page
    assert "| 0.16.1 | 1.25 | 1.25 | 0.5 | ab | yes |" in page and "| cd | NO |" in page
    assert page.index("## Tests") < page.index("## Fine-tuning of small")
    assert (tmp_path / "megatron_versions.md").read_text() == page
    page = write_results(tmp_path, "tests", {**FACTS, "date": "later"}, tests)
    assert page.count("## Tests") == 1 and "date: later" in page and "date: 2026-11-30" in page
    assert len(megatron_versions.faults("tests", tests)) == 1
    assert megatron_versions.faults("fine-tuning", tuned) == [
        "fine-tuning under 0.19.2: other numbers than under 0.16.1"
    ]


RANKS = """\
import os, sys, time
from lab.versions.training import _all_succeed

def fork(status, seconds):
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os._exit(status)
    return pid

print(_all_succeed([fork(0, 0), fork(0, 0.1)]), _all_succeed([fork(0, 600), fork(3, 0.1)]))
"""


def test_a_rank_that_fails_ends_the_ranks_that_wait_for_it():
    ended = subprocess.run(
        [sys.executable, "-c", RANKS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout == "True False\n", ended.stderr


@pytest.mark.long
def test_a_run_that_fails_ends_with_its_message(tmp_path):
    with pytest.raises(RuntimeError, match=r"bad: failed(?s:.)*--no-such-setting"):
        train(Path(sys.executable), [Run("bad", 2, ("--no-such-setting", "1"), str(tmp_path))])


@pytest.mark.parametrize(("model", "text", "reason"), [
    ("model", None, "--model: needs --text"),
    ("model", "missing.txt", "missing.txt: no such file"),
    ("model", "text.txt", "has no tokenizer.model"),
])  # fmt: skip
def test_a_model_or_text_that_will_not_do_is_refused(model, text, reason, tmp_path):
    (tmp_path / "text.txt").write_text("Once<|endoftext|>Twice")
    with pytest.raises(DataError, match=reason):
        prepare_task(tmp_path / "work", tmp_path / model, text and tmp_path / text, "<|endoftext|>")


def test_tests_must_be_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megatron_versions", "--only", "tests", "--tests", "-k pp2"])
    with pytest.raises(SettingsError, match="--tests: names no file or folder"):
        megatron_versions.read_arguments()


def test_make_hands_over_the_tests_of_test_megatron():
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "test-versions", "MEGATRON_TESTS=tests/a -k 'b c'"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert """--tests "tests/a -k 'b c'\"""" in shown


PINNED = re.findall(
    r"^megatron-core==([\d.]+); (python_version (?:<|>=) \"3\.12\")",
    (ROOT / "constraints.txt").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_the_pinned_versions_are_the_oldest_and_the_newest_that_are_tested():
    assert [version for version, _ in PINNED] == [MEGATRON_CORE_TESTED[0], MEGATRON_CORE_TESTED[-1]]
    assert [python for _, python in PINNED] == [
        'python_version < "3.12"',
        'python_version >= "3.12"',
    ]


@pytest.mark.parametrize("version", MEGATRON_CORE_TESTED)
def test_every_tested_version_is_supported(version):
    check_megatron_version(version)
