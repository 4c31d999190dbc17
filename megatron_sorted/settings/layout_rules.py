"""Rules between the parallel layout, the number of processes, the batch and recomputation."""

from megatron_sorted.settings.derived import (
    data_parallel_size,
    global_batch_size,
    num_micro_batches,
)
from megatron_sorted.settings.field import AllSettings, flag_of
from megatron_sorted.settings.layout import layers_of_chunks, num_virtual_chunks
from megatron_sorted.settings.require import require, require_divides

CHANGE_SIZES = "Change the sizes or start another number of processes."
RECOMPUTABLE = ("core_attn", "layernorm", "mlp", "moe")
"""What Megatron-core can recompute selectively in the networks that these settings describe."""


def check_layout(settings: AllSettings, world_size: int) -> None:
    """Check that layers, sequence and processes divide as the layout needs.

    Raises:
        SettingsError: They do not.
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
        CHANGE_SIZES,
    )
    require(
        tp > 1 or not settings.sequence_parallel,
        "--sequence-parallel: with --tensor-model-parallel-size 1 there is one rank to split "
        "over. Leave it out or raise the size.",
    )
    if cp > 1:
        reason = (
            f"--context-parallel-size: {cp} needs Transformer Engine's attention; megatron's "
            "local attention sees only its own part"
        )
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
            settings.seq_length,
            "--seq-length",
            tp * cp,
            "--tensor-model-parallel-size x --context-parallel-size",
            "With --sequence-parallel each rank holds an equal part; change one.",
        )


def check_batch(settings: AllSettings, world_size: int) -> None:
    """Check that the global batch divides into micro-batches over the data parallel ranks.

    Raises:
        SettingsError: It does not.
    """
    dp = data_parallel_size(settings, world_size)
    require_divides(
        global_batch_size(settings, world_size),
        "--global-batch-size",
        settings.micro_batch_size * dp,
        f"--micro-batch-size {settings.micro_batch_size} x data parallel size {dp}",
        "Change the batch or the number of processes.",
    )


def check_interleaving(settings: AllSettings, world_size: int) -> None:
    """Check that layers divide over stages and chunks, and that the schedule computes correctly.

    Raises:
        SettingsError: They do not, or it does not.
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
                f"{flag_of(name)}: {getattr(settings, name)} together with "
                "--pipeline-model-parallel-layout, which defines all chunks. Leave one of them "
                "out.",
            )
    if per_chunk is not None:
        require(
            pp > 1,
            f"--num-layers-per-virtual-pipeline-stage: {per_chunk} needs several stages "
            "(--pipeline-model-parallel-size 1). Leave it out.",
        )
        require(
            settings.decoder_first_pipeline_num_layers is None
            and settings.decoder_last_pipeline_num_layers is None,
            "--num-layers-per-virtual-pipeline-stage: chunks need stages of equal size. Leave out "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers.",
        )
        require_divides(
            settings.num_layers,
            "--num-layers",
            pp * per_chunk,
            "--pipeline-model-parallel-size x --num-layers-per-virtual-pipeline-stage",
            "Change one of them.",
        )
    layers_of_chunks(settings)  # raises where layers do not divide
    chunks = num_virtual_chunks(settings)
    if chunks == 1:
        return
    require(
        pp > 1,
        f"--pipeline-model-parallel-layout: {chunks} chunks need several stages "
        "(--pipeline-model-parallel-size 1). Use one.",
    )
    # a comparison of gradient norms showed that two messages between the same two ranks in one
    # batch are matched in the wrong order
    require(
        pp > 2 or settings.overlap_p2p_communication,
        "--no-overlap-p2p-communication: with 2 stages and several chunks megatron mixes up "
        "messages, and gradients are silently wrong. Leave overlap on, use more stages, or drop "
        "--num-layers-per-virtual-pipeline-stage.",
    )
    count = num_micro_batches(settings, world_size)
    require_divides(
        count,
        "number of micro-batches",
        pp,
        "--pipeline-model-parallel-size, in the interleaved schedule",
        "Change --global-batch-size, --micro-batch-size or the number of processes.",
    )


def check_recompute(settings: AllSettings) -> None:
    """Check that what is to be recomputed exists in this network.

    Raises:
        SettingsError: It does not.
    """
    if settings.recompute_granularity == "full":
        smallest = min(layers_of_chunks(settings))
        require(
            settings.recompute_num_layers <= smallest,
            f"--recompute-num-layers: {settings.recompute_num_layers} is more than the {smallest} "
            "layers of a chunk. Lower it.",
        )
    if settings.recompute_granularity == "selective":
        require(
            bool(settings.recompute_modules),
            "--recompute-modules: empty with --recompute-granularity selective. Name some or use "
            "none.",
        )
        for module in settings.recompute_modules:
            require(
                module in RECOMPUTABLE,
                f"--recompute-modules: {module!r} cannot be recomputed in this network. Use some "
                f"of {', '.join(RECOMPUTABLE)}.",
            )
        # Megatron's checkpoint function returns the bias of an MLP as an output of its own. The
        # backward pass through the recomputed MLP, which reads that bias, then enters itself
        # without end.
        require(
            "mlp" not in settings.recompute_modules or settings.disable_bias_linear,
            "--recompute-modules: mlp cannot be recomputed with biases. Use "
            "--disable-bias-linear, or --recompute-granularity full.",
        )
        require(
            "moe" not in settings.recompute_modules or settings.num_experts is not None,
            "--recompute-modules: moe without experts. Give --num-experts or leave it out.",
        )
