"""vLLM's attention metadata for passes over tokens that are drafted behind the texts."""

import torch
from torch import Tensor

PADDING_SLOT = -1
"""The slot in which vLLM writes nothing."""


def queries(cad, positions_bq: Tensor, longer: int, block_size: int, max_model_len: int):
    """Return metadata of a pass in which every text reads the same number of tokens.

    Args:
        cad: Metadata of another pass over the same texts, with their block tables.
        positions_bq: The tokens' positions, consecutive in each text; they end the text.
        longer: How many tokens longer than in ``cad`` a text may be.
        block_size: Number of tokens in a block of the cache.
        max_model_len: Largest length of a text; a token behind it is not written.

    Returns:
        The metadata. Its slots are those of the target's own cache.
    """
    rows, tokens = positions_bq.shape
    within = positions_bq.clamp(max=max_model_len - 1)
    blocks = cad.block_table_tensor.gather(1, within // block_size)
    slots = (blocks.long() * block_size + within % block_size).masked_fill(
        positions_bq >= max_model_len, PADDING_SLOT
    )
    starts = torch.arange(rows + 1, dtype=torch.int32) * tokens
    upper = cad.seq_lens_cpu_upper_bound
    return cad.replace(
        query_start_loc=starts.to(cad.query_start_loc.device, non_blocking=True),
        query_start_loc_cpu=starts,
        seq_lens=(within[:, -1] + 1).to(cad.seq_lens.dtype),
        num_reqs=rows,
        num_actual_tokens=rows * tokens,
        max_query_len=tokens,
        max_seq_len=min(cad.max_seq_len + longer, max_model_len),
        slot_mapping=slots.reshape(-1),
        seq_lens_cpu_upper_bound=None if upper is None else upper + longer,
        positions=None,
        is_prefilling=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def select_texts(cad, rows: Tensor):
    """Return the metadata with the block tables of some texts alone; `queries` sets the rest."""
    upper = cad.seq_lens_cpu_upper_bound
    return cad.replace(
        seq_lens=cad.seq_lens[rows],
        block_table_tensor=cad.block_table_tensor[rows],
        seq_lens_cpu_upper_bound=None if upper is None else upper[rows.to(upper.device)],
    )
