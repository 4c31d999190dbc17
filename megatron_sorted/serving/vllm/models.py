"""The four families served at the depth of an exit; the weights above it are not loaded."""

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from megatron_sorted.serving.vllm.exits import read_exits_of
from megatron_sorted.serving.vllm.options import KEY, EngineOptions, check_options
from megatron_sorted.serving.vllm.parts import read_parts
from megatron_sorted.serving.vllm.readout import NormAfterParts

LAYER = re.compile(r"model\.layers\.(\d+)\.")


class ModelOfExit:
    """What our classes add to vLLM's: the exit's parts instead of what lies above the exit.

    ``--hf-overrides`` has given config.json the number of layers of the exit's model.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        options = EngineOptions.from_json(vllm_config.additional_config.get(KEY))
        exits = read_exits_of(Path(vllm_config.model_config.model))
        check_options(options, exits)
        [self.depth] = options.depths
        self.parts = read_parts(exits, self.depth)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Return whether a tensor of the full model is left out.

        Files that hold no other tensors are not opened.
        """
        layer = LAYER.match(name)
        if layer:
            return int(layer[1]) >= self.depth
        return name in ("model.norm.weight", "lm_head.weight") and (
            name.removeprefix("model.") in self.parts
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the layers up to the exit, and the exit's own norm, head and block.

        An exit's MLP and adapter become a part of the norm.
        """
        kept = (one for one in weights if not self.is_unused_checkpoint_weight(one[0]))
        own = {
            re.sub(
                "^norm", "model.norm", re.sub("^block", f"model.layers.{self.depth}", name)
            ): tensor
            for name, tensor in self.parts.items()
            if name.startswith(("norm.", "lm_head.", "block."))
        }
        loaded = super().load_weights(chain(kept, own.items()))
        if len(own) < len(self.parts):
            self.model.norm = NormAfterParts(self.model.norm, self.parts)
            loaded |= {name for name, _ in self.model.norm.named_parameters("model.norm")}
        del self.parts
        return loaded


class NestedLlamaForCausalLM(ModelOfExit, LlamaForCausalLM):
    """Llama at the depth of an exit."""


class NestedMistralForCausalLM(ModelOfExit, MistralForCausalLM):
    """Mistral at the depth of an exit."""


class NestedQwen2ForCausalLM(ModelOfExit, Qwen2ForCausalLM):
    """Qwen2 at the depth of an exit."""


class NestedQwen3ForCausalLM(ModelOfExit, Qwen3ForCausalLM):
    """Qwen3 at the depth of an exit."""
