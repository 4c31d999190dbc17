"""Spans of conversations as ids, split between prompts and answers.

In use a model is prompted with the ids of the text up to its answer. So the ids of a document must
be the ids of its prompt, then those of the answer as in the whole text. Where the tokenizer
joins the end of a prompt and the beginning of an answer into one token, or splits the prompt
differently because of what follows, there is no such border. Then every answer gets a document of
its own, after exactly the ids that a model is prompted with.

Texts are not encoded repeatedly: after a control token a tokenizer starts anew, so that what
precedes the last one does not matter; and in most vocabularies no token continues after a line
break, so that an answer can be encoded without its prompt.
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


class SpanEncoder:
    """An encoder of documents of spans into sequences of ids.

    Args:
        tokenizer: The tokenizer of the spans.
        ends: The control tokens that answers may end with.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[str] = ()):
        self.tokenizer = tokenizer
        self.splits_at_line_breaks = _splits_at_line_breaks(tokenizer)
        self.known: dict[str, list[int]] = {"": []}
        for text in ("\n", *ends):
            self.known[text] = tokenizer.encode_rendered(text)

    def encode(self, documents: Sequence[Sequence[TextSpan]]) -> list[list[list[TrainedIds]]]:
        """Return for each document its sequences.

        Where a token crosses the border of a turn, they are those of one document per answer.
        """
        plans = [self._plan(document) for document in documents]
        texts = list(
            dict.fromkeys(
                text
                for plan in plans
                for _, before, with_span in plan
                for text in (before, with_span)
                if text not in self.known
            )
        )
        ids = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True)) | self.known
        sequences = []
        for document, plan in zip(documents, plans, strict=True):
            joined = self._joined(plan, ids)
            sequences.append(self._per_answer(document) if joined is None else [joined])
        return sequences

    def _per_answer(self, document: Sequence[TextSpan]) -> list[list[TrainedIds]]:
        """Return a document for each answer: the ids of all text before it, then its own ids.

        Those are encoded as after a control token.
        """
        result, before = [], ""
        for span in document:
            if span.is_response:
                prompt, answer, anchor = self.tokenizer.encode_batch(
                    [before, span.end + span.text, span.end]
                )
                sequences: list[TrainedIds] = [(prompt, False), (answer[len(anchor) :], True)]
                result.append([sequence for sequence in sequences if sequence[0]])
            before += span.text
        return result

    def _plan(self, document: Sequence[TextSpan]) -> list[tuple[TextSpan, str, str]]:
        """Return for each span a text before it, and that text with the span.

        The ids of the span are those that the second text adds.
        """
        plan, context = [], ""
        for span in document:
            before = context
            if span.is_response and self.splits_at_line_breaks and _is_clean(context, span.text):
                before = "\n"
            plan.append((span, before, before + span.text))
            context = span.end or context + span.text
        return plan

    @staticmethod
    def _joined(
        plan: Sequence[tuple[TextSpan, str, str]], ids: dict[str, list[int]]
    ) -> list[TrainedIds] | None:
        result: list[TrainedIds] = []
        for span, before, with_span in plan:
            start, every = ids[before], ids[with_span]
            if start:
                if every[: len(start)] != start:
                    return None
                every = every[len(start) :]
            if every:
                result.append((every, span.is_response))
        return result


def _is_clean(context: str, answer: str) -> bool:
    """Return whether exactly a line break stands between two words."""
    return (
        len(context) > 1
        and context[-1] == "\n"
        and not context[-2].isspace()
        and not answer[:1].isspace()
    )


def _splits_at_line_breaks(tokenizer: Tokenizer) -> bool:
    """Return whether every text can be split after a line break between two words.

    That holds where no token of the vocabulary contains a line break followed by a letter. Samples
    test that the tokenizer's rules for splitting and normalising texts agree.
    """
    for token in tokenizer.vocabulary():
        for sign in BREAKS:
            position = token.find(sign)
            while position >= 0:
                if position + 1 < len(token) and token[position + 1] not in BLANKS:
                    return False
                position = token.find(sign, position + 1)
    alone = tokenizer.encode_rendered("\n")
    for before in PROBES:
        for after in PROBES:
            try:
                start, rest, whole = tokenizer.encode_batch(
                    [f"{before}\n", f"\n{after}", f"{before}\n{after}"]
                )
            except DataError:  # a tokenizer of numbers only
                return False
            if rest[: len(alone)] != alone or whole != start + rest[len(alone) :]:
                return False
    return True
