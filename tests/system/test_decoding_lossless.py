"""The long form of tests/unit/test_decoding_proof.py: 50,000 tokens for each family of models."""

import pytest

from lab.decoding.proof import compare
from tests.support.decoding import plain_network


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_fifty_thousand_tokens_of_each_family(family):
    _, network = plain_network(family)
    result = compare(
        network,
        [[5, 9, 2], [7], [3, 3, 8, 1, 6], [4, 4]],
        50_000,
        seed=2,
        end_ids=frozenset({1}),
        most_rows=32,
        to_text=lambda tokens: "".join(chr(97 + token % 26) for token in tokens),
    )
    assert result.num_tokens >= 50_000 and not result.differences, result.differences[:3]
