"""What is checked when vLLM starts, before any weights are loaded."""

import inspect

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from megatron_sorted.errors import PlatformError, SettingsError
from megatron_sorted.platform.supported import VLLM, VLLM_END, VLLM_TESTED, shown
from megatron_sorted.serving.vllm.installed import is_supported, is_tested
from megatron_sorted.serving.vllm.options import EngineOptions

HOOKS = {
    "propose": (
        *("num_speculative_tokens", "target_token_ids", "target_positions"),
        *("target_hidden_states", "next_token_ids", "token_indices_to_sample"),
        *("common_attn_metadata", "sampling_metadata", "mm_embed_inputs"),
        *("num_rejected_tokens_gpu", "slot_mappings"),
    ),
    "set_inputs_first_pass": (
        *("target_token_ids", "next_token_ids", "target_positions", "target_hidden_states"),
        *("token_indices_to_sample", "cad", "num_rejected_tokens_gpu"),
    ),
    "load_model": ("target_model",),
    "build_per_group_and_layer_attn_metadata": ("common_attn_metadata", "draft_index"),
}
"""{method of vLLM's proposer that is replaced or called: its parameters}."""
INSTEAD = (
    "Without the plug-in, extract an exit (megatron-sorted extract MODEL DIRECTORY --depth K) and "
    'let vLLM draft with it: --speculative-config \'{"method": "draft_model", "model": DIRECTORY, '
    '"num_speculative_tokens": 4}\'.'
)
SPLITS = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
UNKNOWN = ("parallel_drafting", "use_heterogeneous_vocab", "use_local_argmax_reduction")
"""Options of --speculative-config that are not for a model that drafts for itself."""


def check_version(version: str = vllm.__version__) -> None:
    """Check that this vLLM is supported; report a version that was not tested.

    Raises:
        PlatformError: It is older or newer than those that are supported.
    """
    if not is_supported(version):
        raise PlatformError(
            f"vLLM {version}: the plug-in supports {shown(VLLM)} and newer ones before "
            f"{shown(VLLM_END)}. Install vLLM {VLLM_TESTED[-1]}. {INSTEAD}"
        )
    if not is_tested(version):
        init_logger("vllm.megatron_sorted").warning(
            "vLLM %s: the plug-in was tested with %s.", version, " and ".join(VLLM_TESTED)
        )


def check_hooks(proposer: type = DraftModelProposer) -> None:
    """Check that the methods of vLLM's proposer take what the plug-in expects.

    Raises:
        PlatformError: One has other parameters.
    """
    for name, expected in HOOKS.items():
        method = getattr(proposer, name, None)
        parameters = tuple(inspect.signature(method).parameters) if method else ()
        if parameters != ("self", *expected):
            raise PlatformError(
                f"vLLM {vllm.__version__}: {proposer.__name__}.{name} takes "
                f"{', '.join(parameters) or 'nothing'}; the plug-in expects self, "
                f"{', '.join(expected)}. "
                f"Install vLLM {VLLM_TESTED[-1]}. {INSTEAD}"
            )


def check_config(config: VllmConfig, options: EngineOptions) -> None:
    """Check that vLLM's settings and the plug-in's fit.

    Raises:
        SettingsError: They do not.
    """
    if not options.drafts:
        return
    speculation, model = config.speculative_config, config.model_config
    kinds = {*(getattr(model.hf_text_config, "layer_types", None) or ())}
    split = _above_one(config.parallel_config, SPLITS)
    is_sorted = options.strategy == "sorted_speculative"
    for holds, message in (
        (
            speculation is not None
            and speculation.method == "draft_model"
            and speculation.model == model.model,
            f"strategy {options.strategy}: vLLM was started without the --speculative-config that "
            "it needs. Give all options that megatron-sorted serve --engine vllm prints.",
        ),
        (
            not split,
            f"--{split}: drafts need the first layers and every text's whole cache, which are not "
            "on the rank that drafts. Use 1, and tensor parallelism.",
        ),
        (
            not (changed := [name for name in UNKNOWN if getattr(speculation, name, False)]),
            f"--speculative-config: {', '.join(changed)} would change how vLLM drafts. Leave it "
            "out.",
        ),
        (
            not config.use_v2_model_runner,
            "VLLM_USE_V2_MODEL_RUNNER: the plug-in is not tested on vLLM's model runner V2. Set it "
            f"to 0. {INSTEAD}",
        ),
        (
            len(kinds) < 2,
            "layer_types of config.json: exits draft where all layers attend alike, and these are "
            f"{', '.join(sorted(kinds))}. {INSTEAD}",
        ),
        (
            config.lora_config is None,
            "--enable-lora: drafted tokens would take other texts' adapters. Leave it out, or "
            "merge the adapter into the model.",
        ),
        (
            not (is_sorted and config.scheduler_config.async_scheduling),
            "--async-scheduling: drafts of several lengths reach the scheduler after a step. Give "
            "--no-async-scheduling.",
        ),
        (
            not (is_sorted and getattr(speculation, "draft_sample_method", "") == "probabilistic"),
            "draft_sample_method probabilistic: sorted_speculative drafts the likeliest token. "
            "Leave it out.",
        ),
    ):
        if not holds:
            raise SettingsError(message)


def _above_one(parallel, names: tuple[str, ...]) -> str:
    """Return the first of these sizes that is above 1, as an option; an empty text for none."""
    for name in names:
        if (size := getattr(parallel, name, 1)) > 1:
            return f"{name.replace('_', '-')} {size}"
    return ""
