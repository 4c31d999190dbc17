"""``megatron-sorted extract``: a sub-model as an ordinary model.

An exit's own norm and head become the final ones; its own block or MLP becomes a further layer.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_sorted.commands.options.models import check_directories
from megatron_sorted.commands.parser import Parser
from megatron_sorted.conversion.hugging_face.families import DTYPES

DESCRIPTION = """\
Extract a sub-model from a nested model: an ordinary Hugging Face directory of fewer layers, with a
model card. Exits with a low-rank adapter of their own have no ordinary form and are refused."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one sub-model, or every one."""
    parser = Parser(
        "megatron-sorted extract",
        DESCRIPTION,
        "megatron-sorted extract runs/llama submodels --all",
        usage="%(prog)s MODEL DESTINATION (--depth N | --all) [options]",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face directory or checkpoints"
    )
    parser.add_argument(
        "destination",
        type=Path,
        metavar="DESTINATION",
        help="directory to write; with --all the folder for all of them",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--depth", type=int, metavar="N", help="number of layers of the sub-model")
    which.add_argument(
        "--all",
        action="store_true",
        help="write every exit and the full model: DESTINATION/depth_08, ...",
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
        help="vocabulary size without padding, if the checkpoint lacks it",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, metavar="KIND", help=f"{', '.join(DTYPES)} (default: as stored)"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of a file (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="evaluation.json with every exit's quality, for the model card",
    )
    parser.add_argument(
        "--evaluation-name",
        metavar="NAME",
        help="the model's name in that file, if it holds several",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the destination if it exists"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the result with the source"
    )
    values = parser.parse_args(arguments)
    check_directories(values.model)
    from megatron_sorted.conversion.exporting import export_model
    from megatron_sorted.conversion.hugging_face.model_card import Origin, model_card, read_quality
    from megatron_sorted.conversion.open_model import open_model
    from megatron_sorted.conversion.report import parse_size, progress_bars
    from megatron_sorted.conversion.staging import check_destination
    from megatron_sorted.conversion.submodel import cut_submodel
    from megatron_sorted.conversion.writing import WriteOptions
    from megatron_sorted.settings.costs import sub_model_parameters
    from megatron_sorted.settings.derived import exit_depths

    model = open_model(values.model, values.ckpt_step, values.vocab_size)
    beside = model.directory.parent / "evaluation.json"  # the training run's own
    if values.evaluation is not None:
        quality = read_quality(values.evaluation, values.evaluation_name)
    else:
        quality = read_quality(beside) if model.manifest and beside.is_file() else None
    depths = exit_depths(model.settings) if values.all else (values.depth,)
    width = len(str(model.settings.num_layers))
    directories = {
        depth: values.destination / f"depth_{depth:0{width}d}" if values.all else values.destination
        for depth in depths
    }
    submodels = {depth: cut_submodel(model, depth) for depth in depths}
    for directory in directories.values():  # before the first is written
        check_destination(directory, values.overwrite, 0, model.directory)
    step = (
        model.manifest["progress"]["step"]
        if model.manifest and model.manifest["progress"]["step"]
        else None
    )
    name = (model.manifest.get("origin") or {}).get("name") or values.model.absolute().name
    origin = Origin(name, model.settings, step)
    for depth, directory in directories.items():
        settings = submodels[depth].settings
        card = model_card(
            directory.absolute().name,
            origin,
            settings,
            quality,
            model.open_tokenizer() is not None,
            depth,
        )
        writing = WriteOptions(values.overwrite, not values.no_verify, watch=progress_bars)
        written = export_model(
            submodels[depth],
            directory,
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
                f"verified: {len(comparison.tensors)} tensors equal, largest difference of logits "
                f"{last.largest_difference:.2g} (largest logit {last.largest_logit:.3g})"
            )
        for note in written.notes:
            print(note)
        print(
            f"wrote {directory}: {settings.num_layers} layers, {parameters:,} parameters, {state}",
            flush=True,
        )
