"""Errors a user can cause. Each message says the value, the rule it breaks and the remedy."""


class SortedError(Exception):
    """Base of every error that is a user's to mend; entry points print it without a traceback."""


class SettingsError(SortedError):
    """A setting has a value that cannot be, alone or beside the others."""


class DataError(SortedError):
    """A data file or tokenizer is missing, damaged or of another shape than needed."""


class CheckpointError(SortedError):
    """A checkpoint is missing, incomplete or made with other sizes."""


class PlatformError(SortedError):
    """The device, or a library for it, is missing or cannot do what the settings ask."""


class MemoryExhaustedError(SortedError):
    """What is asked for does not fit into memory; something smaller may."""


class TrainingError(SortedError):
    """Training cannot go on: numbers that are not finite, or a rank that hangs."""
