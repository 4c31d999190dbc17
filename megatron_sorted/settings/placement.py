"""How many layers each pipeline stage and model chunk holds, as Megatron-core splits them."""

import re
from collections.abc import Sequence

from megatron_sorted.errors import SettingsError


def stage_layers(
    num_layers: int,
    num_stages: int,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
) -> list[int]:
    """Return the number of layers on each stage.

    Stages without a number of their own share the rest equally.

    >>> stage_layers(10, 4, first_stage_layers=2, last_stage_layers=2)
    [2, 3, 3, 2]

    Raises:
        SettingsError: The layers do not divide.
    """
    fixed = {
        stage: layers
        for stage, layers in ((0, first_stage_layers), (num_stages - 1, last_stage_layers))
        if layers is not None
    }
    if fixed and num_stages == 1:
        raise SettingsError(
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers: "
            "there is only one stage. "
            "Leave them out or raise --pipeline-model-parallel-size."
        )
    rest, free = num_layers - sum(fixed.values()), num_stages - len(fixed)
    if (
        any(layers < 1 for layers in fixed.values())
        or (rest < free if free else rest != 0)
        or (free and rest % free)
    ):
        raise SettingsError(
            f"--num-layers: {num_layers} layers do not divide over {num_stages} stages "
            "(--pipeline-model-parallel-size, first stage "
            f"{'equal share' if first_stage_layers is None else first_stage_layers}, last stage "
            f"{'equal share' if last_stage_layers is None else last_stage_layers}): "
            f"{rest} layers are left for {free} stages. "
            "Change the number of layers, of stages, or --decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers."
        )
    return [fixed.get(stage, rest // free if free else 0) for stage in range(num_stages)]


def split_layers(
    num_layers: int,
    num_stages: int,
    num_chunks: int = 1,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
) -> list[int]:
    """Return the number of layers of every model chunk, in the order in which a token passes them.

    With several chunks a stage, a token visits chunk 0 of every stage, then chunk 1 of every stage,
    and so on.

    Raises:
        SettingsError: The layers do not divide over stages and chunks.
    """
    per_stage = stage_layers(num_layers, num_stages, first_stage_layers, last_stage_layers)
    for stage, layers in enumerate(per_stage):
        if layers % num_chunks:
            raise SettingsError(
                f"--num-layers: {layers} layers on stage {stage} do not divide into {num_chunks} "
                "chunks. Change --num-layers, --pipeline-model-parallel-size or "
                "--num-layers-per-virtual-pipeline-stage."
            )
    return [layers // num_chunks for _ in range(num_chunks) for layers in per_stage]


def layers_of_layout(text: str) -> list[int]:
    """Return the number of layers of every model chunk, in the order in which a token passes them.

    >>> layers_of_layout("Et*3|(tt)*2|tL")
    [3, 4, 1]

    Args:
        text: A layout in Megatron-LM's notation: ``t`` a layer, ``E`` the embedding, ``L`` the
            loss, ``|`` between chunks, ``x*n`` and ``(...)*n`` repetition.

    Raises:
        SettingsError: The layout holds another element, embedding and loss do not stand at its
            ends, or a chunk has no layer.
    """
    expanded = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([EtL|])\*(\d+)"):
        expanded = re.sub(pattern, lambda match: match[1] * int(match[2]), expanded)
    chunks = expanded.split("|")
    if not re.fullmatch(r"E[t|]*L", expanded) or not all("t" in chunk for chunk in chunks):
        raise SettingsError(
            f"--pipeline-model-parallel-layout: {text!r} is not chunks of layers from the "
            "embedding to the loss. Write E, then t for every layer and | between chunks, none of "
            "them without a layer, then L: such as 'Et*3|t*5|t*5|t*4L'."
        )
    return [chunk.count("t") for chunk in chunks]


def check_chunks(layers: Sequence[int], num_layers: int, num_stages: int) -> None:
    """Check that chunks with these numbers of layers fit the model and its pipeline stages.

    Raises:
        SettingsError: They do not hold ``num_layers`` layers, or stages would hold different
            numbers of chunks.
    """
    if sum(layers) != num_layers or len(layers) % num_stages:
        raise SettingsError(
            f"--pipeline-model-parallel-layout: {len(layers)} chunks with {sum(layers)} layers, "
            f"but --num-layers is {num_layers} and the chunks must be a multiple of {num_stages} "
            "(--pipeline-model-parallel-size). Change one of them."
        )
