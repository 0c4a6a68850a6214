"""The exceptions that ftk raises on purpose, and the exit code of each.

    FtkError                    1   never raised itself
     ├─ NoProgress              1   a run on several processes ended twice at one step in the same way
     ├─ ProcessFailed           -   another process of the run failed; the exit code is that of its error
     ├─ ConfigError             2   the YAML file, --set or an option is wrong
     ├─ SourceError             2   the images or captions that were named cannot be used
     │   └─ TooManyRejects      3   more inputs were rejected than the configuration allows
     ├─ DatasetError            2   a prepared dataset is missing, damaged or of another version
     ├─ CacheError              2   a cache is missing, damaged, or made with something else
     ├─ ModelError              2   a model folder or Hub id is not what the family needs
     ├─ CheckpointError         2   a checkpoint is damaged, or the run's settings no longer match it
     ├─ TrainingError           2   the training itself went wrong (a loss that is not finite)
     ├─ EnvironmentFault        4   disk, memory, lock or network
     └─ Preempted              75   stopped by a signal after saving; the same command resumes
         └─ ProcessLost        75   another process of the run has ended, or does not answer

A message says what is wrong, where, what was found, and what to do. The command line prints it without a traceback
(`--log-level debug` shows one). A bad image raises nothing: it becomes a counted reject with a reason.
"""

from collections.abc import Iterable

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "EnvironmentFault",
    "FtkError",
    "ModelError",
    "NoProgress",
    "Preempted",
    "ProcessFailed",
    "ProcessLost",
    "SourceError",
    "TooManyRejects",
    "TrainingError",
    "did_you_mean",
]


class FtkError(Exception):
    """Root of every error that ftk raises on purpose."""

    exit_code = 1


class ConfigError(FtkError):
    """The configuration file, a `--set` or an option is wrong."""

    exit_code = 2


class SourceError(FtkError):
    """The named images or captions cannot be used."""

    exit_code = 2


class TooManyRejects(SourceError):
    """More inputs were rejected, or unreachable, than the configuration allows; what was good is kept."""

    exit_code = 3


class DatasetError(FtkError):
    """A prepared dataset is missing, damaged, or of another schema version."""

    exit_code = 2


class CacheError(FtkError):
    """A cache is missing, damaged, or was made with something else than what is asked for."""

    exit_code = 2


class ModelError(FtkError):
    """A model folder or Hub id is not what the family needs."""

    exit_code = 2


class CheckpointError(FtkError):
    """A checkpoint is damaged, or the run's settings no longer match it."""

    exit_code = 2


class TrainingError(FtkError):
    """The training itself went wrong."""

    exit_code = 2


class EnvironmentFault(FtkError):
    """Disk, memory, lock or network: nothing that the configuration could mend."""

    exit_code = 4


class Preempted(FtkError):
    """Stopped by a signal after a checkpoint; the same command resumes."""

    exit_code = 75


class ProcessLost(Preempted):
    """Another process of the run has ended, or does not answer; the same command resumes from the last checkpoint."""


class ProcessFailed(FtkError):
    """Another process of the run failed, and has said why.

    Args:
        exit_code: of its error. All processes end with it, so that whoever looks at one of them knows whether to try again.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NoProgress(FtkError):
    """A run on several processes ended twice at one step in the same way: trying again would not help."""

    exit_code = 1


def did_you_mean(given: str, valid: Iterable[str], folder: str = ".") -> str:
    """The sentence that names the valid word nearest to a misspelt one, with a space in front; empty when none is near.

    Args:
        folder: where files of these names lie; the nearest one is named with it.
    """
    import difflib  # here, because almost no run of a command needs it

    near = difflib.get_close_matches(given, list(valid), n=1)
    place = "" if folder == "." else f"{folder.rstrip('/')}/"
    return f" Did you mean `{place}{near[0]}`?" if near else ""
