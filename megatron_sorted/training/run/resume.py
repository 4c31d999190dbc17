"""Resuming a run: which settings may have changed since its checkpoint, and which may not."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate, find_candidates
from megatron_sorted.checkpoint.manifest import check_same_shape, network_shape, with_new_parts
from megatron_sorted.conversion.directory_kind import is_hugging_face
from megatron_sorted.data.identity import describe_changes
from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import same_path
from megatron_sorted.settings.derived import document_masks
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.adapters import check_same_adapters, value_text
from megatron_sorted.training.run.averaging import check_has_averages, check_same_averaging

# Settings that do not affect training: where files are, what is printed, how a run is monitored.
SILENT = frozenset(
    (
        "save",
        "load",
        "data_path",
        "valid_data_path",
        "test_data_path",
        "tokenizer_model",
        "metrics_file",
        "tensorboard_dir",
        "finetune",
        "no_load_optim",
        "no_load_rng",
        "exit_on_missing_checkpoint",
        "skip_train",
        "ckpt_step",
        "allow_changed_data",
        "log_interval",
        "log_timers",
        "exit_interval",
        "exit_duration_in_mins",
        "exit_signal_handler",
        "eval_interval",
        "eval_iters",
        "full_validation",
        "save_interval",
        "async_save",
        "save_retain",
        "save_retain_interval",
        "save_failure",
        "verify_checkpoint",
        "num_draft_tokens",
        "pretrained_checkpoint",
        "use_checkpoint_args",
        "save_hf",
        "save_hf_weights",
        "evaluate_averaged",
        "device_peak_tflops",
        "distributed_timeout_minutes",
        "hang_timeout_minutes",
        "world_size",
        "planned_device",
    )
)
SILENT_PREFIXES = ("wandb_", "profile")
# Values of settings that 0.6.0 and older versions did not have.
OLD_VALUES = {"reset_attention_mask": False, "reset_position_ids": False, "eod_mask_loss": False}
# Settings on which the stored form of the optimizer's state depends.
FORM_OF_STATE = ("optimizer", "bf16", "fp16", "use_distributed_optimizer", "tune_exit")


def changed_settings(saved: Mapping[str, Any], settings: Settings) -> list[str]:
    """Return every setting that affects training and changed since the checkpoint.

    They are texts such as "train-iters 100 -> 200".
    """
    before = {**OLD_VALUES, **saved}
    return [
        f"{name.replace('_', '-')} {value_text(before.get(name))} -> {value_text(value)}"
        for name, value in settings_as_dict(settings).items()
        if name not in SILENT and not name.startswith(SILENT_PREFIXES) and before.get(name) != value
    ]


def settle_document_masks(settings: Settings) -> Settings:
    """Return the settings with --reset-attention-mask and its companions decided if not given.

    The others are --reset-position-ids and --eod-mask-loss. A run that resumes from a checkpoint
    (of --load, or in --save the same command's), or evaluates one, keeps the values it was trained
    with; checkpoints of 0.6.0 and before were trained without them. All other runs take the
    defaults of ``settings.derived.document_masks``.

    Raises:
        CheckpointError: The checkpoint that --ckpt-step names is missing or unusable.
    """
    resumed = None
    if settings.load and not settings.finetune:
        resumed = _newest_to_resume(Path(settings.load), settings.ckpt_step)
    in_place = resumed and same_path(settings.load, settings.save)
    if settings.save and not settings.skip_train and not in_place:
        # same_run.resume_in_save prefers a checkpoint in --save too
        resumed = _newest_to_resume(Path(settings.save)) or resumed
    saved = {**OLD_VALUES, **resumed.manifest["settings"]} if resumed else {}
    kept = {
        name: saved[name]
        for name in OLD_VALUES
        if saved.get(name) is not None and getattr(settings, name) is None
    }
    settings = dataclasses.replace(settings, **kept)
    return dataclasses.replace(settings, **document_masks(settings))


def _newest_to_resume(root: Path, step: int | None = None) -> Candidate | None:
    if not root.is_dir() or is_hugging_face(root):
        return None
    usable = find_candidates(root, step).usable
    return usable[0] if usable and not usable[0].weights_only else None


def takes_weights_only(candidate: Candidate, settings: Settings) -> bool:
    """Return whether a run starts at step 0 with the checkpoint's weights.

    It does with --finetune, and from a checkpoint that holds nothing else.
    """
    return settings.finetune or candidate.weights_only


def gives_new_parts(candidate: Candidate, settings: Settings) -> bool:
    """Return whether a run that takes weights only gives exits parts that the checkpoint lacks."""
    manifest = candidate.manifest
    return (
        takes_weights_only(candidate, settings)
        and with_new_parts(manifest, settings)["shape"] != manifest["shape"]
    )


def _form(settings: Mapping[str, Any], name: str) -> Any:
    """Return the value of a setting on which the form of the optimizer's state depends.

    Fully sharded state has the form of the distributed optimizer's.
    """
    if name == "use_distributed_optimizer" and settings.get("data_parallel") == "fsdp":
        return True
    # an older version may not have had the setting: it behaved like the default
    return settings.get(name, getattr(Settings, name))


def check_can_continue(
    candidate: Candidate,
    settings: Settings,
    tokenizer: Tokenizer | None,
    data: Mapping[str, Any] | None,
) -> None:
    """Check that the run can resume from the checkpoint, or take its weights alone.

    Args:
        candidate: The checkpoint.
        settings: The run.
        tokenizer: The tokenizer of the run's data, if there is one.
        data: The identity of the run's data (``data.identity.data_identity``), or None where only
            another rank has read them.

    Raises:
        CheckpointError: It cannot; the message names what changed, why that is refused, and the
            remedy.
    """
    manifest, directory = candidate.manifest, candidate.directory
    weights_only = takes_weights_only(candidate, settings)
    described = with_new_parts(manifest, settings) if weights_only else manifest
    shape = network_shape(settings, settings.vocab_size)
    check_same_shape(directory, described, settings, shape, weights_only)
    check_same_adapters(candidate, settings, weights_only)
    saved_tokenizer = manifest.get("tokenizer")
    is_other = (
        tokenizer is not None
        and saved_tokenizer
        and tokenizer.hashes.isdisjoint(tokenizer_hashes(saved_tokenizer))
    )
    if is_other and not settings.allow_changed_data:
        raise CheckpointError(
            f"--tokenizer-model: {tokenizer.name} (sha256 {tokenizer.sha256[:12]}), but "
            f"{directory} was made with {saved_tokenizer['name']} (sha256 "
            f"{saved_tokenizer['sha256'][:12]}), so its tokens mean other words. Use that one "
            f"({directory / 'tokenizer'} holds it), or give --allow-changed-data if the "
            "two are the same vocabulary."
        )
    check_has_averages(candidate, settings)
    if weights_only or settings.skip_train:
        return
    check_same_averaging(candidate, settings)
    if not settings.no_load_optim:
        for name in FORM_OF_STATE:
            saved, now = _form(manifest["settings"], name), _form(vars(settings), name)
            if saved != now:
                raise CheckpointError(
                    f"--{name.replace('_', '-')}: {saved} in {directory}, {now} in this run; the "
                    "optimizer's state is kept in a form that depends on it. Keep it, or continue "
                    "without that state (--no-load-optim)."
                )
    if settings.allow_changed_data or data is None:
        return
    if changes := describe_changes(manifest["data"], data):
        raise CheckpointError(
            f"{directory}: trained on other data than this run names: {'; '.join(changes)}. Sample "
            f"{manifest['progress']['samples']} would not be the next one. Give the data back, "
            "continue with --allow-changed-data, or start at step 0 with --finetune."
        )


def tokenizer_hashes(described: Mapping[str, Any]) -> set[str]:
    """Return the hashes of the files that are the tokenizer described in a manifest.

    There are several where the tokenizer has several forms.
    """
    return {
        described["sha256"],
        described.get("sentencepiece_sha256", described["sha256"]),
        *described.get("hashes", ()),
    }


def set_schedule(
    schedule, saved: Mapping[str, Any], saved_samples_a_step: int, samples_a_step: int
) -> None:
    """Set Megatron's learning-rate schedule to the checkpoint's, counted in steps.

    Megatron counts samples, so that a changed batch size would move the run along its schedule.
    --train-iters, --lr-warmup-iters and --lr-decay-iters count steps.
    """
    schedule.load_state_dict(
        {**saved, "num_steps": saved["num_steps"] // saved_samples_a_step * samples_a_step}
    )


def loaded_line(candidate: Candidate, settings: Settings, learning_rate: float) -> str:
    """Return the line that says where a run resumes and what changed since."""
    manifest = candidate.manifest
    progress = manifest["progress"]
    changes = changed_settings(manifest["settings"], settings)
    if settings.allow_changed_data:
        changes.append("other data allowed")
    return (
        f"loaded {candidate.directory}: step {progress['step']}, {progress['samples']} samples "
        f"consumed, learning rate {learning_rate:.3e}; "
        + (f"changed: {'; '.join(changes)}" if changes else "nothing changed")
    )
