"""Every exception that this package raises on purpose.

    LlamaAdapterError
    ├── ConfigError         a setting has a value that breaks a rule (also a ValueError)
    ├── DataError           a record or a data file cannot be used
    │   └── TooLongError            a prompt, or it and its answer, do not fit into the base's context
    ├── ModelError          the base model cannot be found or read
    │   └── UnsupportedModelError   its family cannot be adapted
    ├── AdapterError        an adapter on disk or on a model is missing, foreign or of another shape
    │   └── NotWrittenError         a full disk or a forbidden folder; what was there before is kept
    ├── TrainingError       a run cannot start, go on or be resumed
    │   └── Interrupted     Ctrl-C or SIGTERM stopped a run after it was saved (exit code 130)
    └── MissingExtraError   an optional dependency is not installed

Each message is one or two sentences: the value, the rule it breaks, and what to do next.
The command line turns them into that sentence and exit code 2 (130 after Ctrl-C); it never shows their traceback.
"""


class LlamaAdapterError(Exception):
    """Base of all errors raised by llama-adapter; the command line ends with `exit_code`."""

    exit_code = 2


class ConfigError(LlamaAdapterError, ValueError):
    """A setting has a value that breaks a rule."""


class DataError(LlamaAdapterError):
    """A record or a data file cannot be used."""


class TooLongError(DataError):
    """A prompt, or it and its answer, do not fit into the base's context."""


class ModelError(LlamaAdapterError):
    """The base model cannot be found or read."""


class UnsupportedModelError(ModelError):
    """The base model's family cannot be adapted; the message names the family and the reason."""


class AdapterError(LlamaAdapterError):
    """An adapter on disk or on a model is missing, foreign, damaged or of another shape."""


class NotWrittenError(AdapterError):
    """A full disk or a forbidden folder; what was there before is kept."""


class TrainingError(LlamaAdapterError):
    """A run cannot start, go on or be resumed."""


class Interrupted(TrainingError):
    """Ctrl-C or SIGTERM stopped a run after it was saved; the message says how to go on."""

    exit_code = 130


class MissingExtraError(LlamaAdapterError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        what = package if extra is None else f"'llama-adapter[{extra}]'"
        super().__init__(f"{purpose} needs '{package}', which is not installed: pip install {what}.")
