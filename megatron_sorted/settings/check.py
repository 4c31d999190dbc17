"""All rules between settings, checked before any process group starts."""

from megatron_sorted.settings.check_adapters import check_adapters
from megatron_sorted.settings.check_data_parallel import check_data_parallel
from megatron_sorted.settings.check_device import check_device
from megatron_sorted.settings.check_exit_distillation import check_exit_distillation
from megatron_sorted.settings.check_exit_parts import check_exit_parts
from megatron_sorted.settings.check_exit_weighting import check_exit_weighting
from megatron_sorted.settings.check_exits import check_exits
from megatron_sorted.settings.check_files import check_files
from megatron_sorted.settings.check_layout import check_batch, check_interleaving, check_layout, check_recompute
from megatron_sorted.settings.check_model import check_experts, check_model
from megatron_sorted.settings.check_monitoring import check_monitoring
from megatron_sorted.settings.check_numbers import check_numbers
from megatron_sorted.settings.check_profile import check_profile
from megatron_sorted.settings.check_training import check_training
from megatron_sorted.settings.run import Settings


def check_settings(settings: Settings, world_size: int) -> None:
    """Returns nothing if the run can be done by ``world_size`` processes.

    Many rules are those of Megatron-LM's argument check, which the megatron-core package does not contain although its
    schedules and optimizers rely on them.

    Raises:
        SettingsError: a rule is broken; the first one found.
    """
    check_numbers(settings)
    check_model(settings)
    check_exit_weighting(settings)
    check_exit_parts(settings)
    check_exits(settings)
    check_exit_distillation(settings)
    check_adapters(settings)
    check_device(settings)
    check_layout(settings, world_size)
    check_experts(settings, world_size)
    check_batch(settings, world_size)
    check_interleaving(settings, world_size)
    check_recompute(settings)
    check_training(settings)
    check_data_parallel(settings)
    check_files(settings)
    check_monitoring(settings)
    check_profile(settings, world_size)
