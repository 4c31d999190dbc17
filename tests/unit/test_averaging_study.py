"""The page of the study of averaged weights, from rows written by hand."""

import json

import pytest

from lab.averaging import read_arguments
from lab.studies.averaged import VARIANTS, findings, gap_tables, write_page, write_raw
from megatron_sorted.errors import SettingsError
from megatron_sorted.settings.load import load_settings
from megatron_sorted.settings.rules import check_settings


def study(averaged: float) -> dict:
    """Return rows of three seeds; averages differ by ``averaged`` from last weights."""
    rows = []
    for seed in (1, 2, 3):
        for depth in (2, 4):
            base = 3.0 - 0.1 * depth + 0.01 * seed
            rows.append({"run": "separate", "seed": seed, "depth": depth, "loss": base})
            for variant in VARIANTS:
                for weights, more in (("last", 0.5), ("averaged", 0.5 + averaged)):
                    here = {"run": variant.name, "weights": weights, "seed": seed, "depth": depth}
                    rows.append({**here, "loss": base + more + 1e-4 * seed * (more != 0.5)})
    return {
        "steps": 7,
        "tokens_a_step": 1024,
        "rate": "1e-3",
        "facts": [],
        "commands": [],
        "rows": rows,
    }


def test_gaps_and_changes_are_paired_by_seed():
    lines = gap_tables(study(-0.2))
    assert "| trained separately | 2.820 ± 0.025 | 2.620 ± 0.025 |" in lines
    assert "| cosine decay: last weights | +0.500 ± 0.000 | +0.500 ± 0.000 |" in lines
    assert "| constant rate: averaged - last | -0.200 ± 0.000 | -0.200 ± 0.000 |" in lines


@pytest.mark.parametrize(("change", "word"), [(-0.2, "lower"), (0.2, "higher"), (0.0, "undecided")])
def test_findings_name_which_is_lower_outside_the_noise(change, word):
    lines = findings(study(change))
    assert len(lines) == 2 * len(VARIANTS) - 1
    assert all(line.endswith(f": {word} @2 @4.") for line in lines), lines


def test_data_sets_are_parts_of_one_page(tmp_path):
    raw = tmp_path / "averaging.json"
    write_raw(raw, "stories", study(-0.2))
    studies = write_raw(raw, "instructions", study(0.1))
    assert list(studies) == ["instructions", "stories"] == list(json.loads(raw.read_text()))
    write_page(tmp_path / "averaging.md", studies)
    text = (tmp_path / "averaging.md").read_text()
    assert text.index("## Instructions") < text.index("## Stories")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_flags_of_every_variant_are_accepted(variant):
    flags = ["--mock-data", "--vocab-size", "100", "--train-iters", "200", *variant.flags]
    check_settings(load_settings(flags), 1)


def test_numbers_below_one_are_refused():
    with pytest.raises(SettingsError, match="--steps: 0 is not at least 1"):
        read_arguments(["stories", "--model", "m", "--text", "t", "--steps", "0"])
