"""Continuing a run: what may have changed since its checkpoint, what may not, and the line that says so."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sorted.checkpoint.candidates import Candidate, find_candidates
from megatron_sorted.checkpoint.manifest import check_same_shape, network_shape, with_new_parts
from megatron_sorted.conversion.network import is_hugging_face
from megatron_sorted.data.identity import describe_changes
from megatron_sorted.data.tokenizer import Tokenizer
from megatron_sorted.errors import CheckpointError
from megatron_sorted.files import same_path
from megatron_sorted.settings.derived import document_masks
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.adapters import check_same_adapters

# Settings whose change says nothing of training: where files lie, what is printed, how a run is watched.
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
        "device_peak_tflops",
        "distributed_timeout_minutes",
        "hang_timeout_minutes",
        "world_size",
        "planned_device",
    )
)
SILENT_PREFIXES = ("wandb_", "profile")
# What a version that did not have a setting did: checkpoints of 0.6.0 and before.
BEFORE = {"reset_attention_mask": False, "reset_position_ids": False, "eod_mask_loss": False}
# The optimizer's state is kept in a form that depends on these.
FORM_OF_STATE = ("optimizer", "bf16", "fp16", "use_distributed_optimizer", "tune_exit")


def changed_settings(saved: Mapping[str, Any], settings: Settings) -> list[str]:
    """Return every setting that changed since the checkpoint and bears on training, as "train-iters 100 -> 200"."""
    before = {**BEFORE, **saved}
    return [
        f"{name.replace('_', '-')} {_word(before.get(name))} -> {_word(value)}"
        for name, value in settings_as_dict(settings).items()
        if name not in SILENT and not name.startswith(SILENT_PREFIXES) and before.get(name) != value
    ]


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def settle_document_masks(settings: Settings) -> Settings:
    """Return the settings with --reset-attention-mask, --reset-position-ids and --eod-mask-loss decided where they were not given.

    A run that continues a checkpoint (of --load, or in --save the same command's), or evaluates one, goes on as it was trained;
    checkpoints of 0.6.0 and before were trained without them. All other runs take the defaults of ``settings.derived.document_masks``.

    Raises:
        CheckpointError: The checkpoint that --ckpt-step names is missing or unusable.
    """
    found = None
    if settings.load and not settings.finetune:
        found = _newest_to_continue(Path(settings.load), settings.ckpt_step)
    if (
        settings.save
        and not settings.skip_train
        and not (found and same_path(settings.load, settings.save))
    ):
        found = (
            _newest_to_continue(Path(settings.save)) or found
        )  # with which same_run.go_on_in_save will go on
    saved = {**BEFORE, **found.manifest["settings"]} if found else {}
    kept = {
        name: saved[name]
        for name in BEFORE
        if saved.get(name) is not None and getattr(settings, name) is None
    }
    settings = dataclasses.replace(settings, **kept)
    return dataclasses.replace(settings, **document_masks(settings))


def _newest_to_continue(root: Path, step: int | None = None) -> Candidate | None:
    if not root.is_dir() or is_hugging_face(root):
        return None
    usable = find_candidates(root, step).usable
    return usable[0] if usable and not usable[0].weights_only else None


def takes_weights_only(candidate: Candidate, settings: Settings) -> bool:
    """Return whether a run starts at step 0 with the checkpoint's weights: it was told to, or there is nothing else to take."""
    return settings.finetune or candidate.weights_only


def gives_new_parts(candidate: Candidate, settings: Settings) -> bool:
    """Return whether a run that takes weights only gives the exits parts that the checkpoint's have not."""
    manifest = candidate.manifest
    return (
        takes_weights_only(candidate, settings)
        and with_new_parts(manifest, settings)["shape"] != manifest["shape"]
    )


def _form(settings: Mapping[str, Any], name: str) -> Any:
    """Return a setting that the form of the optimizer's state depends on; fully sharded state has the distributed optimizer's form."""
    if name == "use_distributed_optimizer" and settings.get("data_parallel") == "fsdp":
        return True
    return settings.get(
        name, getattr(Settings, name)
    )  # the default where an older version did not know it


def check_can_continue(
    candidate: Candidate,
    settings: Settings,
    tokenizer: Tokenizer | None,
    data: Mapping[str, Any] | None,
) -> None:
    """Check that the run can go on from the checkpoint, or only takes its weights.

    Args:
        candidate: The checkpoint.
        settings: Of the run.
        tokenizer: Of its data, if there is one.
        data: Its data (``data.identity.data_identity``), or None where only another rank has looked at them.

    Raises:
        CheckpointError: Naming what changed, why that cannot be, and what can.
    """
    manifest, directory = candidate.manifest, candidate.directory
    described = (
        with_new_parts(manifest, settings) if takes_weights_only(candidate, settings) else manifest
    )
    check_same_shape(directory, described, settings, network_shape(settings, settings.vocab_size))
    check_same_adapters(candidate, settings, takes_weights_only(candidate, settings))
    saved_tokenizer = manifest.get("tokenizer")
    is_other = (
        tokenizer is not None
        and saved_tokenizer
        and tokenizer.hashes.isdisjoint(tokenizer_hashes(saved_tokenizer))
    )
    if is_other and not settings.allow_changed_data:
        raise CheckpointError(
            f"--tokenizer-model: {tokenizer.name} (sha256 {tokenizer.sha256[:12]}), but {directory} was made with "
            f"{saved_tokenizer['name']} (sha256 {saved_tokenizer['sha256'][:12]}), so its tokens mean other words. Use that one "
            f"({directory / 'tokenizer'} holds it), or give --allow-changed-data if the two are the same vocabulary."
        )
    if takes_weights_only(candidate, settings) or settings.skip_train:
        return
    if not settings.no_load_optim:
        for name in FORM_OF_STATE:
            saved, now = _form(manifest["settings"], name), _form(vars(settings), name)
            if saved != now:
                raise CheckpointError(
                    f"--{name.replace('_', '-')}: {saved} in {directory}, {now} in this run; the optimizer's state is kept in a form that "
                    "depends on it. Keep it, or continue without that state (--no-load-optim)."
                )
    changes = (
        []
        if settings.allow_changed_data or data is None
        else describe_changes(manifest["data"], data)
    )
    if changes:
        raise CheckpointError(
            f"{directory}: trained on other data than this run names: {'; '.join(changes)}. Sample {manifest['progress']['samples']} would "
            "not be the next one. Give the data back, continue with --allow-changed-data, or start at step 0 with --finetune."
        )


def tokenizer_hashes(said: Mapping[str, Any]) -> set[str]:
    """Return the hashes of the files that are the tokenizer a manifest names: one, or several forms of one."""
    return {
        said["sha256"],
        said.get("sentencepiece_sha256", said["sha256"]),
        *said.get("hashes", ()),
    }


def set_schedule(
    schedule, saved: Mapping[str, Any], saved_samples_a_step: int, samples_a_step: int
) -> None:
    """Put Megatron's learning-rate schedule where the checkpoint's was, counted in steps.

    Megatron counts samples, so that a changed batch size would move the run along its schedule. Steps are what --train-iters,
    --lr-warmup-iters and --lr-decay-iters count.
    """
    schedule.load_state_dict(
        {**saved, "num_steps": saved["num_steps"] // saved_samples_a_step * samples_a_step}
    )


def loaded_line(candidate: Candidate, settings: Settings, learning_rate: float) -> str:
    """Return the line that says where a run continues and what changed since."""
    manifest = candidate.manifest
    progress = manifest["progress"]
    line = (
        f"loaded {candidate.directory}: step {progress['step']}, {progress['samples']} samples consumed, "
        f"learning rate {learning_rate:.3e}"
    )
    changes = changed_settings(manifest["settings"], settings)
    if settings.allow_changed_data:
        changes.append("other data allowed")
    return line + (f"; changed: {'; '.join(changes)}" if changes else "; nothing changed")
