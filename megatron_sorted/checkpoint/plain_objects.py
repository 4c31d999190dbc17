"""A safe reader of a checkpoint's objects: ``common.pt``, random state, arguments.

torch's reader of weights refuses every class that is not registered as safe. Here the few that
Megatron-LM and MindSpeed store beside weights are registered, most as stand-ins that hold values;
so neither Megatron nor NumPy has to be installed.
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


class StandIn:
    """A stand-in for a class that is not needed here; it keeps the arguments and the state."""

    def __new__(cls, *arguments, **_named):
        """Create the value and keep ``arguments``."""
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
    "CudaGraphModule",
    "InferenceCudaGraphScope",
    "Fp8Recipe",
    "Fp4Recipe",
)
"""Names of Megatron's enumerations, in any of the modules below."""

MODULES = (
    "megatron.core.enums",
    "megatron.core.transformer.enums",
    "megatron.model.enums",
    "megatron.legacy.model.enums",
    "megatron.core.models.common.embeddings.enums",
)
RECORDS = (
    *(f"{module}.{name}" for module in MODULES for name in ENUMS),
    *(
        f"megatron.core.rerun_state_machine.{name}"
        for name in ("RerunDiagnostic", "RerunMode", "RerunState")
    ),
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
    "signal.Signals",
    "torch._C.Generator",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "types.SimpleNamespace",
    "_io.BytesIO",
    *(
        f"{module}.{name}"
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
)
"""Names beside torch's own that a checkpoint may hold."""

STAND_INS = [
    (type(name.rpartition(".")[2], (StandIn,), {"__module__": __name__}), name) for name in RECORDS
]


@contextmanager
def _only_our_globals() -> Iterator[None]:
    """Make torch's reader accept the names above and no others within a context.

    Other code of the process may have registered more, as Megatron does on import.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([argparse.Namespace, *STAND_INS])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _check_archive(source: Path | io.BufferedIOBase) -> None:
    """Check that the records in a zip file of torch.save are uncompressed and fit its size.

    Raises:
        ValueError: A record is compressed, or the records have more bytes than the file: reading
            them could take any amount of memory.
    """
    if not zipfile.is_zipfile(source):
        return  # the format of torch before 1.6, or damaged, which torch's reader reports
    with zipfile.ZipFile(source) as archive:
        records, size = archive.infolist(), archive.fp.seek(0, io.SEEK_END)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, which torch.save never does")
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"its records have more bytes than the file ({size:,})")
    if not isinstance(source, Path):
        source.seek(0)


def load_plain(source: Path | io.BufferedIOBase, name: str, **options: Any) -> Any:
    """Load a file of torch.save, with ``StandIn`` records in place of Megatron's classes.

    Args:
        source: A path or an open file.
        name: Name of the source in errors.
        options: Further arguments of ``torch.load``.

    Raises:
        CheckpointError: The source cannot be read, or requests a class that is not on the list.
    """
    try:
        _check_archive(source)
        with _only_our_globals():
            try:
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(source)
            except ValueError:
                foreign = []  # the format of torch before 1.6; its reader refuses by name too
            if not isinstance(source, Path):
                source.seek(0)
            if foreign:
                raise CheckpointError(
                    f"{name}: refused: it asks for {shown(', '.join(sorted(foreign)))}. Only plain "
                    "values, argparse.Namespace and Megatron's enumerations are read, since any "
                    "other class may run a program. Load it once with the program that wrote it "
                    "and save it again without (in Megatron-LM: --no-save-optim --no-save-rng, "
                    "and no objects of your own in args)."
                )
            return torch.load(source, weights_only=True, **{"map_location": "cpu", **options})
    except FileNotFoundError:
        raise CheckpointError(f"{name}: is missing.") from None
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise CheckpointError(f"{name}: refused or damaged ({_first_line(reason)}).") from error
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise CheckpointError(
            f"{name}: not readable ({type(error).__name__}: {_first_line(str(error))}). "
            "It is damaged, or was not written by torch.save."
        ) from error


def _first_line(text: str) -> str:
    """Return the first line of a message, safe to print."""
    return shown((text.splitlines() or [""])[0])


def _object_bytes(directory: Path, name: str, piece: StoredPiece | None) -> io.BytesIO:
    """Read the bytes of an object that is not a tensor."""
    if piece is None:
        raise CheckpointError(f"{directory}: {name}: its metadata does not record its place.")
    try:
        with open(directory / piece.file, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            # a metadata that is damaged may ask for any number of bytes
            if size < piece.offset + piece.num_bytes:
                raise CheckpointError(
                    f"{directory}: {name}: {piece.file} ends after {size} bytes, "
                    f"{piece.offset + piece.num_bytes} are needed; it was cut off. Copy it again."
                )
            file.seek(piece.offset)
            content = file.read(piece.num_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: {name}: {piece.file} cannot be read ({error.strerror})."
        ) from error
    return io.BytesIO(content)


def check_checkpoint_is_safe(directory: str | Path) -> None:
    """Check that loading a ``torch_dist`` checkpoint with Megatron would run no foreign code.

    Megatron reads ``.metadata`` as a raw pickle, and torch's planner reads every object that is not
    a tensor (random state, extra state of layers) with ``weights_only=False``; so both are read
    here first, by readers that refuse. Megatron reads the tensors themselves and ``common.pt`` with
    ``weights_only``.

    Raises:
        CheckpointError: The checkpoint requests a class that is not on the lists, or cannot be
            read.
    """
    directory = Path(directory)
    for name, piece in read_stored_names(directory).objects.items():
        load_plain(_object_bytes(directory, name, piece), f"{directory}: {name}")
