"""Rules for two gradients, by hand."""

import pytest
import torch

from megatron_sorted.loss.gradient_rules import GRADIENT_RULES, GradientRule

OWN = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[2.0, 1.0]]])
DEEPER = torch.tensor([[[0.0, 10.0]], [[-1.0, 1.0]], [[1.0, 1.0]], [[0.0, 0.0]]])


def join(rule: GradientRule, num_above: int = 2, own=OWN, deeper=DEEPER) -> torch.Tensor:
    """Return what the rule makes of copies; deeper must not change."""
    kept = deeper.clone()
    joined = rule.join(own.clone(), deeper, num_above)
    assert torch.equal(kept, deeper)
    return joined.squeeze(1)


def test_sum():
    assert torch.equal(join(GradientRule()), (OWN + DEEPER).squeeze(1))


def test_equilibrium_is_the_mean_over_the_exits_above():
    # by induction from the last exit: with gradients 6, 3, 9 (shallow to deep) the layers under all
    # of them see the mean, 6
    rule = GradientRule("equilibrium")
    gradients = [torch.full((1, 1, 1), value) for value in (6.0, 3.0, 9.0)]
    below_second = rule.join(gradients[1].clone(), gradients[2], 1)
    assert below_second.item() == pytest.approx(6.0)
    assert rule.join(gradients[0].clone(), below_second, 2).item() == pytest.approx(6.0)
    torch.testing.assert_close(join(rule, 3), (OWN / 4 + DEEPER * 3 / 4).squeeze(1))
    assert torch.equal(join(rule, 0), OWN.squeeze(1)), (
        "above the deepest exit that trains nothing comes from"
    )


def test_balance_of_each_token():
    # norms 5 and 10; 1 and sqrt 2; where one is 0 the other stays
    root = 2**0.5
    expected = torch.tensor([[3.0, 14.0], [-1 + root / 2, 1.0], [1.0, 1.0], [2.0, 1.0]])
    torch.testing.assert_close(join(GradientRule("balance", balance=0.5)), expected)


def test_balance_of_the_micro_batch():
    factor = 3 * (104 / 31) ** 0.5
    torch.testing.assert_close(
        join(GradientRule("balance", True, 3.0)), (factor * OWN + DEEPER).squeeze(1)
    )


def test_projection_of_each_token():
    # the second token opposes: (1, 0) less its part along (-1, 1), which is (0.5, -0.5)
    expected = torch.tensor([[3.0, 14.0], [-0.5, 1.5], [1.0, 1.0], [2.0, 1.0]])
    torch.testing.assert_close(join(GradientRule("project")), expected)


def test_projection_of_the_micro_batch():
    # <own, deeper> = 40 - 1 agrees as a whole
    assert torch.equal(join(GradientRule("project", True)), (OWN + DEEPER).squeeze(1))
    opposed = join(GradientRule("project", True), deeper=-DEEPER)
    torch.testing.assert_close(opposed, (OWN - 39 / 104 * DEEPER - DEEPER).squeeze(1))
    assert abs(((opposed + DEEPER.squeeze(1)) * DEEPER.squeeze(1)).sum()) < 1e-4, (
        "what is left of own has no part along deeper"
    )


@pytest.mark.parametrize("name", GRADIENT_RULES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("zeroed", ["own", "deeper", "both"])
def test_zeros_stay_finite(name, whole, zeroed):
    own = torch.zeros_like(OWN) if zeroed != "deeper" else OWN
    deeper = torch.zeros_like(OWN) if zeroed != "own" else DEEPER
    assert join(GradientRule(name, whole), own=own, deeper=deeper).isfinite().all()


@pytest.mark.parametrize("name", GRADIENT_RULES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_a_common_factor_passes_through(name, whole, dtype):
    generator = torch.Generator().manual_seed(1)
    own, deeper = (torch.randn(7, 3, 64, generator=generator) for _ in range(2))
    exact = join(GradientRule(name, whole), own=own, deeper=deeper)
    for scale in (1.0, 2.0**9):  # a sum of 64 squares of 512 would be infinite in fp16
        half = join(
            GradientRule(name, whole),
            own=(scale * own).to(dtype),
            deeper=(scale * deeper).to(dtype),
        )
        assert half.dtype == dtype
        assert ((half.float() / scale - exact).norm() / exact.norm()).item() < (
            2e-3 if dtype == torch.float16 else 1e-2
        )
