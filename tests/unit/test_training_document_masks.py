"""Masks of text documents: as given, as the checkpoint was trained, or the default."""

import dataclasses
import json

import pytest

from megatron_sorted.checkpoint.layout import iteration_directory
from megatron_sorted.checkpoint.manifest import FileRecord, Progress, manifest_text
from megatron_sorted.errors import SettingsError
from megatron_sorted.evaluation.prepared import settings_of_checkpoint
from megatron_sorted.settings.derived import document_masks
from megatron_sorted.settings.files import check_files
from megatron_sorted.settings.load import load_settings, settings_as_dict
from megatron_sorted.training.run.inputs import check_context_parallel
from megatron_sorted.training.run.resume import OLD_VALUES, changed_settings, settle_document_masks
from tests.support.tiny import tiny

MASKS = tuple(OLD_VALUES)


def masks_of(settings) -> tuple[bool, ...]:
    return tuple(getattr(settings, name) for name in MASKS)


def write_checkpoint(root, settings, without=()) -> None:
    """Write a checkpoint's manifest; ``without`` names settings that its version lacked."""
    directory = iteration_directory(root, 4)
    directory.mkdir(parents=True)
    (directory / "weights").write_bytes(b"1234")
    saved = {
        name: value for name, value in settings_as_dict(settings).items() if name not in without
    }
    description = {"run_id": "a", "saved_at": "2026-01-01T00:00:00.000+00:00", "settings": saved}
    (directory / "manifest.json").write_text(
        manifest_text(description, Progress(4, 32), {"weights": FileRecord(4, "x")})
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (True, True, True)),
        ({"context_parallel_size": 2}, (False, False, False)),
        ({"reset_attention_mask": False}, (False, False, False)),
        ({"reset_attention_mask": False, "eod_mask_loss": True}, (False, False, True)),
        ({"reset_attention_mask": True, "reset_position_ids": False}, (True, False, True)),
    ],
)
def test_defaults(given, expected):
    assert tuple(document_masks(tiny(**given)).values()) == expected
    assert masks_of(settle_document_masks(tiny(**given))) == expected


def test_flags_and_yaml(tmp_path):
    assert masks_of(load_settings([])) == (None, None, None)
    assert masks_of(load_settings(["--reset-attention-mask", "--no-eod-mask-loss"])) == (
        True,
        None,
        False,
    )
    (tmp_path / "run.yaml").write_text(
        "reset-attention-mask: false\nreset-position-ids: null\neod-mask-loss: true\n"
    )
    assert masks_of(load_settings(["--config", str(tmp_path / "run.yaml")])) == (False, None, True)


def test_a_checkpoint_of_an_earlier_version_keeps_its_masks(tmp_path):
    write_checkpoint(tmp_path / "old", tiny(), without=MASKS)
    resumed = settle_document_masks(tiny(load=str(tmp_path / "old")))
    assert masks_of(resumed) == (False, False, False)
    saved = json.loads((iteration_directory(tmp_path / "old", 4) / "manifest.json").read_text())[
        "settings"
    ]
    assert not [
        line
        for line in changed_settings(saved, resumed)
        if "mask" in line or "position-ids" in line
    ]
    overridden = settle_document_masks(tiny(load=str(tmp_path / "old"), reset_attention_mask=True))
    assert masks_of(overridden) == (True, False, False)
    assert "reset-attention-mask False -> True" in changed_settings(saved, overridden)
    assert masks_of(settle_document_masks(tiny(load=str(tmp_path / "old"), finetune=True))) == (
        True,
        True,
        True,
    )
    assert settings_of_checkpoint(tmp_path / "old") == {
        "seq_length": 16,
        **dict.fromkeys(MASKS, False),
    }


def test_a_run_keeps_the_masks_of_its_checkpoint(tmp_path):
    trained = settle_document_masks(tiny(reset_attention_mask=True, eod_mask_loss=False))
    write_checkpoint(tmp_path / "new", trained)
    assert masks_of(settle_document_masks(tiny(load=str(tmp_path / "new")))) == (True, True, False)
    assert settings_of_checkpoint(tmp_path / "new") == {
        "seq_length": 16,
        **dict(zip(MASKS, (True, True, False), strict=True)),
    }
    assert masks_of(settle_document_masks(tiny(load=str(tmp_path / "nothing")))) == (
        True,
        True,
        True,
    )


def test_the_same_command_again_keeps_the_masks_of_its_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "old", tiny(), without=MASKS)
    saved = str(tmp_path / "old")
    assert masks_of(settle_document_masks(tiny(save=saved))) == (False, False, False)
    assert masks_of(
        settle_document_masks(tiny(save=saved, load=str(tmp_path / "theirs"), finetune=True))
    ) == (False, False, False)
    assert masks_of(settle_document_masks(tiny(save=saved, eod_mask_loss=True))) == (
        False,
        False,
        True,
    )
    assert masks_of(settle_document_masks(tiny(save=saved, skip_train=True))) == (
        True,
        True,
        True,
    ), "nothing is saved there"


def test_context_parallelism_refuses_separate_documents():
    given = dataclasses.replace(tiny(context_parallel_size=2, reset_attention_mask=True))
    with pytest.raises(
        SettingsError,
        match=r"--reset-attention-mask: with --context-parallel-size 2.* Use 1, "
        "or leave the flag out",
    ):
        check_files(given)

    class Packed:
        packs = True

    with pytest.raises(SettingsError, match="documents of set 'later' are to be kept apart"):
        check_context_parallel(given, {"the training data": None, "set 'later'": Packed()})
    with pytest.raises(SettingsError, match="the training data are packed instructions"):
        check_context_parallel(
            settle_document_masks(tiny(context_parallel_size=2)), {"the training data": Packed()}
        )
    check_context_parallel(settle_document_masks(tiny()), {"the training data": Packed()})
