"""The averaged weights of a checkpoint, read as an ordinary model.

A checkpoint holds the average of each trained weight under the weight's name with a prefix; frozen
weights are their own average.
"""

from functools import partial

from megatron_sorted.conversion.megatron.torch_dist_files import TorchDistFiles
from megatron_sorted.conversion.tensors.source import Overlay
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.settings.exit_parts import is_trained
from megatron_sorted.settings.run import Settings


def averaged_tensors(last: TorchDistFiles, settings: Settings) -> Overlay:
    """Return the averaged weights of a checkpoint, in fp32, and its frozen weights as they are.

    Args:
        last: The checkpoint's weights of its last step.
        settings: The settings that it was saved with.

    Raises:
        CheckpointError: The average of a trained weight is missing or of another shape, or there is
            one of a weight that the checkpoint lacks.
    """
    averages = TorchDistFiles(last.directory, averaged=True)
    for name in sorted(last.tensors.keys() | averages.tensors.keys()):
        weight, average = last.tensors.get(name), averages.tensors.get(name)
        if average is None and not is_trained(name, settings):
            continue
        if weight is None or average is None or weight.shape != average.shape:
            has = "is missing" if average is None else f"has shape {list(average.shape)}"
            wanted = "it has no such weight" if weight is None else f"not {list(weight.shape)}"
            raise CheckpointError(
                f"{shown(last.directory)}: the average of {shown(name)} {has}"
                f"{'' if average is None else ', ' + wanted}. Its averaged weights are not "
                "complete; take another step of it with --ckpt-step, or its last weights."
            )
    return Overlay(
        last,
        {name: (info, partial(averages.read, name)) for name, info in averages.tensors.items()},
    )
