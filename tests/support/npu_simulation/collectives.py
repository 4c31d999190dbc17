"""HCCL simulated: groups of gloo on the memory that NPU tensors share with the host."""

import torch.distributed as dist


def _gloo(store, rank, size, timeout):
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


def _batched(operations: list) -> list:
    """Start messages one by one, in place of torch_npu's batch, which calls HCCL itself."""
    works = []
    for operation in operations:
        peer = "group_dst" if operation.op.__name__ == "isend" else "group_src"
        works.append(
            operation.op(
                operation.tensor,
                group=operation.group,
                tag=operation.tag,
                **{peer: operation.group_peer},
            )
        )
    return works


def gloo_as_hccl() -> None:
    """Register gloo under the name of HCCL."""
    backend = dist.Backend
    if "hccl" in backend.backend_list:
        backend._plugins.pop("HCCL", None)
        backend.backend_list.remove("hccl")
        if hasattr(backend, "HCCL"):
            delattr(backend, "HCCL")
    backend.register_backend("hccl", _gloo, devices=["cpu", "npu"])
    backend.default_device_backend_map.update(npu="hccl", cpu="gloo")
    dist.batch_isend_irecv = dist.distributed_c10d.batch_isend_irecv = _batched
