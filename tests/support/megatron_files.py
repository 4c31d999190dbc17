"""Checkpoints of megatron-core's own GPTModel as Megatron-LM writes them, to test readers."""

import argparse
import json
import queue
from pathlib import Path

import torch

from megatron_sorted.model.config import make_config
from megatron_sorted.model.spec import layer_spec
from megatron_sorted.parallel.groups import process_groups, start_process_groups
from megatron_sorted.platform.select import choose_platform
from megatron_sorted.platform.state import seed_everything
from megatron_sorted.settings.derived import padded_vocab_size
from megatron_sorted.settings.layout import num_virtual_chunks
from megatron_sorted.settings.run import Settings
from tests.support.gather import RENAMED
from tests.support.tiny import init_method

FORMS = ("legacy", "stacked", "per_layer", "norms_by_module")
PADDED = 104  # rows of every layout, so that all share one reference


def megatron_arguments(settings: Settings, **more) -> argparse.Namespace:
    """Return the arguments that Megatron-LM's parser stores, as far as readers use them."""
    return argparse.Namespace(
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        ffn_hidden_size=settings.ffn_hidden_size,
        num_attention_heads=settings.num_attention_heads,
        kv_channels=settings.hidden_size // settings.num_attention_heads,
        group_query_attention=settings.group_query_attention,
        num_query_groups=settings.num_query_groups or 1,
        seq_length=settings.seq_length,
        max_position_embeddings=settings.seq_length,
        position_embedding_type="rope",
        rotary_base=settings.rotary_base,
        rotary_percent=1.0,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        swiglu=settings.swiglu,
        add_bias_linear=not settings.disable_bias_linear,
        add_qkv_bias=settings.add_qkv_bias,
        qk_layernorm=settings.qk_layernorm,
        untie_embeddings_and_output_weights=settings.untie_embeddings_and_output_weights,
        make_vocab_size_divisible_by=8,
        padded_vocab_size=PADDED,
        vocab_size=None,
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        params_dtype=torch.float32,
        num_experts=None,
        **more,
    )


def build_chunks(settings: Settings) -> list:
    """Return this rank's chunks of GPTModel."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    platform = choose_platform("cpu")
    platform.prepare()
    start_process_groups(settings, platform, init_method())
    seed_everything(settings.seed, process_groups())
    count = num_virtual_chunks(settings)
    assert padded_vocab_size(settings.vocab_size, settings) == PADDED
    spec, tied = layer_spec(settings, False), not settings.untie_embeddings_and_output_weights
    chunks = []
    for chunk in range(count):
        ends = {"ignore_virtual": count == 1, "vp_stage": chunk if count > 1 else None}
        chunks.append(
            GPTModel(
                make_config(settings, platform),
                spec,
                PADDED,
                settings.seq_length,
                position_embedding_type="rope",
                pre_process=parallel_state.is_pipeline_first_stage(**ends),
                post_process=parallel_state.is_pipeline_last_stage(**ends),
                share_embeddings_and_output_weights=tied,
                vp_stage=ends["vp_stage"],
            )
        )
    return chunks


def named_chunks(chunks: list, make) -> dict:
    """Return ``make(chunk)`` of every chunk under the name that Megatron-LM gives it."""
    return {
        "model" if len(chunks) == 1 else f"model{n}": make(chunk) for n, chunk in enumerate(chunks)
    }


def sharded_chunks(chunks: list, metadata: dict | None = None) -> dict:
    """Return the chunks' sharded states under the names that Megatron-LM gives them."""
    return named_chunks(chunks, lambda chunk: chunk.sharded_state_dict(metadata=metadata))


def _sharded(chunks: list, per_layer: bool) -> dict:
    return sharded_chunks(chunks, {"non_homogeneous_layers": per_layer})


