"""Values that follow from the settings. All suppose settings that `check_settings` has passed."""

import re
from collections.abc import Iterable

from megatron_sorted.exits.coefficients import CoefficientRule
from megatron_sorted.exits.depths import by_depth, normalise_depths
from megatron_sorted.exits.selection import ExitSampling, select_exits
from megatron_sorted.settings.field import AllSettings
from megatron_sorted.settings.require import require

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
SMALLEST_SHARE = 1e-6
"""Of a source in a blend: where to continue in a blend is found by looking back over one sample of its rarest source."""


def ffn_hidden_size(settings: AllSettings) -> int:
    """Returns the width of the MLP: as given, else 4 x hidden size, with SwiGLU 8/3 x hidden size rounded up to a multiple of 64."""
    if settings.ffn_hidden_size is not None:
        return settings.ffn_hidden_size
    return (
        -(-8 * settings.hidden_size // (3 * 64)) * 64
        if settings.swiglu
        else 4 * settings.hidden_size
    )


def kv_channels(settings: AllSettings) -> int:
    """Returns the width of one attention head."""
    return (
        settings.hidden_size // settings.num_attention_heads
        if settings.kv_channels is None
        else settings.kv_channels
    )


def num_query_groups(settings: AllSettings) -> int:
    """Returns the number of key/value heads."""
    if settings.group_query_attention and settings.num_query_groups is not None:
        return settings.num_query_groups
    return settings.num_attention_heads


def max_position_embeddings(settings: AllSettings) -> int:
    """Returns the longest sequence the model can be used with."""
    return (
        settings.seq_length
        if settings.max_position_embeddings is None
        else settings.max_position_embeddings
    )


def padded_vocab_size(vocab_size: int, settings: AllSettings) -> int:
    """Returns the number of rows of embedding and head: ``vocab_size`` rounded up so that every tensor parallel rank has equal shares."""
    multiple = settings.make_vocab_size_divisible_by * settings.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def data_parallel_size(settings: AllSettings, world_size: int) -> int:
    """Returns how many copies of the model read different samples."""
    return world_size // (
        settings.tensor_model_parallel_size
        * settings.pipeline_model_parallel_size
        * settings.context_parallel_size
    )


def samples_per_step(settings: AllSettings, data_size: int) -> int:
    """Returns the samples of one step over ``data_size`` copies of the model."""
    return (
        settings.micro_batch_size * data_size
        if settings.global_batch_size is None
        else settings.global_batch_size
    )


def global_batch_size(settings: AllSettings, world_size: int) -> int:
    """Returns the samples of one step over all processes."""
    return samples_per_step(settings, data_parallel_size(settings, world_size))


def num_micro_batches(settings: AllSettings, world_size: int) -> int:
    """Returns how many micro-batches each process computes in one step."""
    return global_batch_size(settings, world_size) // (
        settings.micro_batch_size * data_parallel_size(settings, world_size)
    )


def exit_depths(settings: AllSettings) -> tuple[int, ...]:
    """Returns the depths of all exits in increasing order; the last layer is always one."""
    return normalise_depths(settings.exit_layer_nums, settings.num_layers)


def exit_probabilities(settings: AllSettings) -> dict[int, float]:
    """Returns {depth: probability of being drawn}; equal ones unless the settings give them."""
    if settings.exit_sampling == "probabilities":
        return by_depth(
            "--exit-probabilities",
            settings.exit_probabilities,
            settings.exit_layer_nums,
            settings.num_layers,
        )
    depths = exit_depths(settings)
    return {depth: 1 / len(depths) for depth in depths}


def step_coefficients(settings: AllSettings, rule: CoefficientRule, step: int) -> dict[int, float]:
    """Returns {depth: coefficient} of every exit at ``step``; with --tune-exit the last exit, which is frozen, counts 0.

    Coefficients that are shares of one whole are then shares of the exits that are left.
    """
    coefficients = rule.coefficients(step)
    if not settings.tune_exit:
        return coefficients
    left = {
        depth: 0.0 if depth == settings.num_layers else value
        for depth, value in coefficients.items()
    }
    total = sum(left.values()) if rule.normalised else 1.0
    return {depth: value / total for depth, value in left.items()} if total else left


def trained_exits(settings: AllSettings, rule: CoefficientRule, step: int) -> dict[int, float]:
    """Returns {depth: coefficient} of the exits that train at ``step``; the same on every rank without talking."""
    sampling = ExitSampling(
        settings.seed,
        settings.exit_sampling,
        settings.num_sampled_exits,
        exit_probabilities(settings),
    )
    return select_exits(step, step_coefficients(settings, rule, step), sampling, rule.normalised)


def last_exit_teaches(settings: AllSettings) -> bool:
    """Returns whether the other exits learn from the last one, rather than all from a model of its own."""
    return settings.exit_kd_weight > 0 and settings.exit_kd_teacher is None


