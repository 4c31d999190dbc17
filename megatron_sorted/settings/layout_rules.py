"""Rules between the parallel layout, the number of processes, the batch and recomputation."""

from megatron_sorted.settings.derived import (
    data_parallel_size,
    global_batch_size,
    num_micro_batches,
)
from megatron_sorted.settings.field import AllSettings, flag_of
from megatron_sorted.settings.layout import layers_of_chunks, num_virtual_chunks
from megatron_sorted.settings.require import require, require_divides

PROCESSES = "Change the sizes or start another number of processes."
RECOMPUTABLE = ("core_attn", "layernorm", "mlp", "moe")
"""What megatron's TransformerConfig can recompute selectively in the networks these settings describe."""


def check_layout(settings: AllSettings, world_size: int) -> None:
    """Returns nothing if layers, sequence and processes divide as asked.

    Raises:
        SettingsError: they do not.
    """
    tp, pp, cp = (
        settings.tensor_model_parallel_size,
        settings.pipeline_model_parallel_size,
        settings.context_parallel_size,
    )
    require(
        world_size > 0, f"number of processes: {world_size} is not above 0. Start at least one."
    )
    require_divides(
        world_size,
        "number of processes",
        tp * pp * cp,
        "tensor x pipeline x context parallel size",
        PROCESSES,
    )
    require(
        tp > 1 or not settings.sequence_parallel,
        "--sequence-parallel: there is nothing to split over with --tensor-model-parallel-size 1. Drop one or raise the other.",
    )
    if cp > 1:
        reason = f"--context-parallel-size: {cp} needs Transformer Engine's attention; megatron's local attention sees only its own part"
        require(
            settings.transformer_impl != "local",
            f"{reason} (--transformer-impl local). Use transformer_engine, or 1.",
        )
        require(settings.device != "cpu", f"{reason} (--device cpu). Use an accelerator, or 1.")
        require_divides(
            settings.seq_length,
            "--seq-length",
            2 * cp,
            "2 x --context-parallel-size",
            "Each rank takes two slices; change one.",
        )
    if settings.sequence_parallel:
        require_divides(
            settings.seq_length, "--seq-length", tp * cp, "--tensor-model-parallel-size x --context-parallel-size",
            "With --sequence-parallel each rank holds an equal part; change one.",
        )  # fmt: skip


def check_batch(settings: AllSettings, world_size: int) -> None:
    """Returns nothing if the global batch divides into micro-batches over the data parallel ranks.

    Raises:
        SettingsError: it does not.
    """
    dp = data_parallel_size(settings, world_size)
    require_divides(
        global_batch_size(settings, world_size), "--global-batch-size", settings.micro_batch_size * dp,
        f"--micro-batch-size {settings.micro_batch_size} x data parallel size {dp}", "Change the batch or the number of processes.",
    )  # fmt: skip


def check_interleaving(settings: AllSettings, world_size: int) -> None:
    """Returns nothing if layers divide over stages and chunks and the interleaved schedule is one that computes rightly.

    Raises:
        SettingsError: they do not, or it is not.
    """
    pp, per_chunk = (
        settings.pipeline_model_parallel_size,
        settings.num_layers_per_virtual_pipeline_stage,
    )
    if settings.pipeline_model_parallel_layout is not None:
        for name in (
            "num_layers_per_virtual_pipeline_stage",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
        ):
            require(
                getattr(settings, name) is None,
                f"{flag_of(name)}: {getattr(settings, name)} beside --pipeline-model-parallel-layout, which says it all. Leave one out.",
            )
    if per_chunk is not None:
        require(
            pp > 1,
            f"--num-layers-per-virtual-pipeline-stage: {per_chunk} needs several stages (--pipeline-model-parallel-size 1). Leave it out.",
        )
        require(
            settings.decoder_first_pipeline_num_layers is None
            and settings.decoder_last_pipeline_num_layers is None,
            "--num-layers-per-virtual-pipeline-stage: chunks need stages of equal size. "
            "Leave out --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers.",
        )
        require_divides(
            settings.num_layers, "--num-layers", pp * per_chunk,
            "--pipeline-model-parallel-size x --num-layers-per-virtual-pipeline-stage", "Change one of them.",
        )  # fmt: skip
    layers_of_chunks(settings)  # raises where layers do not divide
    chunks = num_virtual_chunks(settings)
    if chunks == 1:
        return
    require(
        pp > 1,
        f"--pipeline-model-parallel-layout: {chunks} chunks need several stages (--pipeline-model-parallel-size 1). Use one.",
    )
    # found by comparing gradient norms: two messages between the same two ranks in one batch are matched in the wrong order
    require(
        pp > 2 or settings.overlap_p2p_communication,
        "--no-overlap-p2p-communication: with 2 stages and chunks megatron mixes up messages and gradients are silently wrong. "
        "Leave overlap on, use more stages, or drop --num-layers-per-virtual-pipeline-stage.",
    )
    count = num_micro_batches(settings, world_size)
    require_divides(
        count, "number of micro-batches", pp, "--pipeline-model-parallel-size, in the interleaved schedule",
        "Change --global-batch-size, --micro-batch-size or the number of processes.",
    )  # fmt: skip


def check_recompute(settings: AllSettings) -> None:
    """Returns nothing if what is to be recomputed exists in this network.

    Raises:
        SettingsError: it does not.
    """
    if settings.recompute_granularity == "full":
        smallest = min(layers_of_chunks(settings))
        require(
            settings.recompute_num_layers <= smallest,
            f"--recompute-num-layers: {settings.recompute_num_layers} is more than the {smallest} layers of a chunk. Lower it.",
        )
    if settings.recompute_granularity == "selective":
        require(
            bool(settings.recompute_modules),
            "--recompute-modules: empty with --recompute-granularity selective. Name some or use none.",
        )
        for module in settings.recompute_modules:
            require(
                module in RECOMPUTABLE,
                f"--recompute-modules: {module!r} cannot be recomputed in this network. Use some of {', '.join(RECOMPUTABLE)}.",
            )
        # Megatron's checkpoint function makes the bias that an MLP returns its own output; going backward through the MLP computed again,
        # which reads that bias, it enters itself without end
        require(
            "mlp" not in settings.recompute_modules or settings.disable_bias_linear,
            "--recompute-modules: mlp cannot be recomputed with biases. Use --disable-bias-linear, or --recompute-granularity full.",
        )
        require(
            "moe" not in settings.recompute_modules or settings.num_experts is not None,
            "--recompute-modules: moe without experts. Give --num-experts or leave it out.",
        )
