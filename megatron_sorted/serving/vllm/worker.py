"""vLLM's worker with our proposer in place of its own (``--worker-cls``)."""

from vllm.v1.worker.cpu_worker import CPUWorker

from megatron_sorted.serving.vllm.options import KEY, EngineOptions
from megatron_sorted.serving.vllm.proposer import NestedProposer
from megatron_sorted.serving.vllm.sorted import SortedProposer


class NestedWorker(CPUWorker):
    def init_device(self):
        super().init_device()
        options = EngineOptions.from_json(self.vllm_config.additional_config[KEY])
        if options.drafts:
            proposer = (
                SortedProposer if options.strategy == "sorted_speculative" else NestedProposer
            )
            self.model_runner.drafter = proposer(
                self.vllm_config, self.device, self.model_runner, options
            )
