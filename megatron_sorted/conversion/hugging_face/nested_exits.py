"""Exits of the nested language model in this directory, run with plain transformers.

The exit at depth k predicts after k layers. This module is a part of megatron_sorted (Apache-2.0)
that stands alone; it needs torch, safetensors and transformers. Norms, heads, blocks, MLPs and
adapters of intermediate exits lie in exits.safetensors beside config.json, which transformers
ignores. Copy this file next to yours and write:

    from nested_exits import load_nested_exits

    model = load_nested_exits("path/to/directory")
    logits = model(input_ids, depth=8)
    tokens = model.generate(input_ids, depth=8, max_new_tokens=32)
"""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FILE = "exits.safetensors"
CODE_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "auto_map",
    "quantization_config",
    "transformers_weights",
    "text_config",
)
"""Keys of config.json that may run or fetch code; no exported model has them."""


class ExitAdapter(nn.Module):
    """A low-rank addition to an exit's hidden state: h + up(down(h))."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down, self.up = (
            nn.Linear(hidden_size, rank, bias=False),
            nn.Linear(rank, hidden_size, bias=False),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden state [..., h] with the low-rank term added."""
        return hidden + self.up(self.down(hidden))


class ExitMlp(nn.Module):
    """An exit's own MLP with a norm before it: h + mlp(norm(h))."""

    def __init__(self, norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden state [..., h] with the MLP's output added."""
        return hidden + self.mlp(self.norm(hidden))


class ExitNorm(nn.Module):
    """An exit's norm with the parts before it that treat every token by itself."""

    def __init__(self, parts: Iterable[nn.Module], norm: nn.Module):
        super().__init__()
        self.parts, self.norm = nn.ModuleList(parts), norm

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normed hidden state [..., h]."""
        for part in self.parts:
            hidden = part(hidden)
        return self.norm(hidden)


class ExitBlock(nn.Module):
    """An exit's own layer, with the exit's adapter before it if any; it replaces the next layer."""

    def __init__(self, layer: nn.Module, adapter: nn.Module | None = None):
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, hidden_states: Tensor, *args, **more) -> Tensor:
        """Return the hidden state after the layer, which takes the arguments of any other layer."""
        return self.layer(
            hidden_states if self.adapter is None else self.adapter(hidden_states), *args, **more
        )


@dataclass
class NestedExit:
    """The modules that read the hidden state at an exit.

    Attributes:
        norm: The norm, with the exit's MLP or adapter before it.
        head: The output matrix.
        block: The exit's own layer before the norm, if any.
    """

    norm: nn.Module
    head: nn.Module
    block: nn.Module | None = None


class NestedExits(nn.Module):
    """A model of transformers and its exits.

    Attributes:
        base: The full model, an ordinary one.
        depths: The depths of the exits, increasing; the last is the full model.
    """

    def __init__(self, base: nn.Module, exits: dict[int, NestedExit]):
        super().__init__()
        self.base, self.depths = base, tuple(sorted(exits))
        own = {
            str(depth): nn.ModuleList(
                part for part in (one.block, one.norm, one.head) if part is not None
            )
            for depth, one in exits.items()
            if depth != self.depths[-1]
        }
        self.own = nn.ModuleDict(own)
        self._exits, self._models = exits, {self.depths[-1]: base}

    def model_at(self, depth: int | None = None) -> nn.Module:
        """Return the sub-model of an exit, a transformers model that shares all parameters.

        Args:
            depth: The depth of the exit; by default the full model's.

        Raises:
            ValueError: There is no exit at ``depth``.
        """
        depth = self.depths[-1] if depth is None else depth
        if depth not in self.depths:
            raise ValueError(
                f"depth {depth} is no exit of this model; its exits are "
                f"{', '.join(map(str, self.depths))}"
            )
        if depth not in self._models:
            self._models[depth] = shallow_model(self.base, depth, self._exits[depth])
        return self._models[depth]

    def forward(
        self, input_ids: Tensor, depth: int | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the logits [batch, tokens, vocabulary] of an exit; no layer above it runs."""
        return self.model_at(depth)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits

    @torch.inference_mode()
    def generate(
        self, input_ids: Tensor, depth: int | None = None, max_new_tokens: int = 32, **more
    ) -> Tensor:
        """Return the tokens with those that the exit adds to them greedily.

        Every token is processed once; a block has keys and values in the cache like any layer.

        Args:
            input_ids: Prompts [batch, tokens].
            depth: The depth of the exit; by default the full model's.
            max_new_tokens: Largest number of tokens to add.
            more: Arguments of transformers' ``generate``: attention_mask, eos_token_id, ...
        """
        config = greedy(self.base, max_new_tokens=max_new_tokens)
        # Without a mask transformers treats every token equal to pad_token_id as padding.
        more = {"attention_mask": torch.ones_like(input_ids), **more}
        return self.model_at(depth).generate(input_ids, generation_config=config, **more)


def load_nested_exits(
    directory: str | Path, dtype: torch.dtype | str = "auto", **more
) -> NestedExits:
    """Load the model of a directory with its exits; nothing in the directory is executed.

    Args:
        directory: A directory with config.json, model*.safetensors and exits.safetensors.
        dtype: Data type; by default as stored.
        more: Arguments of transformers' ``from_pretrained``.

    Raises:
        ValueError: Tensors of exits are missing, unknown, or of another shape than config.json
            says.
    """
    from transformers import AutoModelForCausalLM

    config = _read_config(Path(directory))
    if named := [key for key in CODE_KEYS if config.get(key)]:
        raise ValueError(
            f"{directory}: config.json has {', '.join(named)}, which can make transformers fetch "
            "or run code; remove it"
        )
    base, loading_info = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **more,
    )
    # transformers would fill missing tensors with random numbers.
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, loading_info.get(kind) or ())):
            raise ValueError(f"{directory}: {kind.replace('_', ' ')}: {', '.join(names[:3])}")
    return NestedExits(base.eval(), read_exits(Path(directory), base, config)).requires_grad_(False)


