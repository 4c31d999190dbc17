"""vLLM's worker with our proposer in the place of its own (``--worker-cls``)."""

from pathlib import Path

from vllm.platforms import current_platform

from megatron_sorted.errors import PlatformError
from megatron_sorted.serving.vllm.checks import INSTEAD, check_config, check_hooks, check_version
from megatron_sorted.serving.vllm.exits import Exits, read_exits_of
from megatron_sorted.serving.vllm.expansion import repair
from megatron_sorted.serving.vllm.options import KEY, EngineOptions, check_options
from megatron_sorted.serving.vllm.proposer import NestedProposer
from megatron_sorted.serving.vllm.sorted import SortedProposer

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
elif current_platform.is_cuda_alike():
    from vllm.v1.worker.gpu_worker import Worker
else:
    raise PlatformError(
        f"vLLM's platform {current_platform.device_name}: the plug-in runs on vLLM's own workers "
        f"for CPUs and GPUs. {INSTEAD}"
    )

UNTIED = "word_embeddings_untied_by_checkpoint"
PROPOSERS = {"self_speculative": NestedProposer, "sorted_speculative": SortedProposer}


class NestedWorker(Worker):
    """The platform's worker, whose runner lets exits of its own model draft."""

    def init_device(self) -> None:
        """Check everything that can be checked without weights, and replace the proposer.

        Raises:
            SortedError: This vLLM, its settings or the model do not fit the options.
        """
        options = EngineOptions.from_json(self.vllm_config.additional_config.get(KEY))
        exits = read_exits_of(Path(self.model_config.model))
        check_options(options, exits)
        check_version()
        check_config(self.vllm_config, options)
        keep_head(self.model_config, exits, options)
        if options.drafts:
            check_hooks()
        super().init_device()
        if options.drafts:
            if current_platform.is_cpu():
                repair()
            proposer = PROPOSERS[options.strategy]
            self.model_runner.drafter = proposer(
                self.vllm_config, self.device, self.model_runner, options, exits
            )


def keep_head(model, exits: Exits, options: EngineOptions) -> None:
    """Tie the head of a tied model again, which vLLM takes for one with a head of its own.

    vLLM (from 0.32 on, ``ModelConfig.maybe_untie_word_embeddings``) looks for names that end in
    ``lm_head.weight`` in every safetensors file of a directory, and finds those of exits. It would
    then compute logits with a matrix that is never loaded, without a word.

    Args:
        model: vLLM's configuration of the model; updated.
        exits: The exits.
        options: The options. At the depth of an exit with a head of its own nothing is tied.
    """
    own = options.strategy == "fixed" and exits.has_parts_at(options.depths[0])
    if exits.heads and not own and getattr(model, UNTIED, False) and not exits.has_full_head:
        setattr(model, UNTIED, False)
        for config in (model.hf_config, model.hf_config.get_text_config()):
            config.tie_word_embeddings = True
