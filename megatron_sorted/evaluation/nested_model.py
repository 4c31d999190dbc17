"""A model with transformers, its exits in one forward pass, and every sub-model as an ordinary transformers model."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_sorted.conversion.families import EXITS
from megatron_sorted.errors import CheckpointError
from megatron_sorted.evaluation.model_directory import ExitPlan, plan_exits


class NestedModel:
    """A causal language model of transformers and its exits.

    Attributes:
        name: What tables and pictures call it.
        model: The full model.
        depths: Its exits, increasing; the last is the full model.
        norms, heads: Of every exit; the model's own modules where they are shared.
    """

    def __init__(self, name: str, model: nn.Module, depths: Sequence[int], norms: dict[int, nn.Module] | None = None,
                 heads: dict[int, nn.Module] | None = None):
        self.name, self.model, self.depths = name, model, tuple(depths)
        self.norms = {depth: (norms or {}).get(depth, model.model.norm) for depth in depths}
        self.heads = {depth: (heads or {}).get(depth, model.lm_head) for depth in depths}
        self.model.requires_grad_(False).eval()

    @property
    def num_layers(self) -> int:
        """Returns the number of layers of the full model, which is the depth of the last exit."""
        return self.model.config.num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Returns the longest sequence that the model's config allows."""
        return self.model.config.max_position_embeddings

    def hidden_states(self, input_ids_bs: Tensor, attention_mask_bs: Tensor | None = None) -> dict[int, Tensor]:
        """Returns {depth: hidden_bsh} before the exit's norm, of one forward pass.

        Taken by hooks: the last of transformers' own ``hidden_states`` has already been through the final norm.
        """
        found: dict[int, Tensor] = {}

        def keep(depth: int):
            def hook(module, inputs, output):
                found[depth] = output[0] if isinstance(output, tuple) else output
            return hook

        hooks = [self.model.model.layers[depth - 1].register_forward_hook(keep(depth)) for depth in self.depths]
        try:
            self.model.model(input_ids=input_ids_bs, attention_mask=attention_mask_bs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def logits(self, depth: int, hidden_nh: Tensor) -> Tensor:
        """Returns logits_nv of an exit for any number of hidden states."""
        return self.heads[depth](self.norms[depth](hidden_nh))

    def sub_model(self, depth: int) -> nn.Module:
        """Returns an ordinary transformers model of the first ``depth`` layers that shares all parameters; it decodes greedily."""
        from transformers import GenerationConfig

        full = self.model
        config = copy.deepcopy(full.config)
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
        config.tie_word_embeddings = self.heads[depth].weight is full.model.embed_tokens.weight
        with torch.device("meta"):
            sub = type(full)(config)
        sub.model.embed_tokens, sub.model.rotary_emb = full.model.embed_tokens, full.model.rotary_emb
        sub.model.layers = nn.ModuleList(full.model.layers[:depth])
        sub.model.norm, sub.lm_head = self.norms[depth], self.heads[depth]
        own = full.generation_config  # of it only the tokens: temperature and penalties would make decoding something else than greedy
        sub.generation_config = GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id,
                                                 pad_token_id=own.pad_token_id)
        return sub.requires_grad_(False).eval()


def load_nested_model(directory: Path, depths: Sequence[int] | None = None, dtype: torch.dtype = torch.float32,
                      name: str | None = None) -> NestedModel:
    """Returns the model of a Hugging Face directory with its exits; nothing in the directory is executed.

    Raises:
        CheckpointError: Files are missing or damaged, or tensors are missing or have another shape than config.json says.
        SettingsError: A depth is no exit of the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    plan = plan_exits(directory, depths)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{directory}: transformers cannot load it: {reason}. Give an intact directory.") from error
    # transformers fills what is missing with random numbers and only warns
    for kind, what in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape than config.json says"),
                       ("unexpected_keys", "is not part of the model")):
        if found.get(kind):
            first = sorted(map(str, found[kind]))[0]
            raise CheckpointError(f"{directory}: tensor {first} {what} ({len(found[kind])} such). Give an intact directory.")
    norms, heads = _own_modules(directory, plan, model)
    return NestedModel(name or directory.resolve().name, model, plan.depths, norms, heads)


def copy_exit(module: nn.Module, weight: Tensor | None = None) -> nn.Module:
    """Returns a norm or head like ``module`` with a weight of its own: ``weight``, or a copy of the module's."""
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    own.weight = nn.Parameter((module.weight.detach().clone() if weight is None else weight).to(module.weight), requires_grad=False)
    return own


def _own_modules(directory: Path, plan: ExitPlan, model: nn.Module) -> tuple[dict[int, nn.Module], dict[int, nn.Module]]:
    norms: dict[int, nn.Module] = {}
    heads: dict[int, nn.Module] = {}
    if not plan.own_norms and not plan.own_heads:
        return norms, heads
    from safetensors import SafetensorError, safe_open

    path = directory / EXITS
    try:
        with safe_open(str(path), framework="pt") as stream:
            names = set(stream.keys())
            for depth in plan.depths[:-1]:
                for needed, kind, module, modules in ((plan.own_norms, "norm", model.model.norm, norms),
                                                      (plan.own_heads, "lm_head", model.lm_head, heads)):
                    tensor = f"exits.{depth}.{kind}.weight"
                    if not needed:
                        continue
                    if tensor not in names:
                        raise CheckpointError(f"{path}: {tensor} is missing. Export the model again.")
                    weight = stream.get_tensor(tensor)
                    if weight.shape != module.weight.shape:
                        raise CheckpointError(f"{path}: {tensor} has shape {list(weight.shape)}, the model's own has "
                                              f"{list(module.weight.shape)}. Export the model again.")
                    modules[depth] = copy_exit(module, weight)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Copy the whole directory again.") from error
    return norms, heads