def _use_queue_of_this_process() -> None:
    """Replace Megatron's queue, which would start a process for each rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # the writer is in this process


def _save(state: dict, directory: str) -> None:
    """Save as the installed Megatron does."""
    from megatron.core import dist_checkpointing

    _use_queue_of_this_process()
    dist_checkpointing.save(state, directory)


def _save_in_form(state: dict, directory: Path, common_file: bool) -> None:
    """Save as any installed Megatron can, what all ranks share in the form of one of them.

    Args:
        state: The state, with Megatron's sharded tensors in it.
        directory: An existing directory.
        common_file: Whether to write ``common.pt``, as versions up to 0.18 do; otherwise an object
            beside the weights, as 0.19 does.
    """
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

    _use_queue_of_this_process()
    sharded, common = save_preprocess(state)
    described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if common_file:
        described |= {"common_backend": "torch", "common_backend_version": 1}
    else:
        sharded["common_state"] = ShardedObject(
            "common_state", common, (1,), (0,), replica_id=dist.get_rank()
        )
    get_default_save_sharded_strategy("torch_dist").save(sharded, directory)
    if dist.get_rank() == 0:
        if common_file:
            torch.save(common, directory / "common.pt")
        (directory / "metadata.json").write_text(json.dumps(described))
    dist.barrier()


def plain_name_of(theirs: str) -> str:
    """Return the name under which a weight of GPTModel on one process is offered."""
    for old, new in RENAMED.items():
        for kind in ("weight", "bias"):
            theirs = theirs.replace(old.replace("weight", kind), new.replace("weight", kind))
    return theirs


def make_truth(
    settings: Settings, seed_directory: str, given: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Save a model of one process; return its weights by GPTModel's own names.

    The weights are random, or those ``given`` under the names of a sharded checkpoint; rows of the
    vocabulary that only padding has are zeros.
    """
    (model,) = build_chunks(settings)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if given is None:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                weight = given[plain_name_of(name)]
                parameter.zero_()
                parameter[: len(weight)] = weight
    Path(seed_directory).mkdir()
    _save(_sharded([model], False), seed_directory)
    return {
        name: value.detach()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def save_as_megatron(settings: Settings, seed_directory: str, root: str, step: int) -> None:
    """Save the reference from this layout in every form, each with a tracker.

    "legacy": ``mp_rank_*``; "stacked" and "per_layer": ``torch_dist`` with one tensor over all
    layers or one for each; "norms_by_module": norms under the names of their modules instead of
    those of the linear layers after them. What all ranks share is saved in "stacked" as the
    installed Megatron does it, in "per_layer" as a file, in "norms_by_module" as an object.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state

    chunks = build_chunks(settings)
    loaded = dist_checkpointing.load(_sharded(chunks, False), seed_directory)
    for name, chunk in named_chunks(chunks, lambda chunk: chunk).items():
        chunk.load_state_dict(loaded[name])
    state = {"args": megatron_arguments(settings), "checkpoint_version": 3.0, "iteration": step}
    directories = {form: Path(root) / form / f"iter_{step:07d}" for form in FORMS}
    if dist.get_rank() == 0:
        for directory in directories.values():
            directory.mkdir(parents=True)
            (directory.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
    dist.barrier()

    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{tensor:02d}" + (
        f"_{stage:03d}" if settings.pipeline_model_parallel_size > 1 else ""
    )
    (directories["legacy"] / name).mkdir()
    rest = {
        "optimizer": {"state": {0: {"step": torch.tensor(3), "exp_avg": torch.randn(10_000)}}},
        "opt_param_scheduler": {"num_steps": 3},
    }
    models = named_chunks(chunks, lambda chunk: chunk.state_dict_for_save_checkpoint())
    torch.save({**state, **models, **rest}, directories["legacy"] / name / "model_optim_rng.pt")

    _save({**state, **_sharded(chunks, False)}, str(directories["stacked"]))
    _save_in_form({**state, **_sharded(chunks, True)}, directories["per_layer"], True)
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.submodules_config.sharded_state_dict_keys_map = {}
    _save_in_form({**state, **_sharded(chunks, False)}, directories["norms_by_module"], False)
