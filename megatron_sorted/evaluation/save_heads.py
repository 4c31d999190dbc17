"""A model with the exits' own norms and heads as a nested Hugging Face directory."""

import shutil
from pathlib import Path

from megatron_sorted.conversion.aside import written_aside
from megatron_sorted.conversion.convert import write_config
from megatron_sorted.conversion.exit_keys import keys_of_exits, without_exits
from megatron_sorted.conversion.families import EXITS, read_config
from megatron_sorted.evaluation.nested_model import NestedModel

KEPT = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a directory that belong to the model; others (pickles above all) stay where they are."""


def save_with_heads(model: NestedModel, source: Path, destination: Path, overwrite: bool = False) -> None:
    """Writes the directory of ``source`` with the exits' norms and heads beside it, whole or not at all.

    Raises:
        CheckpointError: The destination exists or cannot be written.
    """
    from safetensors.torch import save_file

    files = sorted({path for pattern in KEPT for path in source.glob(pattern)})
    tensors = {f"exits.{depth}.{part}.weight": modules[depth].weight.detach().contiguous()
               for depth in model.depths[:-1] for part, modules in (("norm", model.norms), ("lm_head", model.heads))}
    num_bytes = sum(path.stat().st_size for path in files) + sum(tensor.nbytes for tensor in tensors.values())
    with written_aside(destination, overwrite, num_bytes, source) as aside:
        for path in files:
            shutil.copyfile(path, aside / path.name)
        write_config(aside, {**without_exits(read_config(source)), **keys_of_exits(model.depths, own_norms=True, own_heads=True)})
        save_file(tensors, str(aside / EXITS), metadata={"format": "pt"})
