"""How often an exit finds the same token most likely as the last exit does, and how far such agreement reaches.

With teacher forcing: at every position both have read the true text before it, so nothing has to be generated.
"""

from collections.abc import Sequence

import torch


def following_n(
    loss_mask_bs: torch.Tensor, positions_bs: torch.Tensor, segments_bs: torch.Tensor | None
) -> torch.Tensor:
    """Return for each counted token where the next token of its document stands among the counted ones; n if it is not counted.

    Counted tokens (mask not 0) are numbered 0..n-1 in (sequence, batch) order. A run ends with its document, its sample, and
    where the next token does not count; so nothing follows across the seam of two slices of a sequence either (context parallel).

    Shapes: loss mask, positions and segments [b, s], on the host; result [n] int64.
    """
    counted_sb = (loss_mask_bs != 0).t()
    flat = counted_sb.reshape(-1)
    num_tokens = int(flat.sum())
    place_sb = (flat.cumsum(0) - 1).view(counted_sb.shape)
    positions_sb = positions_bs.t()
    goes_on = counted_sb[:-1] & counted_sb[1:] & (positions_sb[1:] == positions_sb[:-1] + 1)
    if segments_bs is not None:
        goes_on &= segments_bs.t()[1:] == segments_bs.t()[:-1]
    following_sb = torch.full_like(place_sb, num_tokens)
    following_sb[:-1] = torch.where(goes_on, place_sb[1:], num_tokens)
    return following_sb.reshape(-1)[flat]


def draft_counts(
    agree_n: torch.Tensor, follow_n: torch.Tensor, num_draft_tokens: int
) -> torch.Tensor:
    """Return for k = 1..``num_draft_tokens`` how many starts see a k-th token after k - 1 agreements, and how many agree there too.

    Every counted token is a start. A start whose document ends before its k-th token is not counted at k.

    Shapes: agree [n] bool; follow [n] int64, see ``following_n``; result [2, k] int64, row 0 seen, row 1 agreed.
    """
    num_tokens = agree_n.numel()
    agree = torch.cat((agree_n, agree_n.new_zeros(1)))
    follow = torch.cat((follow_n, follow_n.new_full((1,), num_tokens)))
    place = torch.arange(num_tokens, device=agree_n.device)
    alive = torch.ones_like(agree_n)
    seen, agreed = [], []
    for _ in range(num_draft_tokens):
        here = alive & (place < num_tokens)
        alive = here & agree[place]
        seen.append(here.sum())
        agreed.append(alive.sum())
        place = follow[place]
    return torch.stack((torch.stack(seen), torch.stack(agreed)))


def accept_length(seen: Sequence[float], agreed: Sequence[float]) -> float:
    """Return the mean number of tokens that one verification by the last exit gains when the exit drafts ``len(seen)`` tokens.

    It is tau = 1 + sum_k prod_{i <= k} acc_i, where acc_i = agreed_i / seen_i is the chance that the i-th drafted token is
    accepted when all before it were; the 1 is the token that the last exit adds itself. Where no document ends within a draft
    this equals 1 + the mean number of consecutive agreements from a position on (at most as many as are drafted). Where
    documents are short it is the length that longer ones would give: a draft that the end of its document cuts says nothing of
    the tokens behind it. A k-th token that no document was long enough for adds nothing.

    Source: NVIDIA-NeMo/Automodel, pull request 2959 (simulated acceptance length of a draft model).
    """
    length, chance = 1.0, 1.0
    for one_seen, one_agreed in zip(seen, agreed, strict=True):
        if not one_seen:
            break
        chance *= one_agreed / one_seen
        length += chance
    return length
