"""How the work is spread over processes."""

from dataclasses import dataclass
from typing import Literal

from megatron_sorted.settings.field import setting

NPU_KERNELS = ("attention", "rms_norm", "rotary", "swiglu")


@dataclass(frozen=True)
class ParallelSettings:
    """Device and parallel layout, in Megatron-LM's words."""

    device: Literal["auto", "cpu", "cuda", "npu"] = setting("auto", "Where to run; 'auto' takes an accelerator if there is one.")
    distributed_backend: Literal["auto", "nccl", "hccl", "gloo"] = setting(
        "auto", "Communication library; 'auto' is nccl on cuda, hccl on npu and gloo on cpu.")
    npu_adaptor: Literal["none", "mindspeed"] = setting("none", "Whether MindSpeed patches Megatron for Ascend NPUs.")
    npu_adaptor_arguments: str = setting("", "MindSpeed's own flags, in one word: --npu-adaptor-arguments=\"--optimization-level 1\".")
    npu_kernels: tuple[str, ...] = setting(
        NPU_KERNELS, "Fused operations used on NPUs; for the others torch's own run.")
    npu_coalesced_collectives: bool = setting(
        True, "Hand the collectives of several buckets to HCCL as one; without it each is a call of its own, for CANNs that cannot.")
    distributed_timeout_minutes: int = setting(10, "Minutes after which a collective operation that does not end is an error.")
    hang_timeout_minutes: float | None = setting(
        None, "Minutes without progress after which the job is ended and the ranks that hang are named; by default "
        "--distributed-timeout-minutes.")
    tensor_model_parallel_size: int = setting(1, "Number of processes each layer's matrices are split over.")
    pipeline_model_parallel_size: int = setting(1, "Number of pipeline stages.")
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, "Layers of one chunk; a stage then holds several chunks (interleaved schedule).")
    decoder_first_pipeline_num_layers: int | None = setting(None, "Layers on the first stage, when it is not to hold an equal share.")
    decoder_last_pipeline_num_layers: int | None = setting(None, "Layers on the last stage, when it is not to hold an equal share.")
    pipeline_model_parallel_layout: str | None = setting(
        None, "Layers of every chunk in the order in which a token passes them, as in 'Et*3|t*5|t*5|t*4L' (t layer, E embedding, L loss, "
        "| next chunk, x*n and (...)*n repetition); more chunks than stages make the schedule interleaved.")
    overlap_p2p_communication: bool = setting(True, "Overlap messages between stages with computation in the interleaved schedule.")
    sequence_parallel: bool = setting(False, "Also split activations along the sequence over tensor parallel ranks.")
    context_parallel_size: int = setting(1, "Number of processes each sequence is split over (needs Transformer Engine).")
    expert_model_parallel_size: int = setting(1, "Number of processes the experts are split over.")
    data_parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "Whether every data parallel rank holds all weights ('ddp'), or each a part of weights, gradients and optimizer state "
        "('fsdp').")
    use_distributed_optimizer: bool = setting(False, "Split optimizer state over data parallel ranks.")
    overlap_grad_reduce: bool = setting(False, "Overlap gradient reduction with the backward pass.")
    overlap_param_gather: bool = setting(False, "Overlap parameter gathering with the forward pass (distributed optimizer).")
    recompute_granularity: Literal["none", "selective", "full"] = setting("none", "What is computed again in backward instead of kept.")
    recompute_method: Literal["uniform", "block"] = setting("uniform", "How full recompute groups layers.")
    recompute_num_layers: int = setting(1, "Layers in one group of full recompute.")
    recompute_modules: tuple[str, ...] = setting(("core_attn",), "What selective recompute computes again.")
