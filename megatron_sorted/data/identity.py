"""What the training data are, so that a resumed run can tell whether they changed."""


def data_identity(settings) -> dict:
    """Returns nothing yet."""
    return {}


def describe_changes(saved: dict, now: dict) -> list[str]:
    """Returns nothing yet."""
    return []
