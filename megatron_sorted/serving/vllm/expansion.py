"""Two faults of vLLM on CPUs that make sampling with any speculation wrong, and their repair.

Upstream: vllm-project/vllm#55005, open. To verify sampled tokens, the temperature, top-k and top-p
of a text are repeated for each of its drafted tokens. On CPUs the kernel that does it gets a copy
of the output, converted to int64 (``utils/cpu_triton_utils.py``, ``_expand_kernel_impl``), and the
output itself stays uninitialised memory: tokens are sampled at whatever temperature is there.

A step in which no text has a draft to verify, such as the first, ends the engine where a text asks
for top-k alone: ``v1/sample/ops/topk_topp_sampler.py``, ``apply_top_k_only``, takes the largest of
no values. (0.32; not known upstream.)
"""

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler

NAME = "expand_batch_to_tokens"
GIVEN = getattr(rejection_sampler, NAME)
"""vLLM's own function."""


def expand(
    x: Tensor,
    cu_num_tokens: Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> Tensor:
    """Return the values [b] of texts repeated for their drafted tokens [n].

    Args:
        x: One value for each text [b].
        cu_num_tokens: Number of drafted tokens of the texts up to each [b].
        num_tokens: Number of drafted tokens of all texts.
        replace_from: A value to be replaced.
        replace_to: What replaces it.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    repeated = x.repeat_interleave(counts, output_size=num_tokens)
    return repeated.masked_fill(repeated == replace_from, replace_to)


def is_faulty() -> bool:
    """Return whether the function in use gives something else."""
    sizes = torch.tensor([1, 3], dtype=torch.int32)
    given = getattr(rejection_sampler, NAME)
    return any(
        given(values, sizes, 3, replace_from=0, replace_to=1).tolist()
        != expand(values, sizes, 3, 0, 1).tolist()
        for values in (torch.tensor([0.0, 0.5]), torch.tensor([0.75, 0.0]), torch.tensor([7, 0]))
    )


def repair() -> bool:
    """Put our function in the place of vLLM's where that is faulty; return whether it was."""
    faulty = is_faulty()
    if faulty:
        setattr(rejection_sampler, NAME, expand)
    repair_empty()
    return faulty


def repair_empty() -> None:
    """Let verification leave no logits as they are, instead of taking their largest top-k."""
    constrain = rejection_sampler.apply_top_k_top_p
    if getattr(constrain, "accepts_none", False):
        return

    def accepting(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        return constrain(logits, k, p) if logits.shape[0] else logits

    accepting.accepts_none = True
    rejection_sampler.apply_top_k_top_p = accepting
