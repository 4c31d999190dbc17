"""How often an exit's most likely token is the last exit's too, and for how many tokens in a row.

It predicts how long drafts of the exit would be accepted. Measured with teacher forcing: at every
position both exits have read the true text before it, so no text has to be generated.
"""

from collections.abc import Sequence

import torch


def following_n(
    loss_mask_bs: torch.Tensor, positions_bs: torch.Tensor, pieces_bs: torch.Tensor | None
) -> torch.Tensor:
    """Return for each counted token the number of the next token of its document; n if none counts.

    Counted tokens (mask not 0) are numbered 0..n-1 in (sequence, batch) order. A run of tokens ends
    with its document, with its sample, and where the next token does not count; so none continues
    from one slice of a sequence into the next (context parallel) either.

    Shapes: loss mask, positions and segments [b, s], on the host; result [n] int64.
    """
    counted_sb = (loss_mask_bs != 0).t()
    flat = counted_sb.reshape(-1)
    num_tokens = int(flat.sum())
    place_sb = (flat.cumsum(0) - 1).view(counted_sb.shape)
    positions_sb = positions_bs.t()
    continues = counted_sb[:-1] & counted_sb[1:] & (positions_sb[1:] == positions_sb[:-1] + 1)
    if pieces_bs is not None:
        continues &= pieces_bs.t()[1:] == pieces_bs.t()[:-1]
    following_sb = torch.full_like(place_sb, num_tokens)
    following_sb[:-1] = torch.where(continues, place_sb[1:], num_tokens)
    return following_sb.reshape(-1)[flat]


def draft_counts(
    agree_n: torch.Tensor, follow_n: torch.Tensor, num_draft_tokens: int
) -> torch.Tensor:
    """Count, for k = 1..``num_draft_tokens``, drafts that reach a k-th token and agree there.

    Every counted token starts a draft. It reaches its k-th token if the exits agree on the k - 1
    before and the document does not end first.

    Shapes: agree [n] bool; follow [n] int64, see ``following_n``; result [2, k] int64, row 0 the
    drafts that reach the k-th token, row 1 those that agree there too.
    """
    num_tokens = agree_n.numel()
    agree = torch.cat((agree_n, agree_n.new_zeros(1)))
    follow = torch.cat((follow_n, follow_n.new_full((1,), num_tokens)))
    place = torch.arange(num_tokens, device=agree_n.device)
    alive = torch.ones_like(agree_n)
    seen, agreed = [], []
    for _ in range(num_draft_tokens):
        reached = alive & (place < num_tokens)
        alive = reached & agree[place]
        seen.append(reached.sum())
        agreed.append(alive.sum())
        place = follow[place]
    return torch.stack((torch.stack(seen), torch.stack(agreed)))


def accept_length(seen: Sequence[float], agreed: Sequence[float]) -> float:
    """Return the expected number of tokens per verification when the exit drafts ``len(seen)``.

        tau = 1 + sum_k prod_{i <= k} acc_i,        acc_i = agreed_i / seen_i

    acc_i is the probability that the i-th drafted token is accepted when all before it were; the 1
    is the token that the last exit adds itself. Where no document ends within a draft, tau equals
    1 + the mean number of consecutive agreements from a position on (at most the number drafted).
    Where documents are short it is the length that longer ones would give: a draft that the end of
    its document cuts off does not count for the tokens after it. A k-th token that no document was
    long enough for adds nothing.

    >>> accept_length(seen=[100, 80], agreed=[80, 40])
    2.2

    Source: NVIDIA-NeMo/Automodel, pull request 2959 (simulated acceptance length of a draft model).
    """
    length, probability = 1.0, 1.0
    for num_seen, num_agreed in zip(seen, agreed, strict=True):
        if not num_seen:
            break
        probability *= num_agreed / num_seen
        length += probability
    return length
