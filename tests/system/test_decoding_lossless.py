"""The long form of tests/unit/test_decoding_proof.py: many tokens of each family and kind."""

import pytest

from lab.decoding.proof import Draws, compare
from tests.support.decoding import KINDS, needs_native, plain_network


@pytest.mark.long(reason="a few hundred tokens of one family are compared in the short form")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "torch" else needs_native) for kind in KINDS]
)
def test_many_tokens_of_each_family_and_kind(kind, family):
    """Of each kind 100,000 tokens, and of torch's path 200,000."""
    _, network = plain_network(family, kind=kind)
    draws = Draws(
        end_ids=frozenset({1}),
        to_text=lambda tokens: "".join(chr(97 + token % 26) for token in tokens),
        most_rows=32,
    )
    prompts, count = (
        [[5, 9, 2], [7], [3, 3, 8, 1, 6], [4, 4]],
        50_000 if kind == "torch" else 25_000,
    )
    result = compare(network, prompts, count, seed=2, draws=draws)
    assert result.num_tokens >= count and not result.differences, result.differences[:3]
    assert 0 < result.accepted < result.drafted
