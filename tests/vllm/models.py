"""Tiny nested models that vLLM can serve on a CPU, whose heads have 32 channels, and references."""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_sorted.conversion.hugging_face.nested_exits import NestedExits, load_nested_exits
from megatron_sorted.serving.vllm.options import EngineOptions
from tests.support.hugging_face import make_model

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
}
DEPTHS = (1, 2, 3, 4)
PARTS = {
    "norm": {"own_exit_norms": True},
    "lm_head": {"tie_exit_lm_head": False},
    "adapter": {"exit_adapter_rank": 8},
    "mlp": {"exit_mlp": True},
    "block": {"exit_block": True},
}


def write_model(
    folder: Path,
    family: str = "llama",
    own: Sequence[str] = (),
    max_shard_size: int | str = "1GB",
    **changes,
) -> Path:
    """Write a model with exits after each layer, whose early exits often agree with the last."""
    name, more = FAMILIES[family]
    model = make_model(name, **{**SIZES, **more, **changes})
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    keys = {"exit_layer_indices": DEPTHS, "own_exit_norms": False, "tie_exit_lm_head": True}
    for part in own:
        keys |= PARTS[part]
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    if own:
        save_file(_parts(model, own), folder / "exits.safetensors")
        names = model.state_dict().keys() - (
            {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        )
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
        )
    _write_tokenizer(folder)
    return folder


def _parts(model, own: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return tensors of every intermediate exit's own parts, near to what shared ones would be."""
    noise = torch.Generator().manual_seed(3)

    def near(weight: torch.Tensor, by: float = 0.05) -> torch.Tensor:
        return (weight + by * torch.randn(weight.shape, generator=noise)).contiguous()

    hidden, layer, tensors = SIZES["hidden_size"], model.model.layers[-1], {}
    for depth in DEPTHS[:-1]:
        parts = {
            "norm": {"weight": near(model.model.norm.weight)},
            "lm_head": {"weight": near(model.lm_head.weight)},
            "adapter": {
                "down.weight": near(torch.zeros(8, hidden), 0.2),
                "up.weight": near(torch.zeros(hidden, 8), 0.2),
            },
            "mlp": {
                "norm.weight": near(layer.post_attention_layernorm.weight),
                **{name: near(weight) for name, weight in layer.mlp.state_dict().items()},
            },
            "block": {name: near(weight) for name, weight in layer.state_dict().items()},
        }
        for part in own:
            for name, tensor in parts[part].items():
                tensors[f"exits.{depth}.{part}.{name}"] = tensor.detach().clone()
    return tensors


def extract_by_hand(directory: Path, target: Path, depth: int, own: Sequence[str]) -> Path:
    """Write the model of an exit as an ordinary directory, tensor by tensor.

    A block becomes one more layer; the exit's norm and head become the model's.
    """
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    exits = load_file(directory / "exits.safetensors") if own else {}
    layers = depth + ("block" in own)
    names = {"norm": "model.norm", "lm_head": "lm_head", "block": f"model.layers.{depth}"}
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < depth
    }
    for name, tensor in exits.items():
        _, exit_, part, inner = name.split(".", 3)
        if int(exit_) == depth:
            kept[f"{names[part]}.{inner}"] = tensor
    target.mkdir()
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    config |= {"num_hidden_layers": layers}
    if "lm_head" in own:
        config["tie_word_embeddings"] = False
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    (target / "config.json").write_text(json.dumps(config))
    _write_tokenizer(target)
    return target


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose token i is the word wi."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        )
    )


def prompts(count: int = 20, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """Return random prompts of several lengths."""
    chance = random.Random(seed)
    return [
        [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, longest))]
        for _ in range(count)
    ]


def expected_counts(
    directory: Path, prompt: list[int], text: list[int], options: EngineOptions, most: int
) -> tuple[int, int]:
    """Return how many tokens are drafted and accepted for a text, by transformers' logits.

    Every drafted token comes from a pass of an exit's model over the whole text so far: nothing is
    cached, and no layer knows of other exits.

    Args:
        directory: The model.
        prompt: The prompt.
        text: The full model's greedy text after it, longer than ``most`` by a whole draft.
        options: How exits draft.
        most: The number of tokens that were requested. The first one comes from the prompt's pass.
    """
    model, drafted, accepted, length = reference(directory), 0, 0, 1
    while length < most:
        draft = draft_by_hand(model, prompt + text[:length], options)
        same = 0
        while same < len(draft) and draft[same] == text[length + same]:
            same += 1
        drafted, accepted, length = drafted + len(draft), accepted + same, length + same + 1
    return drafted, accepted


@cache
def reference(directory: Path) -> NestedExits:
    """Return a model with its exits as transformers runs them."""
    return load_nested_exits(directory)


def draft_by_hand(model: NestedExits, known: list[int], options: EngineOptions) -> list[int]:
    """Return the tokens that exits draft after ``known``: S2D's rule, one token at a time."""
    draft: list[int] = []
    thresholds = options.thresholds or (-1.0,)
    while len(draft) < options.num_draft_tokens:
        for depth, threshold in zip(options.depths, thresholds, strict=True):
            with torch.inference_mode():
                probabilities = model(torch.tensor([known + draft]), depth)[0, -1].softmax(-1)
            first, second = probabilities.topk(2).values.tolist()
            sure = first - (second if options.measure == "margin" else 0) > threshold
            if sure:
                break
        draft.append(int(probabilities.argmax()))
        if not sure:
            break
    return draft
