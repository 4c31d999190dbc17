"""The exits of the nested language model in this directory, with plain transformers: depth k says what the model says after k layers.

A part of megatron_sorted, Apache-2.0 licence; it stands alone and needs torch, safetensors and transformers. What intermediate exits own
(norms, heads, blocks, MLPs, adapters) lies in exits.safetensors beside config.json, which transformers does not look at. In three lines:

    from nested_exits import load_nested_exits     # this file copied next to yours
    model = load_nested_exits("path/to/directory")
    logits, tokens = model(input_ids, depth=8), model.generate(input_ids, depth=8, max_new_tokens=32)
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
"""Of config.json; no exported model has them."""


class ExitAdapter(nn.Module):
    """A low-rank addition to an exit's hidden state: h + up(down(h))."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down, self.up = (
            nn.Linear(hidden_size, rank, bias=False),
            nn.Linear(rank, hidden_size, bias=False),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden state with the addition."""
        return hidden + self.up(self.down(hidden))


class ExitMlp(nn.Module):
    """A normed MLP of an exit's own: h + mlp(norm(h))."""

    def __init__(self, norm: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden state with what the MLP adds."""
        return hidden + self.mlp(self.norm(hidden))


class ExitNorm(nn.Module):
    """What stands in the place of the norm where an exit has parts that look at one token at a time: they come first."""

    def __init__(self, parts: Iterable[nn.Module], norm: nn.Module):
        super().__init__()
        self.parts, self.norm = nn.ModuleList(parts), norm

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normed hidden state."""
        for part in self.parts:
            hidden = part(hidden)
        return self.norm(hidden)


class ExitBlock(nn.Module):
    """A layer of an exit's own, after its adapter where it has one; stands in the place of the next layer."""

    def __init__(self, layer: nn.Module, adapter: nn.Module | None = None):
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, hidden_states: Tensor, *args, **more) -> Tensor:
        """Return the hidden state after the layer, which gets what any layer of the model gets."""
        return self.layer(
            hidden_states if self.adapter is None else self.adapter(hidden_states), *args, **more
        )


@dataclass
class Exit:
    """What reads the hidden state after some layers: a block (or none), a norm (with an MLP or adapter before it), a head."""

    norm: nn.Module
    head: nn.Module
    block: nn.Module | None = None


class NestedExits(nn.Module):
    """A model of transformers and its exits.

    Attributes:
        base: The full model, an ordinary one.
        depths: Where there are exits, increasing; the last is the full model.
    """

    def __init__(self, base: nn.Module, exits: dict[int, Exit]):
        super().__init__()
        self.base, self.depths = base, tuple(sorted(exits))
        own = {
            str(depth): nn.ModuleList(
                part for part in (found.block, found.norm, found.head) if part is not None
            )
            for depth, found in exits.items()
            if depth != self.depths[-1]
        }
        self.own = nn.ModuleDict(own)
        self._exits, self._models = exits, {self.depths[-1]: base}

    def model_at(self, depth: int | None = None) -> nn.Module:
        """Return the sub-model of an exit as an ordinary transformers model that shares all parameters; the full one by default.

        Raises:
            ValueError: There is no exit at ``depth``.
        """
        depth = self.depths[-1] if depth is None else depth
        if depth not in self.depths:
            raise ValueError(
                f"depth {depth} is no exit of this model; its exits are {', '.join(map(str, self.depths))}"
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
        """Return the tokens and what the exit adds to them greedily, each read once (a block keeps keys and values like any layer).

        Args:
            input_ids: Prompts [batch, tokens].
            depth: Of the exit; the full model by default.
            max_new_tokens: At most so many.
            more: For transformers' own ``generate``: attention_mask, eos_token_id, pad_token_id, ...
        """
        config = greedy(self.base, max_new_tokens=max_new_tokens)
        # without a mask transformers takes the tokens that fill up for filling, wherever they stand
        more = {"attention_mask": torch.ones_like(input_ids), **more}
        return self.model_at(depth).generate(input_ids, generation_config=config, **more)


def load_nested_exits(
    directory: str | Path, dtype: torch.dtype | str = "auto", **more
) -> NestedExits:
    """Return the model of a directory with its exits; nothing in the directory is executed.

    Args:
        directory: With config.json, model*.safetensors and exits.safetensors.
        dtype: Kind of numbers; by default as stored.
        more: For transformers' ``from_pretrained``.

    Raises:
        ValueError: Tensors of exits are missing, unknown, or of another shape than config.json says.
    """
    from transformers import AutoModelForCausalLM

    config = _read_config(Path(directory))
    if named := [key for key in CODE_KEYS if config.get(key)]:
        raise ValueError(
            f"{directory}: config.json says {', '.join(named)}, which can make transformers fetch or run code; remove it"
        )
    base, found = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **more,
    )
    for kind in (
        "missing_keys",
        "mismatched_keys",
        "unexpected_keys",
    ):  # transformers fills what is missing with random numbers
        if found.get(kind):
            raise ValueError(
                f"{directory}: {kind.replace('_', ' ')}: {', '.join(sorted(map(str, found[kind]))[:3])}"
            )
    return NestedExits(base.eval(), read_exits(Path(directory), base, config)).requires_grad_(False)


