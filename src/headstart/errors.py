"""What can go wrong that a user can mend. Every message names the file, the place and what was expected."""

from __future__ import annotations


class HeadstartError(Exception):
    """Base of all errors the command line prints as one message, without a traceback."""


class DataError(HeadstartError):
    """Images, annotations or proposals are not what they should be."""


class ImageError(DataError):
    """One image can't be used. Callers skip it, count it and name it; they do not stop for it."""


class SettingsError(HeadstartError):
    """A setting is unknown, or its value is out of range."""


class RunError(HeadstartError):
    """A run folder can't be used as asked: it exists, is incomplete, or belongs to another configuration."""


class TrainingError(HeadstartError):
    """Training had to stop, for example because the loss is no longer finite."""


class WeightsError(HeadstartError):
    """A weights file can't be read safely or does not fit the detector."""
