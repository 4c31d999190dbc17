"""Properties of the simulation itself."""

from pathlib import Path

import pytest

from tests.support.npu_simulation import libraries

pytestmark = pytest.mark.npu


def test_stand_ins_get_their_name_when_they_are_complete(tmp_path, monkeypatch):
    """Check that a session never loads a library that a concurrent session is still writing."""
    written: list[Path] = []

    def compiled(library: Path, source: str) -> None:
        assert source and library.parent.parent == tmp_path
        library.touch()
        written.append(library)

    monkeypatch.setattr(libraries, "_compile", compiled)
    folder = libraries.build(tmp_path)
    assert folder.parent == tmp_path and all(library.parent != folder for library in written)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        library.name for library in written
    )
    assert libraries.build(tmp_path) == folder and len(written) == len(
        {library.name for library in written}
    ), "made once"
    assert list(tmp_path.iterdir()) == [folder]


def test_the_second_of_two_concurrent_processes_uses_the_libraries_of_the_first(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(libraries, "_compile", lambda library, source: library.touch())
    name, together = libraries.build(tmp_path / "alone").name, tmp_path / "together"

    def compiled(library: Path, source: str) -> None:
        (together / name).mkdir(exist_ok=True)  # meanwhile the first process is done
        (together / name / "of the first").touch()
        library.touch()

    monkeypatch.setattr(libraries, "_compile", compiled)
    assert libraries.build(together) == together / name
    assert [path.name for path in together.iterdir()] == [name] and (
        together / name / "of the first"
    ).exists()
