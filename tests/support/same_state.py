"""Weights and moments of two runs, whatever their layouts, compared bit for bit."""

import torch

from tests.support.gather import join_ranks
from tests.support.tiny import VOCABULARY

MOMENTS = ("exp_avg", "exp_avg_sq")


def joined(reports: list[dict], key: str, moment: str | None = None) -> dict[str, torch.Tensor]:
    """Return whole tensors by name from all ranks' reports, without vocabulary padding."""
    whole = join_ranks([r[key] if moment is None else r[key][moment] for r in reports])[0]
    return {
        name: tensor[:VOCABULARY] if "embedding" in name or "output_layer" in name else tensor
        for name, tensor in whole.items()
    }


def assert_equal(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str
) -> None:
    """Check that both have the same tensors, bit for bit, and at least one."""
    assert expected and got.keys() == expected.keys(), (
        f"{what}: {sorted(got.keys() ^ expected.keys())}"
    )
    differ = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not differ, f"{what}: {differ}"


def assert_same_moments(got: list[dict], expected: list[dict], loaded: bool = False) -> None:
    """Check that ``got`` has the moments of ``expected``; with ``loaded``, right after loading."""
    for moment in MOMENTS:
        assert_equal(
            joined(got, "loaded_moments" if loaded else "moments", moment),
            joined(expected, "moments", moment),
            moment,
        )


def assert_same_state(
    got: list[dict],
    expected: list[dict],
    loaded: bool = False,
    weights_as: torch.dtype | None = None,
) -> None:
    """Check that weights and moments are the same.

    Args:
        got: All ranks' reports (``rank_bodies.steps_from``).
        expected: The reports of another run, perhaps in another layout.
        loaded: Whether to compare the state that ``got`` had loaded, before its first step.
        weights_as: The dtype in which weights are compared: fully sharded ones are kept in fp32,
            others in the layers' precision.
    """
    key = "loaded_weights" if loaded else "weights"
    weights, wanted = (
        {
            name: weight.to(weights_as or weight.dtype)
            for name, weight in joined(reports, of).items()
        }
        for reports, of in ((got, key), (expected, "weights"))
    )
    assert_equal(weights, wanted, key)
    assert_same_moments(got, expected, loaded)
