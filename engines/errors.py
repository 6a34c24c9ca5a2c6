"""The one tree of errors: every message says what happened, why, and what to do."""

from __future__ import annotations


class MvlmError(Exception):
    """Base of every error this package raises on purpose; the command line exits with 2."""


class CheckpointError(MvlmError):
    """A checkpoint cannot be read or does not fit the model it claims to be."""


class InputError(MvlmError):
    """An image, a prompt or an argument cannot be used."""


class BundleError(MvlmError):
    """A bundle is missing, damaged, or of a version this package does not read."""


class EngineError(MvlmError):
    """An engine cannot be built or run here."""


class MissingPackageError(MvlmError):
    """An optional package is needed for what was asked; the message says which extra."""


class ParityError(MvlmError):
    """A compiled graph does not agree with PyTorch's; the command line exits with 1."""


class PassError(MvlmError):
    """A graph cannot be rewritten as it must be."""
