"""Values that follow from the settings.

`data_blend` and `split_ranges` check what they read; all others suppose settings that
`check_settings` has passed.
"""

import re
from collections.abc import Iterable

from megatron_sorted.exits.coefficients import CoefficientRule
from megatron_sorted.exits.depths import by_depth, normalise_depths
from megatron_sorted.exits.selection import ExitSampling, select_exits
from megatron_sorted.settings.field import AllSettings
from megatron_sorted.settings.require import require

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
SMALLEST_SHARE = 1e-6
"""Smallest share of a source in a blend.

The position at which a blend continues is found by looking back over one sample of its rarest
source.
"""


def ffn_hidden_size(settings: AllSettings) -> int:
    """Return the width of the MLP.

    By default it is 4 x hidden size; with SwiGLU 8/3 x hidden size, rounded up to a multiple of 64.
    """
    if settings.ffn_hidden_size is not None:
        return settings.ffn_hidden_size
    return (
        -(-8 * settings.hidden_size // (3 * 64)) * 64
        if settings.swiglu
        else 4 * settings.hidden_size
    )


def kv_channels(settings: AllSettings) -> int:
    """Return the width of one attention head."""
    return (
        settings.hidden_size // settings.num_attention_heads
        if settings.kv_channels is None
        else settings.kv_channels
    )


def num_query_groups(settings: AllSettings) -> int:
    """Return the number of key/value heads."""
    if settings.group_query_attention and settings.num_query_groups is not None:
        return settings.num_query_groups
    return settings.num_attention_heads


def max_position_embeddings(settings: AllSettings) -> int:
    """Return the longest sequence the model can be used with."""
    return (
        settings.seq_length
        if settings.max_position_embeddings is None
        else settings.max_position_embeddings
    )


def padded_vocab_size(vocab_size: int, settings: AllSettings) -> int:
    """Return the number of rows of embedding and head.

    That is ``vocab_size`` rounded up so that every tensor parallel rank has an equal share.
    """
    multiple = settings.make_vocab_size_divisible_by * settings.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def data_parallel_size(settings: AllSettings, world_size: int) -> int:
    """Return the number of copies of the model, which read different samples."""
    return world_size // (
        settings.tensor_model_parallel_size
        * settings.pipeline_model_parallel_size
        * settings.context_parallel_size
    )


def samples_per_step(settings: AllSettings, data_size: int) -> int:
    """Return the number of samples of one step over ``data_size`` copies of the model."""
    return (
        settings.micro_batch_size * data_size
        if settings.global_batch_size is None
        else settings.global_batch_size
    )


def global_batch_size(settings: AllSettings, world_size: int) -> int:
    """Return the number of samples of one step over all processes."""
    return samples_per_step(settings, data_parallel_size(settings, world_size))


def num_micro_batches(settings: AllSettings, world_size: int) -> int:
    """Return the number of micro-batches that each process computes in one step."""
    return global_batch_size(settings, world_size) // (
        settings.micro_batch_size * data_parallel_size(settings, world_size)
    )


def exit_depths(settings: AllSettings) -> tuple[int, ...]:
    """Return the depths of all exits in increasing order; the last layer is always one.

    Raises:
        SettingsError: A depth of --exit-layer-nums is not a layer, or is listed twice.
    """
    return normalise_depths(settings.exit_layer_nums, settings.num_layers)


