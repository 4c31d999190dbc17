"""A checkpoint as a Hugging Face directory, for programs that read those alone."""

import atexit
import shutil
import tempfile
from pathlib import Path

from megatron_sorted.conversion.directory_kind import kind_of
from megatron_sorted.conversion.exporting import export_model
from megatron_sorted.conversion.hugging_face.weight_files import check_has_weights
from megatron_sorted.conversion.open_model import open_model
from megatron_sorted.conversion.writing import WriteOptions
from megatron_sorted.errors import CheckpointError


def as_hugging_face_directory(path: Path) -> Path:
    """Return a Hugging Face directory of the model in ``path``.

    A checkpoint is exported to a temporary directory, which is removed when the process ends.

    Raises:
        CheckpointError: It is no model directory, or a checkpoint that no Hugging Face family
            computes.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such directory. Give a Hugging Face directory or one of checkpoints."
        )
    if kind_of(path) == "hugging_face":
        check_has_weights(path)
        return path
    model = open_model(path)
    folder = Path(tempfile.mkdtemp(prefix="megatron_sorted_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(f"exporting {model.directory} ({model.num_bytes / 1e6:,.1f} MB) to {folder}", flush=True)
    # The export is not verified: whatever reads the directory reads every number of it anyway.
    export_model(model, folder / path.resolve().name, WriteOptions(verify=False))
    return folder / path.resolve().name
