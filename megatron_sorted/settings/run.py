"""All settings of one run in one flat class."""

from dataclasses import dataclass

from megatron_sorted.settings.averaging import AveragingSettings
from megatron_sorted.settings.exit_distillation import ExitDistillationSettings
from megatron_sorted.settings.exit_parts import ExitPartSettings
from megatron_sorted.settings.exit_weighting import ExitWeightingSettings
from megatron_sorted.settings.exits import ExitSettings
from megatron_sorted.settings.files import FileSettings
from megatron_sorted.settings.lora import LoraSettings
from megatron_sorted.settings.model import ModelSettings
from megatron_sorted.settings.monitoring import MonitoringSettings
from megatron_sorted.settings.muon import MuonSettings
from megatron_sorted.settings.parallel import ParallelSettings
from megatron_sorted.settings.rope import RopeSettings
from megatron_sorted.settings.training import TrainingSettings


@dataclass(frozen=True)
class Settings(
    MonitoringSettings,
    FileSettings,
    AveragingSettings,
    MuonSettings,
    TrainingSettings,
    ParallelSettings,
    LoraSettings,
    ExitDistillationSettings,
    ExitPartSettings,
    ExitWeightingSettings,
    ExitSettings,
    RopeSettings,
    ModelSettings,
):
    """Every field of a run. One name per field: dataclass field, ``--flag`` and YAML key."""