def _read_config(directory: Path) -> dict:
    try:
        return dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (RecursionError, TypeError) as error:
        raise ValueError(
            f"{directory / 'config.json'}: not a JSON object of reasonable nesting"
        ) from error


def read_exits(directory: Path, base: nn.Module, config: dict | None = None) -> dict[int, Exit]:
    """Return {depth: exit} of a directory for the model that was loaded of it; of a model without exits its last layer alone.

    Args:
        directory: With exits.safetensors, where exits have parts of their own.
        base: The model.
        config: What config.json says; by default it is read.

    Raises:
        ValueError: config.json contradicts itself, or exits.safetensors does not hold what it says.
    """
    config = _read_config(directory) if config is None else config
    last = base.config.num_hidden_layers
    depths = tuple(config.get("exit_layer_indices") or (last,))
    if config.get("exit_block") and config.get("exit_mlp"):
        raise ValueError(
            f"{directory / 'config.json'}: says exit_block and exit_mlp; an exit has a block or an MLP of its own, never both"
        )
    modules = {depth: _new_modules(base, config, depth) for depth in depths if depth != last}
    own = {
        name: module.get_parameter(inner)
        for depth, made in modules.items()
        for kind, module in made.items()
        for inner, name in _names(depth, kind, module).items()
    }
    tensors = _read(directory / FILE, own) if own else {}
    weight = base.get_input_embeddings().weight
    exits = {last: Exit(base.model.norm, base.lm_head)}
    for depth, made in modules.items():
        for kind, module in made.items():
            state = {inner: tensors[name] for inner, name in _names(depth, kind, module).items()}
            module.load_state_dict(state, strict=True, assign=True)
            module.to(device=weight.device, dtype=weight.dtype).eval()
        exits[depth] = _assemble(base, made)
    return exits


def greedy(base: nn.Module, **more):
    """Return transformers' GenerationConfig of greedy decoding that ends texts where the model does; ``more`` goes into it.

    Of the model's own only the tokens are taken: its temperature and penalties would make it something else.
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


def shallow_model(base: nn.Module, depth: int, found: Exit) -> nn.Module:
    """Return an ordinary transformers model of the first ``depth`` layers (and the exit's block) that shares all parameters."""
    layers = [*base.model.layers[:depth], *([] if found.block is None else [found.block])]
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(layers)]
    config.tie_word_embeddings = found.head.weight is base.model.embed_tokens.weight
    with torch.device("meta"):
        model = type(base)(config)
    model.model.embed_tokens, model.model.rotary_emb = (
        base.model.embed_tokens,
        base.model.rotary_emb,
    )
    model.model.layers, model.model.norm, model.lm_head = (
        nn.ModuleList(layers),
        found.norm,
        found.head,
    )
    # that of its family may end texts at a token that means something else here
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.requires_grad_(False).eval()


def _new_modules(base: nn.Module, config: dict, depth: int) -> dict[str, nn.Module]:
    """Return {kind: module} of what the exit at ``depth`` owns, like the model's own modules and without numbers."""
    hidden, vocabulary, made = base.config.hidden_size, base.config.vocab_size, {}
    with torch.device("meta"):
        if config.get("exit_adapter_rank"):
            made["adapter"] = ExitAdapter(hidden, config["exit_adapter_rank"])
        if config.get("exit_block"):
            if len(set(getattr(base.config, "layer_types", None) or [""])) > 1:
                raise ValueError(
                    "layer_types: the layers are of several kinds, and config.json does not say of which an exit's block is"
                )
            made["block"] = type(base.model.layers[0])(
                base.config, depth
            )  # keeps its keys and values in the next layer's place
        if config.get("exit_mlp"):
            made["mlp"] = ExitMlp(_copy_norm(base), type(base.model.layers[0].mlp)(base.config))
        if config.get("own_exit_norms"):
            made["norm"] = _copy_norm(base)
        if not config.get("tie_exit_lm_head", True):
            made["lm_head"] = nn.Linear(hidden, vocabulary, bias=False)
    return made


def _copy_norm(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base.model.norm).to("meta")


def _names(depth: int, kind: str, module: nn.Module) -> dict[str, str]:
    """Return {name within the module: name in the file} of a module's parameters."""
    return {
        name: f"exits.{depth}.{kind}.{name.removeprefix('mlp.') if kind == 'mlp' else name}"
        for name, _ in module.named_parameters()
    }


def _assemble(base: nn.Module, made: dict[str, nn.Module]) -> Exit:
    norm, head = made.get("norm", base.model.norm), made.get("lm_head", base.lm_head)
    if "block" in made:
        own = ExitBlock(made["block"], made["adapter"]) if "adapter" in made else made["block"]
        return Exit(norm, head, own)
    before = [made[kind] for kind in ("adapter", "mlp") if kind in made]
    return Exit(ExitNorm(before, norm) if before else norm, head)


def _read(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, which must be those that are wanted."""
    try:
        with safe_open(str(path), framework="pt") as stream:
            found = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    for name, parameter in wanted.items():
        if name not in found:
            raise ValueError(f"{path}: {name} is missing")
        if found[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(found[name].shape)}, the model's own has {list(parameter.shape)}"
            )
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(
            f"{path}: {', '.join(unknown[:3])}: config.json says nothing of such a tensor"
        )
    return found