def _read_config(directory: Path) -> dict:
    try:
        return dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (RecursionError, TypeError) as error:
        raise ValueError(
            f"{directory / 'config.json'}: not a JSON object of reasonable nesting"
        ) from error


def read_exits(
    directory: Path, base: nn.Module, config: dict | None = None
) -> dict[int, NestedExit]:
    """Read the exits of a directory for the model loaded from it, {depth: exit}.

    A model that names no exits has its last layer alone.

    Args:
        directory: The directory, with exits.safetensors if exits have parts of their own.
        base: The model.
        config: The content of config.json; by default it is read.

    Raises:
        ValueError: config.json contradicts itself, or exits.safetensors does not match it.
    """
    config = _read_config(directory) if config is None else config
    last = base.config.num_hidden_layers
    depths = tuple(config.get("exit_layer_indices") or (last,))
    if config.get("exit_block") and config.get("exit_mlp"):
        raise ValueError(
            f"{directory / 'config.json'}: declares exit_block and exit_mlp; an exit has a block "
            "or an MLP of its own, never both"
        )
    modules = {depth: _new_modules(base, config, depth) for depth in depths if depth != last}
    own = {
        name: module.get_parameter(inner)
        for depth, parts in modules.items()
        for kind, module in parts.items()
        for inner, name in _names(depth, kind, module).items()
    }
    tensors = _read(directory / FILE, own) if own else {}
    weight = base.get_input_embeddings().weight
    exits = {last: NestedExit(base.model.norm, base.lm_head)}
    for depth, parts in modules.items():
        for kind, module in parts.items():
            state = {inner: tensors[name] for inner, name in _names(depth, kind, module).items()}
            module.load_state_dict(state, strict=True, assign=True)
            module.to(device=weight.device, dtype=weight.dtype).eval()
        exits[depth] = _assemble(base, parts)
    return exits


def greedy(base: nn.Module, **more):
    """Return transformers' GenerationConfig for greedy decoding, with ``more`` as further fields.

    Only special tokens are taken from the model's own: its temperature and penalties would make
    decoding other than greedy.
    """
    from transformers import GenerationConfig

    own = base.generation_config
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        **more,
    )


def shallow_model(base: nn.Module, depth: int, readout: NestedExit) -> nn.Module:
    """Return a model of the first layers and the exit's block that shares all parameters."""
    layers = [*base.model.layers[:depth], *([] if readout.block is None else [readout.block])]
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(layers)]
    config.tie_word_embeddings = readout.head.weight is base.model.embed_tokens.weight
    with torch.device("meta"):
        model = type(base)(config)
    model.model.embed_tokens, model.model.rotary_emb = (
        base.model.embed_tokens,
        base.model.rotary_emb,
    )
    model.model.layers, model.model.norm, model.lm_head = (
        nn.ModuleList(layers),
        readout.norm,
        readout.head,
    )
    # The family's default may end texts at a token that means something else here.
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.requires_grad_(False).eval()


def _new_modules(base: nn.Module, config: dict, depth: int) -> dict[str, nn.Module]:
    """Return {kind: module} of an exit's parts, shaped like the model's, on the meta device."""
    hidden, vocabulary, parts = base.config.hidden_size, base.config.vocab_size, {}
    with torch.device("meta"):
        if config.get("exit_adapter_rank"):
            parts["adapter"] = ExitAdapter(hidden, config["exit_adapter_rank"])
        if config.get("exit_block"):
            if len(set(getattr(base.config, "layer_types", None) or [""])) > 1:
                raise ValueError(
                    "layer_types: the layers are of several kinds, and config.json does not say "
                    "of which an exit's block is"
                )
            # Its keys and values take the next layer's place in the cache.
            parts["block"] = type(base.model.layers[0])(base.config, depth)
        if config.get("exit_mlp"):
            parts["mlp"] = ExitMlp(_copy_norm(base), type(base.model.layers[0].mlp)(base.config))
        if config.get("own_exit_norms"):
            parts["norm"] = _copy_norm(base)
        if not config.get("tie_exit_lm_head", True):
            parts["lm_head"] = nn.Linear(hidden, vocabulary, bias=False)
    return parts


def _copy_norm(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base.model.norm).to("meta")


def _names(depth: int, kind: str, module: nn.Module) -> dict[str, str]:
    """Return {name in the module: name in the file} of a module's parameters."""
    return {
        name: f"exits.{depth}.{kind}.{name.removeprefix('mlp.') if kind == 'mlp' else name}"
        for name, _ in module.named_parameters()
    }


def _assemble(base: nn.Module, parts: dict[str, nn.Module]) -> NestedExit:
    norm, head = parts.get("norm", base.model.norm), parts.get("lm_head", base.lm_head)
    if "block" in parts:
        own = ExitBlock(parts["block"], parts["adapter"]) if "adapter" in parts else parts["block"]
        return NestedExit(norm, head, own)
    before = [parts[kind] for kind in ("adapter", "mlp") if kind in parts]
    return NestedExit(ExitNorm(before, norm) if before else norm, head)


def _read(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a file and check that they are those of ``wanted``."""
    try:
        with safe_open(str(path), framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    for name, parameter in wanted.items():
        if name not in tensors:
            raise ValueError(f"{path}: {name} is missing")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, the model's own has "
                f"{list(parameter.shape)}"
            )
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"{path}: {', '.join(unknown[:3])}: config.json declares no such tensor")
    return tensors
