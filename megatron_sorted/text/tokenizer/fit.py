"""Whether a tokenizer and a model belong together: only ids that texts can have need rows."""

from collections.abc import Iterable, Sequence

from megatron_sorted.errors import DataError
from megatron_sorted.text.tokenizer.contract import Tokenizer

MAX_NAMES = 5


def surplus_line(tokenizer: Tokenizer, num_rows: int, where: str) -> str | None:
    """Return a line about added tokens that a model has no row for; None if it has all rows.

    A text that names no added token has ids below ``tokenizer.text_size``; those must fit, and bos
    and eos. Further added tokens, such as a [PAD] without a row, do no harm until a text names
    them; the code that reads ids checks them.

    Args:
        tokenizer: The tokenizer.
        num_rows: The size of the model's vocabulary.
        where: The source of that number, for the message.

    Raises:
        DataError: Texts can have ids that the model has no row for.
    """
    if tokenizer.vocab_size <= num_rows:
        return None
    ends = [
        i
        for i in (tokenizer.bos_id if tokenizer.adds_bos else None, tokenizer.eos_id)
        if i is not None
    ]
    needed = max([tokenizer.text_size, *(i + 1 for i in ends)])
    if needed > num_rows:
        raise DataError(
            f"{where}: the model has a vocabulary of {num_rows}, but texts of tokenizer "
            f"{tokenizer.name} have ids up to {needed - 1}, so the two do not belong together. "
            "Give the model's own tokenizer, or for a new model a --vocab-size of at least "
            f"{needed}."
        )
    beyond = [i for i in range(num_rows, tokenizer.vocab_size) if tokenizer.token_text(i)]
    shown = ", ".join(f"{tokenizer.token_text(i)!r} ({i})" for i in beyond[:MAX_NAMES])
    more = f" and {len(beyond) - MAX_NAMES} more" if len(beyond) > MAX_NAMES else ""
    return (
        f"{tokenizer.name}: the model has a vocabulary of {num_rows}; added tokens {shown}{more} "
        "have no row in it: texts that name them are refused, others are not affected"
    )


def fitting_pad(tokenizer: Tokenizer, num_rows: int) -> int:
    """Return the id that fills unused positions of a model with ``num_rows`` tokens."""
    eos = tokenizer.eos_id
    fits = (i for i in (tokenizer.pad_id, eos) if i is not None and i < num_rows)
    return next(fits, 0)


def check_ids(
    batch: Iterable[Sequence[int]], tokenizer: Tokenizer, num_rows: int, where: str
) -> None:
    """Check that a model has a row for every id of these texts.

    Raises:
        DataError: A text names an added token that the model has no row for.
    """
    if tokenizer.vocab_size <= num_rows:
        return
    for number, ids in enumerate(batch, 1):
        if ids and max(ids) >= num_rows:
            token = tokenizer.token_text(max(ids))
            raise DataError(
                f"{where}: text {number} holds {token!r}, token {max(ids)}, for which the model "
                f"has no row (vocabulary {num_rows}). Remove it from the text."
            )
