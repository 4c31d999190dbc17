"""The one sentence of every check: the rule must hold, or the user is told."""

from megatron_sorted.errors import SettingsError


def require(holds: bool, message: str) -> None:
    """Returns nothing if ``holds``.

    Raises:
        SettingsError: it does not; ``message`` says value, rule and remedy.
    """
    if not holds:
        raise SettingsError(message)


def require_divides(value: int, name: str, by: int, by_name: str, remedy: str) -> None:
    """Returns nothing if ``by`` divides ``value``.

    Raises:
        SettingsError: it does not.
    """
    require(value % by == 0, f"{name}: {value} is not a multiple of {by} ({by_name}). {remedy}")
