"""Rules of the recording by torch.profiler."""

from megatron_sorted.settings.require import require
from megatron_sorted.settings.run import Settings


def check_profile(settings: Settings, world_size: int) -> None:
    """Returns nothing if a recording that is asked for has steps, processes and a place.

    Raises:
        SettingsError: it does not.
    """
    if not settings.profile:
        return
    start, end = settings.profile_step_start, settings.profile_step_end
    require(end > max(start, 1), f"--profile-step-end: {end} is not above --profile-step-start {start}, so no step is recorded. Raise it.")
    require(bool(settings.profile_ranks), "--profile-ranks: nobody records. Name a rank or leave --profile out.")
    for rank in settings.profile_ranks:
        require(0 <= rank < world_size, f"--profile-ranks: {rank} is not one of the {world_size} processes. Use 0..{world_size - 1}.")
    require(
        settings.profile_dir is not None or settings.save is not None,
        "--profile: nowhere to write. Give --profile-dir or --save, or leave it out.",
    )
