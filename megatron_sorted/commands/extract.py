"""``megatron-sorted extract``: an exit's own norm and head are put in the last place; its block or MLP becomes one layer more."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.parser import Parser
from megatron_sorted.conversion.hugging_face.families import DTYPES

DESCRIPTION = """\
Cut a sub-model out of a nested model: an ordinary Hugging Face directory of fewer layers, with a model
card. An exit with a low-rank adapter of its own is no ordinary model and is refused."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one sub-model, or all of them."""
    parser = Parser(
        "megatron-sorted extract",
        DESCRIPTION,
        "megatron-sorted extract runs/llama submodels --all",
        usage="%(prog)s MODEL DESTINATION (--depth N | --all) [options]",
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="Hugging Face directory or directory of checkpoints",
    )
    parser.add_argument(
        "destination",
        type=Path,
        metavar="DESTINATION",
        help="directory to write; with --all the folder of them all",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--depth", type=int, metavar="N", help="number of layers")
    which.add_argument(
        "--all",
        action="store_true",
        help="every exit, the full model included: DESTINATION/depth_08, ...",
    )
    parser.add_argument(
        "--ckpt-step",
        type=int,
        metavar="N",
        help="step of the checkpoint (default: the newest complete one)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="real tokens, for a Megatron-LM checkpoint that knows only the padded number",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, metavar="KIND", help=f"{', '.join(DTYPES)} (default: as stored)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file at most (%(default)s)"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="evaluation.json with every exit's quality, for the card",
    )
    parser.add_argument(
        "--evaluation-name",
        metavar="NAME",
        help="of this model in that file, where it holds several",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare what was written with what there was",
    )
    values = parser.parse_args(arguments)
    from megatron_sorted.conversion.exporting import export_model
    from megatron_sorted.conversion.hugging_face.model_card import Origin, model_card, read_quality
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.report import parse_size, progress_bars
    from megatron_sorted.conversion.staging import check_destination
    from megatron_sorted.conversion.submodel import cut_submodel
    from megatron_sorted.conversion.writing import Writing
    from megatron_sorted.settings.costs import sub_model_parameters
    from megatron_sorted.settings.derived import exit_depths

    model = open_model(values.model, values.ckpt_step, values.vocab_size)
    beside = (
        model.directory.parent / "evaluation.json"
    )  # what the training run left beside its checkpoints
    if values.evaluation is not None:
        quality = read_quality(values.evaluation, values.evaluation_name)
    else:
        quality = read_quality(beside) if model.manifest and beside.is_file() else None
    depths = exit_depths(model.settings) if values.all else (values.depth,)
    width = len(str(model.settings.num_layers))
    places = {
        depth: values.destination / f"depth_{depth:0{width}d}" if values.all else values.destination
        for depth in depths
    }
    parts = {depth: cut_submodel(model, depth) for depth in depths}
    for place in places.values():  # before the first is written
        check_destination(place, values.overwrite, 0, model.directory)
    step = (
        model.manifest["progress"]["step"]
        if model.manifest and model.manifest["progress"]["step"]
        else None
    )
    name = (model.manifest.get("origin") or {}).get("name") or values.model.absolute().name
    origin = Origin(name, model.settings, step)
    for depth, place in places.items():
        settings = parts[depth].settings
        card = model_card(
            place.absolute().name,
            origin,
            settings,
            quality,
            model.open_tokenizer() is not None,
            depth,
        )
        writing = Writing(values.overwrite, not values.no_verify, watch=progress_bars)
        written = export_model(
            parts[depth],
            place,
            writing,
            values.dtype,
            parse_size(values.max_shard_size),
            {"README.md": card},
        )
        parameters = sub_model_parameters(settings, model.settings.vocab_size)[settings.num_layers]
        state = "not verified"
        if (comparison := written.comparison) is not None:
            last = comparison.exits[-1]
            state = (
                f"verified: {len(comparison.tensors)} tensors equal, logits within {last.largest_difference:.2g} of "
                f"{last.largest_logit:.3g}"
            )
        for note in written.notes:
            print(note)
        print(
            f"wrote {place}: {settings.num_layers} layers, {parameters:,} parameters, {state}",
            flush=True,
        )
