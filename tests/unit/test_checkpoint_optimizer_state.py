"""Where a checkpoint keeps the count of an optimizer's steps."""

from types import SimpleNamespace

from megatron_sorted.checkpoint.sharding.optimizer_state import complete_empty_state


def test_a_count_of_steps_goes_to_the_groups_of_an_adam_that_keeps_it_there():
    """Muon would never increment it, and Megatron requires equal counts of all groups."""
    fused_adam = SimpleNamespace(optimizer=object())
    state = {"param_groups": [{"betas": (0.9, 0.999)}, {"betas": (0.9, 0.999), "step": 7}]}
    complete_empty_state(fused_adam, state, 5)
    assert [group["step"] for group in state["param_groups"]] == [5, 7]
    state = {"param_groups": [{"momentum": 0.95}]}
    complete_empty_state(SimpleNamespace(optimizer=object()), state, 5)
    assert state == {"param_groups": [{"momentum": 0.95}]}
