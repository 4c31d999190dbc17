"""What an exit has of its own, read from exits.safetensors."""

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sorted.errors import CheckpointError
from megatron_sorted.reading.shown import shown
from megatron_sorted.serving.vllm.exits import Exits


def read_parts(exits: Exits, depth: int) -> dict[str, Tensor]:
    """Return the tensors of an exit by their names without ``exits.DEPTH.``; {} for none.

    Raises:
        CheckpointError: The file is damaged, or holds other parts than config.json declares.
    """
    if not exits.has_parts_at(depth):
        return {}
    declared = {
        "norm": exits.norms,
        "lm_head": exits.heads,
        "block": exits.block,
        "mlp": exits.mlp,
        "adapter": exits.adapter_rank,
    }
    prefix = f"exits.{depth}."
    try:
        with safe_open(str(exits.file), framework="pt") as stream:
            tensors = {
                name.removeprefix(prefix): stream.get_tensor(name)
                for name in stream.keys()  # noqa: SIM118 - it is no dict
                if name.startswith(prefix)
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{shown(exits.file)}: cannot be read ({error}). Copy the whole directory."
        ) from error
    present, wanted = (
        {name.split(".")[0] for name in tensors},
        {name for name, is_there in declared.items() if is_there},
    )
    if present != wanted:
        raise CheckpointError(
            f"{shown(exits.file)}: exit {depth} has {', '.join(sorted(present)) or 'no parts'}, "
            f"and config.json declares {', '.join(sorted(wanted))}. Export the model again."
        )
    return tensors
