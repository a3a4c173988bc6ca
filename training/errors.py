"""Every way training can refuse, as one small tree.

Its one rule: a message names the bad value and says what to do. It must not know who raises what.
"""


class TrainingError(Exception):
    """Base of everything the command line reports as one line instead of a traceback."""


class ConfigError(TrainingError, ValueError):
    """A unit, model or run was asked for that does not exist or cannot be."""


class DataError(TrainingError):
    """A data file is missing, damaged, or not the one that was asked for."""


class CheckpointError(TrainingError):
    """A run folder cannot be read, or belongs to another run."""


class DivergedError(TrainingError):
    """The loss stopped being a number."""


class ExportError(TrainingError):
    """A step graph failed a check; no artifact was written."""
