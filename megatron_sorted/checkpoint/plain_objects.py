"""Objects of a checkpoint that are no tensors (``common.pt``, random state, arguments), read without running anything.

torch's reader of weights refuses every class it was not told of. It is told here of the few that Megatron-LM and MindSpeed put beside
weights; most are given as records that hold values, so neither Megatron nor NumPy has to be there.
"""

import argparse
import io
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_sorted.checkpoint.restricted_pickle import StoredPiece, read_stored_names
from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown


class Named:
    """A value whose class is not needed here: its name, what it was made from, and its state."""

    def __new__(cls, *arguments, **_named):
        """Return the value, made from ``arguments``."""
        value = super().__new__(cls)
        value.arguments = arguments
        value.state = None
        return value

    def __init__(self, *_arguments, **_named):
        pass

    def __setstate__(self, state):
        self.state = state

    def __repr__(self):
        return f"{type(self).__name__}{self.arguments}"


ENUMS = (
    "ModelType",
    "LayerType",
    "AttnType",
    "AttnMaskType",
    "PositionEmbeddingType",
    "AttnBackend",
    "CudaGraphScope",
    "Fp8Recipe",
)
"""Names of Megatron's enumerations, wherever its versions keep them."""
HOMES = (
    "megatron.core.enums",
    "megatron.core.transformer.enums",
    "megatron.model.enums",
    "megatron.legacy.model.enums",
    "megatron.core.models.common.embeddings.enums",
)
RECORDS = (
    *(f"{home}.{name}" for home in HOMES for name in ENUMS),
    *(
        f"megatron.core.rerun_state_machine.{name}"
        for name in ("RerunDiagnostic", "RerunMode", "RerunState")
    ),
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
    "signal.Signals",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "types.SimpleNamespace",
    "_io.BytesIO",
    *(
        f"{home}.{name}"
        for home in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
)
"""Names besides torch's own that may stand in a checkpoint."""
STAND_INS = [
    (type(name.rpartition(".")[2], (Named,), {"__module__": __name__}), name) for name in RECORDS
]


@contextmanager
def _only_ours() -> Iterator[None]:
    """Let torch's reader take the names above and no others, whatever the process has told it before (Megatron does, on import)."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([argparse.Namespace, *STAND_INS])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _check_archive(source: Path | io.BufferedIOBase) -> None:
    """Check that what torch.save wrote, a zip file of plain bytes, holds no more than its own size.

    Raises:
        ValueError: A record is compressed, or they have more bytes than the file: reading it would take any amount of memory.
    """
    if not zipfile.is_zipfile(source):
        return  # the format of torch before 1.6, or damaged: its reader says so
    with zipfile.ZipFile(source) as archive:
        records, size = archive.infolist(), archive.fp.seek(0, io.SEEK_END)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, which torch.save never does")
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"its records have more bytes than the file ({size:,})")
    if not isinstance(source, Path):
        source.seek(0)


def load_plain(source: Path | io.BufferedIOBase, told: str, **how: Any) -> Any:
    """Return what torch.save wrote, classes of Megatron as ``Named`` records.

    Args:
        source: A path or an open file.
        told: What errors call it.
        how: Further arguments of ``torch.load``.

    Raises:
        CheckpointError: It cannot be read, or asks for a class that is not on the list.
    """
    try:
        _check_archive(source)
        with _only_ours():
            try:
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(source)
            except ValueError:
                foreign = []  # the format of torch before 1.6; its reader refuses by name too
            if not isinstance(source, Path):
                source.seek(0)
            if foreign:
                raise CheckpointError(
                    f"{told}: refused: it asks for {shown(', '.join(sorted(foreign)))}. Only plain values, argparse.Namespace and "
                    "Megatron's enumerations are read, since any other class may run a program. Load it once with the program that "
                    "wrote it and save "
                    "it again without (in Megatron-LM: --no-save-optim --no-save-rng, and no objects of your own in args)."
                )
            return torch.load(
                source, map_location=how.pop("map_location", "cpu"), weights_only=True, **how
            )
    except FileNotFoundError:
        raise CheckpointError(f"{told}: is missing.") from None
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise CheckpointError(
            f"{told}: refused or damaged ({shown((reason.splitlines() or [''])[0])})."
        ) from error
    except Exception as error:  # a damaged file shows as anything from EOFError to RuntimeError
        raise CheckpointError(
            f"{told}: not readable ({type(error).__name__}: {shown((str(error).splitlines() or [''])[0])}). "
            "It is damaged, or was not written by torch.save."
        ) from error


def _object_bytes(directory: Path, name: str, piece: StoredPiece | None) -> io.BytesIO:
    if piece is None:
        raise CheckpointError(f"{directory}: {name}: its metadata does not say where it lies.")
    try:
        with open(directory / piece.file, "rb") as file:
            file.seek(piece.offset)
            content = file.read(piece.num_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: {name}: {piece.file} cannot be read ({error.strerror})."
        ) from error
    if len(content) < piece.num_bytes:
        raise CheckpointError(
            f"{directory}: {name}: {piece.file} ends after {piece.offset + len(content)} bytes, "
            f"{piece.offset + piece.num_bytes} are needed; it was cut off."
        )
    return io.BytesIO(content)


def check_checkpoint_is_safe(directory: str | Path) -> None:
    """Check that loading a ``torch_dist`` checkpoint with Megatron would run nothing of somebody else's.

    Megatron reads ``.metadata`` as a raw pickle, and torch's planner every object that is no tensor (random state, extra state of
    layers) with ``weights_only=False``; so both are read here first, with readers that refuse. The tensors themselves and
    ``common.pt`` Megatron reads with ``weights_only``.

    Raises:
        CheckpointError: It asks for something that is not on the lists, or cannot be read.
    """
    directory = Path(directory)
    for name, piece in read_stored_names(directory).objects.items():
        load_plain(_object_bytes(directory, name, piece), f"{directory}: {name}")
