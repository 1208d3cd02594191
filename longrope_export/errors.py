"""Every error that a user can cause, in one tree.

LongRopeError                   one clear line on stderr, exit 1
├── InputFileError              a file is missing, truncated, malformed or not what it should be
├── ScalingError                a `RopeScaling` record (or a value for one) is not valid
├── UnsupportedModelError       the architecture, rope type or layout is known not to work here
├── LossyTargetError            the target cannot express the record and --allow-lossy was not given
├── OutputError                 the output exists already, the disk is full, the folder is not writable
├── MissingDependencyError      an optional package is needed for this command
├── TextTooShortError           the given texts do not reach the asked length
├── RuntimeFailure              an external runtime (llama.cpp) crashed or refused the file
├── CacheError                  a KV cache cannot be kept exact when its sequence passes the window
├── StaleStateError             saved state was made with another model, data or version
└── NumericalError              NaN or infinite results where finite ones are needed

Each message says what happened, where, and what to do next. Anything else that is raised is a bug and keeps its
traceback.
"""


class LongRopeError(Exception):
    """Base of all errors that are the input's or the environment's fault, not a bug's."""


class InputFileError(LongRopeError):
    """A file is missing, truncated, malformed or of another kind than expected."""


class ScalingError(LongRopeError, ValueError):
    """A `RopeScaling` record, or a value for one, is not valid."""


class UnsupportedModelError(LongRopeError):
    """The architecture, rope type or layout is refused by name."""


class LossyTargetError(LongRopeError):
    """The target cannot express the record, and the loss was not allowed."""


class OutputError(LongRopeError):
    """The output cannot be written: it exists, the disk is full, or permission is missing."""


class MissingDependencyError(LongRopeError):
    """An optional package is needed for this command."""


class TextTooShortError(LongRopeError):
    """The given texts do not reach the asked length."""


class RuntimeFailure(LongRopeError):
    """An external runtime crashed or refused the file."""


class CacheError(LongRopeError):
    """A KV cache cannot be kept exact when its sequence passes the window."""


class StaleStateError(LongRopeError):
    """Saved state belongs to another model, data set or version."""


class NumericalError(LongRopeError):
    """A result is NaN or infinite."""


class RecipeError(LongRopeError):
    """A recipe that cannot be followed: an unknown key, a missing stage, or lengths that do not fit the model."""
