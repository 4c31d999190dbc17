"""What goes beside a model whose exits have parts that plain transformers does not look at: a module that runs them, and a card."""

from pathlib import Path

from megatron_sorted import __version__
from megatron_sorted.conversion.families import EXITS, family_of_settings
from megatron_sorted.settings.costs import forward_flops_per_token, sub_model_parameters
from megatron_sorted.settings.derived import exit_depths
from megatron_sorted.settings.run import Settings

MODULE = "nested_exits.py"


def part_names(settings: Settings) -> list[str]:
    """Returns what stands between an intermediate exit's hidden state and its norm, in words and in that order; empty if nothing does."""
    if len(exit_depths(settings)) == 1:
        return []
    return [what for has, what in ((settings.exit_adapter_rank, f"a low-rank adapter (rank {settings.exit_adapter_rank})"),
                                   (settings.use_exit_block, "a layer (block)"), (settings.use_exit_mlp, "a normed MLP")) if has]


def nested_files(name: str, settings: Settings) -> dict[str, str]:
    """Returns the texts that go beside a model, by name; none where its exits have no parts."""
    if not part_names(settings):
        return {}
    return {MODULE: Path(__file__).with_name(MODULE).read_text(encoding="utf-8"), "README.md": _card(name, settings)}


def use_of_exits(name: str, depth: int) -> list[str]:
    """Returns lines of a card that say how exits are run."""
    return [f"Exits run with `{MODULE}` of this directory, a small module of megatron_sorted (Apache-2.0) that needs torch, safetensors "
            "and transformers and is used by importing it; nothing here asks for `trust_remote_code`:", "",
            "```python", "import sys", f'sys.path.append("{name}")', "from nested_exits import load_nested_exits", "",
            f'model = load_nested_exits("{name}")', f"logits = model(input_ids, depth={depth})",
            f"tokens = model.generate(input_ids, depth={depth}, max_new_tokens=32)", "```"]


def _card(name: str, settings: Settings) -> str:
    depths, vocabulary, length = exit_depths(settings), settings.vocab_size, min(settings.seq_length, 2048)
    family, last = family_of_settings(settings), depths[-1]
    parameters, flops = sub_model_parameters(settings, vocabulary), forward_flops_per_token(settings, vocabulary, length)
    own = [*part_names(settings), *["a norm"] * settings.use_exit_norm, *["a head"] * settings.untie_exit_output_weights]
    shared = [what for is_own, what in ((settings.use_exit_norm, "norm"), (settings.untie_exit_output_weights, "head")) if not is_own]
    lines = [
        "---", "library_name: transformers", "tags: [nested, early-exit]", "---", "", f"# {name}", "",
        f"A nested `{family.architecture}` of {last} layers. Plain transformers loads it as the ordinary full model: "
        f'`AutoModelForCausalLM.from_pretrained("{name}")`. It also speaks after {", ".join(map(str, depths[:-1]))} layers. Each of these '
        f"exits has {', '.join(own)} of its own, in `{EXITS}`{', and shares ' + ' and '.join(shared) if shared else ''}.", "",
        f"| exit | parameters | share | FLOPs per token (forward, {length} tokens) | share |", "|---:|---:|---:|---:|---:|",
        *(f"| {depth} | {parameters[depth]:,} | {100 * parameters[depth] / parameters[last]:.0f} % | {flops[depth]:.3g} | "
          f"{100 * flops[depth] / flops[last]:.0f} % |" for depth in depths), "",
        "## Use of the exits", "", *use_of_exits(name, depths[0]), ""]
    if settings.exit_adapter_rank:
        lines += ["An exit with an adapter is no ordinary model, so it cannot be cut out as one."]
    else:
        lines += ["`tools/extract_submodel.py` of megatron_sorted cuts each exit out as an ordinary model that needs no such module."]
    return "\n".join([*lines, "", f"Written by megatron_sorted {__version__}.", ""])
