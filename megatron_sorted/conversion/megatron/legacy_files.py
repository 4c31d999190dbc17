"""Weights of a legacy checkpoint (``mp_rank_*/model_optim_rng.pt``), read one tensor at a time.

Megatron-LM, MindSpeed and EE-LLM write them. Tensor parallel shards are joined, layers numbered
across stages, and a tied head's copy on the last stage left out after a comparison with the
embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sorted.conversion.megatron.legacy_layout import (
    RankFile,
    num_layers,
    rank_files,
    read_rank_file,
)
from megatron_sorted.conversion.megatron.names import LAYER, cut_axis
from megatron_sorted.conversion.megatron.saved_tensors import SavedFile, SavedTensor
from megatron_sorted.conversion.tensors.source import TensorInfo, TensorSource
from megatron_sorted.errors import CheckpointError

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class _Shard:
    """One tensor parallel rank's shard of a weight."""

    file: SavedFile
    place: SavedTensor

    def read(self) -> torch.Tensor:
        return self.file.read(self.place)


@dataclass(frozen=True)
class _Joined:
    """A weight as shards of tensor parallel ranks.

    Attributes:
        shards: One shard a rank.
        axis: The dimension that is split; None if every rank has the whole tensor.
        gated: Whether every shard holds rows of the gate, then of the up projection.
        info: Shape and data type of the whole tensor.
    """

    shards: tuple[_Shard, ...]
    axis: int | None
    gated: bool
    info: TensorInfo

    def joined(self) -> torch.Tensor:
        """Return the whole tensor, with at most one shard in memory beside it."""
        if len(self.shards) == 1:
            return self.shards[0].read()
        result, ranks = torch.empty(self.info.shape, dtype=self.info.dtype), len(self.shards)
        # Every rank holds its rows of the gate, then of the up projection.
        halves = result.chunk(2) if self.gated else (result,)
        targets = list(zip(*(half.chunk(ranks, self.axis) for half in halves), strict=True))
        for shard, of_rank in zip(self.shards, targets, strict=True):
            tensor = shard.read()
            sources = tensor.chunk(2) if self.gated else (tensor,)
            for target, source in zip(of_rank, sources, strict=True):
                target.copy_(source)
            del tensor, sources, source  # before the next is read
        return result


