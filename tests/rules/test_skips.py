"""With --no-skips only listed tests are skipped, for the listed reason; the list is valid."""

import re
from pathlib import Path

import pytest

from tests.rules.sources import ROOT
from tests.support.skips import LIST, AllowedSkip, read_list

pytest_plugins = ["pytester"]
TESTS = """\
import pytest

def test_passes():
    pass

def test_lacks_a_program():
    pytest.skip("sshd missing")

@pytest.mark.skipif(True, reason="pdsh missing")
def test_is_marked(): pass

@pytest.mark.xfail(reason="a known fault")
def test_fails_as_expected():
    assert False

@pytest.fixture
def cluster():
    pytest.skip("munged missing")

@pytest.mark.parametrize("strategy", ["a[0]", "b"])
def test_needs_a_cluster(cluster, strategy): pass
"""
MODULE = 'import pytest\npytest.importorskip("no_such_package", reason="an extra")\n'


@pytest.fixture
def run(pytester, monkeypatch):
    """Return a function that runs ``TESTS`` and ``MODULE`` with arguments and allowed skips."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]")
    pytester.makepyfile(test_some=TESTS, test_module=MODULE)

    def result(*arguments: str, allowed: str = ""):
        path = pytester.path / LIST
        path.parent.mkdir(exist_ok=True)
        path.write_text(allowed)
        return pytester.runpytest_inprocess(
            "-p", "tests.support.skips", "-rs", "--continue-on-collection-errors", *arguments
        )

    return result


def test_without_the_option_skips_are_named(run):
    done = run()
    done.assert_outcomes(passed=1, skipped=5, xfailed=1)
    assert done.ret == 0
    done.stdout.fnmatch_lines(["SKIPPED*sshd missing"])


def test_no_skip_passes_that_is_not_listed(run):
    done = run("--no-skips")
    # one fails inside the test, four before it or in its file
    done.assert_outcomes(passed=1, failed=1, errors=4, xfailed=1)
    assert done.ret == 1
    for reason in ("sshd missing", "pdsh missing", "munged missing", "an extra"):
        done.stdout.fnmatch_lines([f"*allows only the skips of .ci/allowed_skips: {reason}"])


def test_listed_skips_pass_for_their_reason_alone(run):
    listed = "# a comment\n\ntest_some.py::*: missing\ntest_module.py: an extra\n"
    done = run("--no-skips", allowed=listed)
    done.assert_outcomes(passed=1, skipped=5, xfailed=1)
    assert done.ret == 0
    done = run("--no-skips", allowed=listed.replace(": missing", ": sshd missing"))
    done.assert_outcomes(passed=1, skipped=2, errors=3, xfailed=1)
    assert (
        run("--no-skips", allowed="test_some.py::test_lacks\n").ret == pytest.ExitCode.USAGE_ERROR
    )


def test_brackets_in_a_test_id_stand_for_themselves():
    skip = AllowedSkip("test_some.py::test_needs_a_cluster[a[0]]", "missing")
    assert skip.covers("test_some.py::test_needs_a_cluster[a[0]]", "munged missing")
    assert not skip.covers("test_some.py::test_needs_a_cluster[b]", "munged missing")
    assert not AllowedSkip("test_a.py", "missing").covers("tests/test_a.py::test_b", "missing")


def test_the_list_names_what_exists():
    listed = read_list(ROOT / LIST)
    assert listed and all(list(ROOT.glob(skip.tests.partition("::")[0])) for skip in listed)


def test_ci_installs_every_package_that_a_skip_names():
    installed = set(re.findall(r"\]=([a-z-]+)", (ROOT / ".ci" / "install").read_text()))
    sources = [
        path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)
    ]
    lists = re.findall(
        r"apt-get install (?:--no-install-recommends )?([a-z -]+)", "\n".join(sources)
    )
    named = {package for listed in lists for package in listed.split()}
    assert len(named) >= 4 and named <= installed
