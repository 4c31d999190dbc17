"""Every example is a run that can be started unchanged."""

from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings
from tests.rules.sources import ROOT, name_of


def problem_of(path) -> str | None:
    """Return the fault of an example, or None."""
    try:
        settings = load_settings(["--config", str(path)])
        if settings.world_size is None:
            return "no key `world-size: N`"
        check_settings(settings, settings.world_size)
    except SettingsError as error:
        return str(error)
    return None


def test_every_example_can_be_started():
    problems = {
        name_of(path): problem
        for path in sorted((ROOT / "examples").rglob("*.y*ml"))
        if (problem := problem_of(path))
    }
    assert not problems


def test_a_wrong_example_is_reported(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\n")
    assert "world-size" in problem_of(path)
    path.write_text(
        "world-size: 3\nmock-data: true\nvocab-size: 100\ntensor-model-parallel-size: 2\n"
    )
    assert "number of processes: 3 is not a multiple of 2" in problem_of(path)
    path.write_text(
        "# A run.\nworld-size: 2\nmock-data: true\nvocab-size: 100\ntensor-model-parallel-size: 2\n"
    )
    assert problem_of(path) is None
