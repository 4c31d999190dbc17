"""What may change between a checkpoint and the run that resumes from it."""

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sorted.checkpoint.candidates import Candidate
from megatron_sorted.settings.load import settings_as_dict
from megatron_sorted.settings.run import Settings
from megatron_sorted.training.run.resume import SILENT, changed_settings, loaded_line, set_schedule

RUN = Settings(train_iters=100, exit_layer_nums=(2, 4), save="a", wandb_project="p")


def test_only_settings_that_affect_training_are_listed(tmp_path):
    saved = settings_as_dict(RUN)
    assert changed_settings(saved, RUN) == []
    other = Settings(
        train_iters=200,
        exit_layer_nums=(2, 6),
        lr=1e-3,
        save="b",
        log_interval=1,
        profile=True,
        tensor_model_parallel_size=2,
    )
    assert set(changed_settings(saved, other)) == {
        "train-iters 100 -> 200",
        "exit-layer-nums 2,4 -> 2,6",
        "lr 0.0003 -> 0.001",
        "tensor-model-parallel-size 1 -> 2",
    }
    candidate = Candidate(
        tmp_path / "iter_0000005", {"progress": {"step": 5, "samples": 40}, "settings": saved}
    )
    assert loaded_line(candidate, RUN, 2.5e-4) == (
        f"loaded {tmp_path}/iter_0000005: step 5, 40 samples consumed, learning rate 2.500e-04; "
        f"nothing changed"
    )
    assert loaded_line(candidate, Settings(**{**vars(RUN), "lr": 1.0}), 2.5e-4).endswith(
        "; changed: lr 0.0003 -> 1.0"
    )


def test_names_of_silent_settings_exist():
    assert set(settings_as_dict(RUN)) >= SILENT


class _Optimizer:
    """An optimizer, as far as Megatron's schedule needs one."""

    def __init__(self):
        self.param_groups = [
            {
                "lr": 0.0,
                "max_lr": 1.0,
                "min_lr": 0.0,
                "weight_decay": 0.0,
                "lr_mult": 1.0,
                "wd_mult": 1.0,
            }
        ]


def make_schedule(samples_a_step, steps=100):
    return OptimizerParamScheduler(
        _Optimizer(),
        init_lr=0.0,
        max_lr=1.0,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_style="linear",
        lr_decay_steps=steps * samples_a_step,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


@pytest.mark.parametrize("samples_now", [8, 16, 4])
def test_the_learning_rate_follows_steps_whatever_the_batch_size(samples_now):
    before = make_schedule(8)
    for _ in range(40):
        before.step(increment=8)
    after = make_schedule(samples_now)
    set_schedule(after, before.state_dict(), 8, samples_now)
    assert before.optimizer.param_groups[0]["lr"] == pytest.approx(0.6)
    assert after.optimizer.param_groups[0]["lr"] == pytest.approx(0.6)
    after.step(increment=samples_now)
    assert after.optimizer.param_groups[0]["lr"] == pytest.approx(0.59)
