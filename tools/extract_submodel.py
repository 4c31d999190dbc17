"""Cuts a sub-model out of a nested model: an ordinary Hugging Face directory of fewer layers.

    python tools/extract_submodel.py my-llama my-llama-8 --depth 8
    python tools/extract_submodel.py runs/llama submodels --all            submodels/depth_08, submodels/depth_16, ...

The model is a Hugging Face directory or a checkpoint. An exit's own norm and head are put in the last place, a block or MLP of its own
becomes one layer more; an exit with a low-rank adapter of its own is no ordinary model and is refused. Each directory gets a model
card (README.md); --evaluation takes the figures for it from an evaluation.json of tools/evaluate.py or of the training run.
"""

from megatron_sorted.command import run_main, start_command

if __name__ == "__main__":
    start_command()

import argparse
from collections.abc import Sequence
from pathlib import Path

from convert import close_bars, parse_size, progress_bars

from megatron_sorted.conversion.aside import check_destination
from megatron_sorted.conversion.convert import SHARD_BYTES, export_model
from megatron_sorted.conversion.families import DTYPES
from megatron_sorted.conversion.model_card import Quality, model_card, read_quality
from megatron_sorted.conversion.open_model import OpenModel, open_model
from megatron_sorted.conversion.submodel import cut_submodel
from megatron_sorted.settings.costs import sub_model_parameters
from megatron_sorted.settings.derived import exit_depths


def find_quality(model: OpenModel, evaluation: Path | None, name: str | None) -> Quality | None:
    """Returns the figures of a model: of the file that was given, else of the one that its training run left beside its checkpoints."""
    if evaluation is not None:
        return read_quality(evaluation, name)
    beside = model.directory.parent / "evaluation.json"
    return read_quality(beside) if model.manifest and beside.is_file() else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes one sub-model, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory or directory of checkpoints")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="directory to write; with --all, the folder of them all")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--depth", type=int, help="number of layers")
    which.add_argument("--all", action="store_true", help="every exit, the full model included")
    parser.add_argument("--ckpt-step", type=int, help="step of the checkpoint to take (default: the newest complete one)")
    parser.add_argument("--vocab-size", type=int, help="number of real tokens, for a Megatron-LM checkpoint that knows only the padded one")
    parser.add_argument("--dtype", choices=DTYPES, help="kind of numbers to write (default: as stored)")
    parser.add_argument("--max-shard-size", default=f"{SHARD_BYTES // 10**9}GB", help="size of one file at most (default 5GB)")
    parser.add_argument("--evaluation", type=Path, help="evaluation.json with the quality of every exit, for the model card")
    parser.add_argument("--evaluation-name", help="name of this model in that file, where it holds several")
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    parser.add_argument("--no-verify", action="store_true", help="do not compare what was written with what there was")
    values = parser.parse_args(arguments)
    model = open_model(values.model, values.ckpt_step, values.vocab_size)
    quality = find_quality(model, values.evaluation, values.evaluation_name)
    depths = exit_depths(model.settings) if values.all else (values.depth,)
    width = len(str(model.settings.num_layers))
    places = {depth: values.destination / f"depth_{depth:0{width}d}" if values.all else values.destination for depth in depths}
    parts = {depth: cut_submodel(model, depth) for depth in depths}
    for place in places.values():  # before the first is written
        check_destination(place, values.overwrite, 0, model.directory)
    step = model.manifest["progress"]["step"] if model.manifest and model.manifest["progress"]["step"] else None
    origin = (model.manifest.get("origin") or {}).get("name") or values.model.absolute().name
    for depth, place in places.items():
        settings = parts[depth].settings
        card = model_card(place.absolute().name, origin, model.settings, settings, quality, step,
                          model.open_tokenizer() is not None, depth)
        notes: list[str] = []
        comparison = export_model(
            model, place, values.dtype, parse_size(values.max_shard_size), values.overwrite, not values.no_verify,
            watch=progress_bars, part=parts[depth], more_files={"README.md": card}, notes=notes)
        parameters = sub_model_parameters(settings, model.settings.vocab_size)[settings.num_layers]
        state = "not verified"
        if comparison is not None:
            last = comparison.exits[-1]
            state = (f"verified: {len(comparison.tensors)} tensors equal, logits within {last.largest_difference:.2g} of "
                     f"{last.largest_logit:.3g}")
        for note in notes:
            print(note)
        print(f"wrote {place}: {settings.num_layers} layers, {parameters:,} parameters, {state}", flush=True)


if __name__ == "__main__":
    run_main(main, clean_up=close_bars)
