"""Adapters in a run: the ranks a step uses, and the checkpoints a run can resume from."""

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.errors import CheckpointError
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.lora import MUST_AGREE, adapter_parameters, rank_at
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.step.build import Model, unwrap


def use_ranks(model: Model, settings: Settings, step: int) -> None:
    """Set the number of ranks that every adapter uses at ``step``; call it before the step."""
    if settings.lora_rank:
        for chunk in model.chunks:
            unwrap(chunk).adapter_ranks.count = rank_at(settings, step)


def check_same_adapters(candidate: Candidate, settings: Settings, weights_only: bool) -> None:
    """Check that the run has the checkpoint's adapters, or takes only the weights of one without.

    Raises:
        CheckpointError: The adapters differ; the message names how, and the remedy.
    """
    absent, saved = settings_as_dict(Settings()), candidate.manifest.get("settings", {})
    before, now = {**absent, **saved}, settings_as_dict(settings)
    if not before["lora_rank"] and (not now["lora_rank"] or weights_only):
        return
    different = [
        f"--{name.replace('_', '-')}: {value_text(before[name])} in the checkpoint, "
        f"{value_text(now[name])} in this run"
        for name in MUST_AGREE
        if before[name] != now[name] and (name == "lora_rank" or before["lora_rank"])
    ]
    if not different:
        return
    if before["lora_rank"]:
        remedy = (
            "Use the checkpoint's values; or merge its adapters into the weights first "
            "(megatron-sorted convert export) and start from what that writes with "
            "--pretrained-checkpoint."
        )
    else:
        remedy = (
            "Its optimizer has no state for adapters: start from its weights at step 0, with "
            "--pretrained-checkpoint (and another --save) or --finetune."
        )
    raise CheckpointError(
        f"{candidate.directory}: made with other adapters. {'; '.join(different)}. {remedy}"
    )


def value_text(value: object) -> str:
    """Return a setting's value as text; elements of a list are joined by commas.

    >>> value_text(["qkv", "proj"])
    'qkv,proj'
    """
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def adapter_lines(settings: Settings, num_parameters: int) -> list[str]:
    """Return a line about the adapters of a run for the console; none without adapters.

    Args:
        settings: The run.
        num_parameters: Number of parameters of the whole model without adapters.
    """
    if not settings.lora_rank:
        return []
    ranks = ""
    if settings.dylora:
        drawn = " or ".join(map(str, settings.dylora_ranks or (f"1..{settings.lora_rank}",)))
        last = " and trains the last of them" if settings.dylora_frozen else ""
        ranks = f"; each step uses the first {drawn} ranks{last}"
    count = adapter_parameters(settings)
    return [
        f"adapters of rank {settings.lora_rank} on {', '.join(settings.lora_targets)}: "
        f"{count:,} trained parameters, {100 * count / num_parameters:.2f} % of the frozen "
        f"network's{ranks}"
    ]