def taught_exits(settings: AllSettings, depths: Iterable[int]) -> list[int]:
    """Returns those of ``depths`` whose exit has a teacher: the last has one only if that is a model of its own."""
    if settings.exit_kd_weight == 0:
        return []
    return [
        depth for depth in depths if depth != settings.num_layers or not last_exit_teaches(settings)
    ]


def deepest_layer_run(settings: AllSettings, depths: Iterable[int]) -> int:
    """Returns the depth above which layers are not run at a step that trains the exits at ``depths``.

    With one stage that is the deepest of them. With several, stages above could only idle. Megatron's overlapped gradient
    reduction waits for the gradient of every layer, so there all layers are run; with --tune-exit for that of every exit's own parts.
    Where the last exit teaches, all layers are run.
    """
    if settings.pipeline_model_parallel_size > 1 or (
        last_exit_teaches(settings) and taught_exits(settings, depths)
    ):
        return settings.num_layers
    if settings.overlap_grad_reduce:
        return exit_depths(settings)[-2] if settings.tune_exit else settings.num_layers
    return max(depths)


def data_blend(settings: AllSettings) -> tuple[tuple[float, str], ...] | None:
    """Returns (weight, prefix) of each source where ``--data-path`` is a blend, or None where it lists prefixes alone.

    Raises:
        SettingsError: weights and prefixes do not alternate, or a weight or prefix cannot be.
    """
    words = settings.data_path
    weighs = [NUMBER.fullmatch(word) is not None for word in words]
    if not any(weighs):
        return None
    shown = " ".join(words)
    require(
        weighs == [place % 2 == 0 for place in range(len(words))] and len(words) % 2 == 0,
        f"--data-path: {shown!r} mixes prefixes with and without a weight, or has a weight without a prefix. Write WEIGHT PREFIX WEIGHT "
        "PREFIX ..., or prefixes alone (a file whose name is a number: ./NAME).",
    )
    blend = tuple(
        (float(weight), prefix) for weight, prefix in zip(words[::2], words[1::2], strict=True)
    )
    for weight, prefix in blend:
        require(
            0 < weight < float("inf"),
            f"--data-path: weight {weight:g} of {prefix} is not above 0. Give a positive one.",
        )
        share = weight / sum(other for other, _ in blend)
        require(
            share >= SMALLEST_SHARE,
            f"--data-path: weight {weight:g} of {prefix} is a share of {share:.2g}, less than one sample in a million. "
            "Give it more, or leave it out.",
        )
    names = [prefix for _, prefix in blend]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(
        twice is None,
        f"--data-path: {twice} stands twice in the blend. Give it once, with the sum of its weights.",
    )
    return blend


def data_prefixes(settings: AllSettings) -> tuple[str, ...]:
    """Returns the prefixes of ``--data-path`` without weights."""
    blend = data_blend(settings)
    return settings.data_path if blend is None else tuple(prefix for _, prefix in blend)


MASKS = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
"""Settings that say how documents of text share a sample."""


def document_masks(settings: AllSettings) -> dict[str, bool]:
    """Return how documents of text share a sample, by the names of Megatron-LM's flags, defaults resolved.

    The default was chosen by a measurement (docs/data.md). Attention across context parallel processes knows no documents.
    """
    apart = (
        settings.context_parallel_size == 1
        if settings.reset_attention_mask is None
        else settings.reset_attention_mask
    )
    others = {name: getattr(settings, name) for name in MASKS[1:]}
    return {
        "reset_attention_mask": apart,
        **{name: apart if value is None else value for name, value in others.items()},
    }


def split_ranges(
    settings: AllSettings,
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Returns which part of each file of ``--data-path`` is for training, validation and test: (begin, end) as fractions of its documents.

    With ``--valid-data-path`` all of it is trained on.

    Raises:
        SettingsError: ``--split`` is not one to three shares, the first positive and none negative, or it gives a share to what has data
            of its own.
    """
    try:
        shares = [float(word) for word in settings.split.split(",")]
    except ValueError:
        shares = []
    require(
        1 <= len(shares) <= 3
        and all(0 <= share < float("inf") for share in shares)
        and shares[0] > 0,
        f"--split: {settings.split!r} is not one to three shares, the first above 0 and the others not below. "
        "Write training,validation or training,validation,test such as 98,2 or 969,30,1.",
    )
    training, validation, test = (*shares, 0.0, 0.0)[:3]
    for flag, given in (
        ("--valid-data-path", settings.valid_data_path),
        ("--test-data-path", settings.test_data_path),
    ):
        require(
            not (given and test),
            f"--split: {settings.split!r} holds a test share back from --data-path, which is not done beside {flag}. "
            "Leave out the third share"
            + (
                ", or give --test-data-path for it."
                if flag == "--valid-data-path"
                else " or the flag."
            ),
        )
    if settings.valid_data_path:
        return (0.0, 1.0), (1.0, 1.0), (1.0, 1.0)
    total = training + validation + test
    first, second = training / total, (training + validation) / total
    return (0.0, first), (first, second), (second, 1.0)
