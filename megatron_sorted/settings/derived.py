"""Values that follow from the settings. All suppose settings that `check_settings` has passed."""

from collections.abc import Iterable

from megatron_sorted.errors import SettingsError
from megatron_sorted.exits.coefficients import CoefficientRule, make_coefficient_rule
from megatron_sorted.exits.depths import by_depth, normalise_depths
from megatron_sorted.exits.placement import ChunkLayers, chunk_layers
from megatron_sorted.exits.selection import select_exits
from megatron_sorted.settings.run import Settings


def ffn_hidden_size(settings: Settings) -> int:
    """Returns the width of the MLP: as given, else 4 x hidden size, with SwiGLU 8/3 x hidden size rounded up to a multiple of 64."""
    if settings.ffn_hidden_size is not None:
        return settings.ffn_hidden_size
    return -(-8 * settings.hidden_size // (3 * 64)) * 64 if settings.swiglu else 4 * settings.hidden_size


def kv_channels(settings: Settings) -> int:
    """Returns the width of one attention head."""
    return settings.hidden_size // settings.num_attention_heads if settings.kv_channels is None else settings.kv_channels


def num_query_groups(settings: Settings) -> int:
    """Returns the number of key/value heads."""
    if settings.group_query_attention and settings.num_query_groups is not None:
        return settings.num_query_groups
    return settings.num_attention_heads


def max_position_embeddings(settings: Settings) -> int:
    """Returns the longest sequence the model can be used with."""
    return settings.seq_length if settings.max_position_embeddings is None else settings.max_position_embeddings


def padded_vocab_size(vocab_size: int, settings: Settings) -> int:
    """Returns the number of rows of embedding and head: ``vocab_size`` rounded up so that every tensor parallel rank has equal shares."""
    multiple = settings.make_vocab_size_divisible_by * settings.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def data_parallel_size(settings: Settings, world_size: int) -> int:
    """Returns how many copies of the model read different samples."""
    return world_size // (settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size * settings.context_parallel_size)


def global_batch_size(settings: Settings, world_size: int) -> int:
    """Returns the samples of one step over all processes."""
    if settings.global_batch_size is not None:
        return settings.global_batch_size
    return settings.micro_batch_size * data_parallel_size(settings, world_size)


def num_micro_batches(settings: Settings, world_size: int) -> int:
    """Returns how many micro-batches each process computes in one step."""
    return global_batch_size(settings, world_size) // (settings.micro_batch_size * data_parallel_size(settings, world_size))


def num_virtual_chunks(settings: Settings) -> int:
    """Returns the number of chunks of every stage; 1 when the schedule is not interleaved."""
    if settings.num_layers_per_virtual_pipeline_stage is None:
        return 1
    return settings.num_layers // settings.pipeline_model_parallel_size // settings.num_layers_per_virtual_pipeline_stage


def layers_of_chunks(settings: Settings) -> list[ChunkLayers]:
    """Returns what every chunk of every stage holds, in the order in which a token passes them."""
    return chunk_layers(
        settings.num_layers,
        settings.pipeline_model_parallel_size,
        num_virtual_chunks(settings),
        settings.decoder_first_pipeline_num_layers,
        settings.decoder_last_pipeline_num_layers,
    )


def exit_depths(settings: Settings) -> tuple[int, ...]:
    """Returns the depths of all exits in increasing order; the last layer is always one."""
    return normalise_depths(settings.exit_layer_nums, settings.num_layers)


def coefficient_rule(settings: Settings) -> CoefficientRule:
    """Returns the rule that gives every exit its coefficient at a step."""
    return make_coefficient_rule(
        settings.exit_layer_nums,
        settings.num_layers,
        settings.exit_layer_weight_rule,
        settings.exit_layer_weight,
        settings.exit_layer_weight_init,
        settings.exit_layer_weight_warmup_iters,
        settings.exit_layer_weight_warmup_style,
    )


def exit_probabilities(settings: Settings) -> dict[int, float]:
    """Returns {depth: probability of being drawn}; equal ones unless the settings give them."""
    if settings.exit_sampling == "probabilities":
        return by_depth("--exit-probabilities", settings.exit_probabilities, settings.exit_layer_nums, settings.num_layers)
    depths = exit_depths(settings)
    return {depth: 1 / len(depths) for depth in depths}


def trained_exits(settings: Settings, rule: CoefficientRule, step: int) -> dict[int, float]:
    """Returns {depth: coefficient} of the exits that train at ``step``; the same on every rank without talking."""
    return select_exits(
        step,
        settings.seed,
        exit_depths(settings),
        rule.coefficients(step),
        settings.exit_sampling,
        settings.num_sampled_exits,
        exit_probabilities(settings),
        rule.normalised,
    )


def deepest_layer_run(settings: Settings, depths: Iterable[int]) -> int:
    """Returns the depth above which layers are not run at a step that trains the exits at ``depths``.

    With one stage that is the deepest of them. With several, stages above could only idle. Megatron's overlapped gradient
    reduction waits for the gradient of every layer, so there all layers are run.
    """
    if settings.pipeline_model_parallel_size > 1 or settings.overlap_grad_reduce:
        return settings.num_layers
    return max(depths)


def split_shares(settings: Settings) -> tuple[float, float]:
    """Returns the parts of ``--data-path`` for training and validation, which sum to 1.

    Raises:
        SettingsError: ``--split`` is not two positive numbers.
    """
    try:
        training, validation = (float(part) for part in settings.split.split(","))
    except ValueError:
        training = validation = 0.0
    if not (0 < training < float("inf") and 0 < validation < float("inf")):
        raise SettingsError(f"--split: {settings.split!r} is not two positive shares. Write training,validation such as 98,2.")
    return training / (training + validation), validation / (training + validation)