def exit_probabilities(settings: AllSettings) -> dict[int, float]:
    """Return {depth: probability of being drawn}; equal ones unless the settings give them."""
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
    """Return {depth: coefficient} of every exit at ``step``.

    With --tune-exit the last exit, which is frozen, counts 0; coefficients that are shares of one
    whole are then shares of the exits that are left.
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
    """Return {depth: coefficient} of the exits that train at ``step``.

    Every rank computes the same result without communication.
    """
    sampling = ExitSampling(
        settings.seed,
        settings.exit_sampling,
        settings.num_sampled_exits,
        exit_probabilities(settings),
    )
    return select_exits(step, step_coefficients(settings, rule, step), sampling, rule.normalised)


def last_exit_teaches(settings: AllSettings) -> bool:
    """Return whether the other exits learn from the last one, not from a separate model."""
    return settings.exit_kd_weight > 0 and settings.exit_kd_teacher is None


def taught_exits(settings: AllSettings, depths: Iterable[int]) -> list[int]:
    """Return those of ``depths`` whose exit has a teacher.

    The last exit has one only if the teacher is a separate model.
    """
    if settings.exit_kd_weight == 0:
        return []
    return [
        depth for depth in depths if depth != settings.num_layers or not last_exit_teaches(settings)
    ]


def deepest_layer_run(settings: AllSettings, depths: Iterable[int]) -> int:
    """Return how many layers are run at a step that trains the exits at ``depths``.

    With one stage that is the deepest of them. With several, stages above could only idle.
    Megatron's overlapped gradient reduction waits for the gradient of every layer, so there all
    layers are run; with --tune-exit for that of every exit's own parts. Where the last exit
    teaches, all layers are run.
    """
    if settings.pipeline_model_parallel_size > 1 or (
        last_exit_teaches(settings) and taught_exits(settings, depths)
    ):
        return settings.num_layers
    if settings.overlap_grad_reduce:
        return exit_depths(settings)[-2] if settings.tune_exit else settings.num_layers
    return max(depths)


def data_blend(settings: AllSettings) -> tuple[tuple[float, str], ...] | None:
    """Return (weight, prefix) of each source of ``--data-path``, or None if it is not a blend.

    Raises:
        SettingsError: Weights and prefixes do not alternate, a weight is not above 0 or too small,
            or a prefix is listed twice.
    """
    items = settings.data_path
    is_weight = [NUMBER.fullmatch(item) is not None for item in items]
    if not any(is_weight):
        return None
    shown = " ".join(items)
    require(
        is_weight == [position % 2 == 0 for position in range(len(items))] and len(items) % 2 == 0,
        f"--data-path: {shown!r} mixes prefixes with and without a weight, or has a weight "
        "without a prefix. Write WEIGHT PREFIX WEIGHT PREFIX ..., or prefixes alone (a file whose "
        "name is a number: ./NAME).",
    )
    blend = tuple(
        (float(weight), prefix) for weight, prefix in zip(items[::2], items[1::2], strict=True)
    )
    for weight, prefix in blend:
        require(
            0 < weight < float("inf"),
            f"--data-path: weight {weight:g} of {prefix} is not above 0. Give a positive one.",
        )
        share = weight / sum(other for other, _ in blend)
        require(
            share >= SMALLEST_SHARE,
            f"--data-path: weight {weight:g} of {prefix} is a share of {share:.2g}, less than one "
            "sample in a million. Give it more, or leave it out.",
        )
    names = [prefix for _, prefix in blend]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    require(
        duplicate is None,
        f"--data-path: {duplicate} is listed twice in the blend. Give it once, with the sum of "
        "its weights.",
    )
    return blend


def data_prefixes(settings: AllSettings) -> tuple[str, ...]:
    """Return the prefixes of ``--data-path`` without weights."""
    blend = data_blend(settings)
    return settings.data_path if blend is None else tuple(prefix for _, prefix in blend)


MASKS = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
"""Settings that define how documents of text share a sample."""


def document_masks(settings: AllSettings) -> dict[str, bool]:
    """Return how documents of text share a sample, with defaults resolved.

    The keys are the names of Megatron-LM's flags. The default was chosen by a measurement
    (docs/data.md). Attention across context parallel processes cannot separate documents.
    """
    separate = (
        settings.context_parallel_size == 1
        if settings.reset_attention_mask is None
        else settings.reset_attention_mask
    )
    others = {name: getattr(settings, name) for name in MASKS[1:]}
    return {
        "reset_attention_mask": separate,
        **{name: separate if value is None else value for name, value in others.items()},
    }


def split_ranges(
    settings: AllSettings,
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Return (begin, end) of training, validation and test data in files of ``--data-path``.

    Both are fractions of the file's documents. With ``--valid-data-path`` all of a file is trained
    on.

    Raises:
        SettingsError: ``--split`` is not one to three shares, the first positive and none negative,
            or it gives a share to a set that has data of its own.
    """
    try:
        shares = [float(word) for word in settings.split.split(",")]
    except ValueError:
        shares = []
    require(
        1 <= len(shares) <= 3
        and all(0 <= share < float("inf") for share in shares)
        and shares[0] > 0,
        f"--split: {settings.split!r} is not one to three shares, the first above 0 and the "
        "others not below. Write training,validation or training,validation,test such as 98,2 or "
        "969,30,1.",
    )
    training, validation, test = (*shares, 0.0, 0.0)[:3]
    for flag, given in (
        ("--valid-data-path", settings.valid_data_path),
        ("--test-data-path", settings.test_data_path),
    ):
        require(
            not (given and test),
            (
                f"--split: {settings.split!r} takes a test share from --data-path, which cannot "
                f"be combined with {flag}. Leave out the third share"
            )
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
