"""vLLM's worker with our proposer in the place of its own (``--worker-cls``)."""

from pathlib import Path

from vllm.platforms import current_platform

from megatron_sorted.errors import PlatformError
from megatron_sorted.serving.vllm.checks import INSTEAD, check_config, check_hooks, check_version
from megatron_sorted.serving.vllm.exits import read_exits_of
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
