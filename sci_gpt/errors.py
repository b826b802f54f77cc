"""Errors by who must act: the writer of a configuration, the owner of data, or the owner of a checkpoint."""


class SciGptError(Exception):
    """An error with a message for a person: what was expected, what came, where, and what to do (exit code 2)."""


class ConfigError(SciGptError):
    """The configuration or the command line must change."""


class DataError(SciGptError):
    """A file, a unit, a split or a store must change."""


class CheckpointError(SciGptError):
    """A checkpoint is missing, torn or belongs to other data or another model."""


class DamagedCheckpoint(CheckpointError):
    """A file of a committed checkpoint is gone or is not what was written: another checkpoint must do."""


class UnlikeTrainingWarning(UserWarning):
    """A forecast is given, but the input is unlike everything that the model was trained on; the message says how."""
