"""Two mends of the distributed optimizer's checkpoints, both on public attributes of its objects.

Met with megatron-core 0.16.1; tests/ranks/test_checkpoint.py fails without either.
"""

import torch


def count_padding_in_offsets(chunks: list) -> None:
    """Makes the offsets of saved optimizer state agree with the places of parameters in their buffer.

    A bucket is padded to a multiple of the data parallel size. Parameters' places count that padding, but saving adds up bucket
    sizes without it: behind a padded bucket, every parameter's moments were cut from the wrong place and the last ones lost
    (Megatron only warns: "param range exceeds unpadded buffer"). With the padding counted as content, both agree.
    """
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def fill_empty_state(optimizer) -> None:
    """Gives torch's own Adam, where it has not stepped yet, the state that a loaded one replaces.

    Before its first step the distributed optimizer has no state, and loading stops at the missing step count. The fused Adams of
    Apex and Transformer Engine keep the count elsewhere and need nothing.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", None)
        if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)) or inner.state:
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
