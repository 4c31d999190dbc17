"""Pieces of conversations to ids: those that the whole text has, cut where a model is asked and where it answers.

In use a model is asked with the ids of the text up to its answer. So the ids of a document have to be the ids of its prompt, then
those of the answer as the whole text has them. Where the tokenizer joins the end of a prompt and the beginning of an answer into one
token, or cuts the prompt otherwise because of what follows, there is no such border. Then every answer gets a document of its own,
behind the very ids that a model is asked with.

Texts are not read again and again: behind a control token a tokenizer begins anew, so that what stands before the last one does not
matter; and in most vocabularies no token goes on behind a line break, so that an answer can be read without its prompt.
"""

from collections.abc import Iterable, Sequence

from megatron_sorted.errors import DataError
from megatron_sorted.text.conversation import TextSpan
from megatron_sorted.text.tokenizer.contract import Tokenizer

BREAKS = ("\n", "\u010a")
"""A line break, as text and as byte-level vocabularies write it."""
BLANKS = frozenset(" \t\r\n\u2581\u0120\u0109\u010a\u010d")
PROBES = (
    "Hi",
    "hello there",
    "1 + 1",
    "(a)",
    "\u00e9t\u00e9",
    "\u732b",
    "\U0001f600",
    "<b>",
    "s",
    "...",
    "A",
    "'tis",
    "###",
    "-1",
)

TrainedIds = tuple[list[int], bool]
"""Ids, and whether they are trained on."""


class PieceEncoder:
    """Turns documents of pieces into sequences of ids.

    Args:
        tokenizer: Of the pieces.
        ends: Control tokens that answers may end with and a probe is to be made of.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[str] = ()):
        self.tokenizer = tokenizer
        self.breaks_words = _breaks_words(tokenizer)
        self.known: dict[str, list[int]] = {"": []}
        for text in ("\n", *ends):
            self.known[text] = tokenizer.encode_rendered(text)

    def encode(self, documents: Sequence[Sequence[TextSpan]]) -> list[list[list[TrainedIds]]]:
        """Return for each document its sequences; where a token stands across the border of a turn, those of one document an answer."""
        plans = [self._plan(document) for document in documents]
        texts = list(
            dict.fromkeys(
                text
                for plan in plans
                for _, before, whole in plan
                for text in (before, whole)
                if text not in self.known
            )
        )
        ids = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True)) | self.known
        found = []
        for document, plan in zip(documents, plans, strict=True):
            joined = self._joined(plan, ids)
            found.append(self._apart(document) if joined is None else [joined])
        return found

    def _apart(self, document: Sequence[TextSpan]) -> list[list[TrainedIds]]:
        """Return a document for each answer: the ids of all before it, and those of the answer, read as behind a control token."""
        found, before = [], ""
        for piece in document:
            if piece.is_response:
                prompt, answer, anchor = self.tokenizer.encode_batch(
                    [before, piece.end + piece.text, piece.end]
                )
                sequences: list[TrainedIds] = [(prompt, False), (answer[len(anchor) :], True)]
                found.append([sequence for sequence in sequences if sequence[0]])
            before += piece.text
        return found

    def _plan(self, document: Sequence[TextSpan]) -> list[tuple[TextSpan, str, str]]:
        """Return for each piece a text before it and that text with the piece: the ids of the piece are those that it adds."""
        plan, context = [], ""
        for piece in document:
            before = context
            if piece.is_response and self.breaks_words and _is_clean(context, piece.text):
                before = "\n"
            plan.append((piece, before, before + piece.text))
            context = piece.end or context + piece.text
        return plan

    @staticmethod
    def _joined(
        plan: Sequence[tuple[TextSpan, str, str]], ids: dict[str, list[int]]
    ) -> list[TrainedIds] | None:
        found: list[TrainedIds] = []
        for piece, before, whole in plan:
            start, every = ids[before], ids[whole]
            if start:
                if every[: len(start)] != start:
                    return None
                every = every[len(start) :]
            if every:
                found.append((every, piece.is_response))
        return found


def _is_clean(context: str, answer: str) -> bool:
    """Return whether a line break alone stands between two words."""
    return (
        len(context) > 1
        and context[-1] == "\n"
        and not context[-2].isspace()
        and not answer[:1].isspace()
    )


def _breaks_words(tokenizer: Tokenizer) -> bool:
    """Return whether every text can be cut behind a line break that stands between two words.

    So it is where no token of the vocabulary holds a line break with a letter behind it; that the tokenizer's rules for cutting and
    rewriting texts keep to it is tried.
    """
    for token in tokenizer.vocabulary():
        for sign in BREAKS:
            place = token.find(sign)
            while place >= 0:
                if place + 1 < len(token) and token[place + 1] not in BLANKS:
                    return False
                place = token.find(sign, place + 1)
    alone = tokenizer.encode_rendered("\n")
    for before in PROBES:
        for after in PROBES:
            try:
                start, rest, whole = tokenizer.encode_batch(
                    [f"{before}\n", f"\n{after}", f"{before}\n{after}"]
                )
            except DataError:  # a tokenizer of numbers alone
                return False
            if rest[: len(alone)] != alone or whole != start + rest[len(alone) :]:
                return False
    return True
