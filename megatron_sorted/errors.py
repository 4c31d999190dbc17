"""Errors that users can correct; each message names the value, the rule and the remedy."""


class SortedError(Exception):
    """The base of every error that a user can correct; commands print it without a traceback."""


class SettingsError(SortedError):
    """A setting has an impossible value, alone or together with others."""


class DataError(SortedError):
    """A data file or tokenizer is missing, damaged or in another format than needed."""


class CheckpointError(SortedError):
    """A checkpoint is missing, incomplete or of a model of other sizes."""


class PlatformError(SortedError):
    """The device, or a library for it, is missing or cannot do what the settings ask."""


class MemoryExhaustedError(SortedError):
    """The requested work does not fit into memory; a smaller amount may."""


class TrainingError(SortedError):
    """Training cannot continue: numbers are not finite, or a rank hangs."""