class LegacyFiles(TensorSource):
    """The weights of one ``iter_*`` or ``release`` directory, in the names of ``TensorSource``.

    Reading takes the memory of one tensor and one rank's shard of it.

    Attributes:
        tensors: Shapes and data types, in the order of files and of positions in them.
        arguments: Megatron's arguments in the checkpoint; None if it has none.
        step: The iteration at which it was saved.
    """

    def __init__(self, directory: str | Path):
        """Read the structure of every file, and compare a tied head with the embedding.

        Raises:
            CheckpointError: A file is missing, damaged or refused, or the files do not fit each
                other.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: is no directory.")
        ranks = {place: read_rank_file(path) for place, path in rank_files(self.directory).items()}
        first = ranks[0, 0]
        self.arguments, self.step = first.arguments, first.step
        self._stages, self._tensor_ranks = (
            1 + max(place[axis] for place in ranks) for axis in (0, 1)
        )
        self._check_together(ranks)
        self._weights: dict[str, _Joined] = {}
        self._join_all(ranks)
        self._drop_tied_head()
        self.tensors: Mapping[str, TensorInfo] = {
            name: weight.info for name, weight in self._weights.items()
        }

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.directory}: {problem}")

    def _check_together(self, ranks: dict[tuple[int, int], RankFile]) -> None:
        """Check that the files are of one save and complete."""
        for rank in ranks.values():
            if rank.step != self.step:
                raise self._error(
                    f"{rank.file.path.parent.name} is of iteration {rank.step}, the first of "
                    f"{self.step}; the files are of different saves."
                )
            if len(rank.chunks) != len(ranks[0, 0].chunks):
                raise self._error(
                    f"{rank.file.path.parent.name} holds {len(rank.chunks)} chunks of the model, "
                    f"the first {len(ranks[0, 0].chunks)}."
                )
        arguments = self.arguments or {}
        if (arguments.get("expert_model_parallel_size") or 1) > 1 or arguments.get("num_experts"):
            raise self._error("is of a model with experts, which cannot be converted.")
        for name, count in (
            ("tensor_model_parallel_size", self._tensor_ranks),
            ("pipeline_model_parallel_size", self._stages),
        ):
            if arguments.get(name) not in (None, count):
                raise self._error(
                    f"was saved with {name} {arguments[name]}, but files of {count} are there. "
                    "Copy the whole directory again."
                )

    def _join_all(self, ranks: dict[tuple[int, int], RankFile]) -> None:
        """Join the shards of all weights and number the layers across model chunks.

        A token passes the first chunk of every stage, then the second one of every stage.
        """
        layers, entries = 0, []
        for chunk in range(len(ranks[0, 0].chunks)):
            for stage in range(self._stages):
                members = [ranks[stage, rank] for rank in range(self._tensor_ranks)]
                label = f"{self.directory}: {members[0].file.path.parent.name}, chunk {chunk}"
                count = num_layers(members[0].chunks[chunk], label)
                for local, place in members[0].chunks[chunk].items():
                    shards = []
                    for member in members:
                        if local not in member.chunks[chunk]:
                            raise self._error(
                                f"{member.file.path.parent.name} lacks {local}, which other tensor "
                                "parallel ranks have."
                            )
                        shards.append(_Shard(member.file, member.chunks[chunk][local]))
                    name = self._global_name(local, layers, count)
                    entries.append(
                        (
                            (stage, place.file_offset),
                            name,
                            self._join(name, shards, members[0].chunks[chunk], local),
                        )
                    )
                more = {name for member in members for name in member.chunks[chunk]} - members[
                    0
                ].chunks[chunk].keys()
                if more:
                    raise self._error(
                        f"{sorted(more)[0]} is on some tensor parallel ranks of stage {stage} only."
                    )
                layers += count
        saved_layers = (self.arguments or {}).get("num_layers")
        if saved_layers not in (None, layers):
            raise self._error(
                f"holds {layers} layers, but was saved with num_layers {saved_layers}. Files are "
                "missing or of another save."
            )
        for _, name, weight in sorted(entries, key=lambda entry: entry[0]):
            if name in self._weights:
                raise self._error(f"{name} is there twice.")
            self._weights[name] = weight

    def _global_name(self, local: str, layers_before: int, layers_here: int) -> str:
        """Return the name in a sharded checkpoint of a name in a model chunk."""
        if match := LAYER.fullmatch(local):
            layer, rest = layers_before + int(match[1]), match[2]
            if rest.startswith("exit_norm."):
                return f"exit_norms.{self._exit_depth(layer + 1)}.{rest.removeprefix('exit_norm.')}"
            return f"decoder.layers.{layer}.{rest}"
        if local.startswith("exit_output_layer."):
            numbers = (self.arguments or {}).get("exit_layer_nums") or []
            here = [
                number
                for number in numbers
                if layers_before < number <= layers_before + layers_here
            ]
            index = int(local.split(".")[1])
            if index >= len(here):
                raise self._error(
                    f"holds head {index} of the exits of a stage, but by its arguments only {here} "
                    f"of layers {layers_before + 1}..{layers_before + layers_here} are exits."
                )
            return f"exit_output_layers.{self._exit_depth(here[index])}.weight"
        return local

    def _exit_depth(self, number: int) -> int:
        """Return the depth of EE-LLM's exit ``number``; ``pre_exit`` puts it before the layer."""
        return number - 1 if (self.arguments or {}).get("pre_exit") else number

    def _join(
        self, name: str, shards: list[_Shard], chunk: Mapping[str, SavedTensor], local: str
    ) -> _Joined:
        """Return a weight as its shards, after a check that they fit."""
        one = shards[0].place
        for shard in shards:
            if shard.place.dtype != one.dtype or shard.place.shape != one.shape:
                raise self._error(
                    f"{name} is {one.dtype} {list(one.shape)} on tensor parallel rank 0, but "
                    f"{shard.place.dtype} {list(shard.place.shape)} in "
                    f"{shard.file.path.parent.name}."
                )
        axis = cut_axis(name) if len(shards) > 1 else None
        shape, gated = list(one.shape), False
        if axis is not None:
            if axis >= len(shape):
                raise self._error(
                    f"{name} is of shape {shape}, which tensor parallel ranks cannot share."
                )
            shape[axis] *= len(shards)
            if ".linear_fc1." in name:
                down = chunk.get(f"{local.partition('.linear_fc1.')[0]}.linear_fc2.weight")
                gated = down is not None and one.shape[0] == 2 * down.shape[1]
        return _Joined(tuple(shards), axis, gated, TensorInfo(tuple(shape), one.dtype))

    def _drop_tied_head(self) -> None:
        """Leave out the last stage's copy of a tied embedding.

        Without arguments, a head equal to the embedding is tied: training would have made an untied
        one differ.
        """
        if HEAD not in self._weights or EMBEDDING not in self._weights:
            return
        untied = (
            self.arguments.get("untie_embeddings_and_output_weights", False)
            if self.arguments is not None
            else None
        )
        if untied:
            return
        head, embedding = self._weights[HEAD], self._weights[EMBEDDING]
        equal = head.info == embedding.info and all(
            torch.equal(one.read(), other.read())
            for one, other in zip(head.shards, embedding.shards, strict=True)
        )
        if equal:
            del self._weights[HEAD]
        elif untied is not None:
            raise self._error(
                f"{HEAD} of the last stage differs from {EMBEDDING}, though its arguments say that "
                "they are tied. The files are of different saves, or training went wrong; it "
                "cannot be converted truthfully."
            )

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor into memory of its own.

        Raises:
            CheckpointError: It cannot be read, or ranks that should have the same do not.
        """
        weight = self._weights[name]
        if len(weight.shards) == 1 or weight.axis is not None:
            return weight.joined()
        result = weight.shards[0].read()
        for shard in weight.shards[1:]:
            if not torch.equal(other := shard.read(), result):
                by = (other.double() - result.double()).abs().max().item()
                raise self._error(
                    f"{name} differs between tensor parallel ranks ({shard.file.path.parent.name}: "
                    f"by up to {by:.3g}), where all should have the same; so there is no one model "
                    "to convert. Load it in Megatron-LM and save it as torch_dist, which keeps "
                    "rank 0's."
                )
        return result
