"""All error classes, as one tree. Each class has the exit code of the command line.

A message has three parts: what was found and where, what was expected, what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def some_of(names: Sequence[str], most: int = 3, *, more: bool = False) -> str:
    """The first few names, for a message: "a, b, c, ...", or "a, b, c and 7 more"."""
    others = len(names) - most
    return ", ".join(names[:most]) + ("" if others <= 0 else f" and {others} more" if more else ", ...")


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 file", "1,024 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pip_install(packages: Iterable[str]) -> str:
    """The command that installs these packages in supported versions; it does not need smolconv on PyPI."""
    from importlib import metadata

    try:
        wanted = [re.split(r"[\s;]", line)[0] for line in metadata.requires("smolconv") or ()]
    except metadata.PackageNotFoundError:  # a clone that is not installed
        wanted = []
    bounds = {re.split(r"[<>=!~(\[]", each)[0]: each for each in wanted}
    names = [name.replace("_", "-") for name in packages]
    return " ".join(["pip install", *(f"'{bounds[name]}'" if name in bounds else name for name in names)])


class SmolconvError(Exception):
    """The base class. The command line prints the message without a traceback and exits with ``exit_code``."""

    exit_code = 70


class UsageError(SmolconvError):
    """The command cannot be run as given."""

    exit_code = 2


class BadCheckpoint(SmolconvError):
    """The checkpoint is missing, corrupt, contradictory or in a form that smolconv does not read."""

    exit_code = 3


class UnknownLayout(BadCheckpoint):
    """No layout was recognised in the folder."""


class UnsupportedModel(BadCheckpoint):
    """The architecture, or a field of its config, cannot be represented."""


class MissingFile(BadCheckpoint):
    """A file of the checkpoint is missing."""


class MissingShard(MissingFile):
    """The file of a rank or of an index entry is missing."""


class CorruptFile(BadCheckpoint):
    """A file exists, but its bytes do not follow its format."""


class LfsPointer(CorruptFile):
    """The file is a pointer of Git LFS instead of its content."""


class UnsafePickle(BadCheckpoint):
    """A pickle asks for something outside the allow-list. It was not executed."""


class ShapeMismatch(BadCheckpoint):
    """A tensor's shape contradicts the config or the other shards."""


class NameMismatch(BadCheckpoint):
    """Tensor names are missing, unexpected or duplicated."""


class MixedCheckpoint(BadCheckpoint):
    """One checkpoint has files of different formats, steps or topologies."""


class SourceChanged(BadCheckpoint):
    """A file of the source was written to, replaced or removed while it was being read."""


class DigestMismatch(BadCheckpoint):
    """Stored bytes no longer have the digest that was recorded for them."""


class MachineError(SmolconvError):
    """The machine failed: disk full, no permission, no network, no memory."""

    exit_code = 4


class OutputLocked(MachineError):
    """Another process is writing the same target."""


class NotInstalled(SmolconvError):
    """Something that the command needs is not installed."""

    exit_code = 5


class TrainingStopped(SmolconvError):
    """Training stopped itself: non-finite loss, or the start gate failed."""

    exit_code = 6


class StoppedBySignal(SmolconvError):
    """A signal stopped training after a save; the same command resumes from there."""

    exit_code = 75


class StoppedByRequest(StoppedBySignal):
    """`smolconv stop` stopped training after a save."""


class ParityFailed(SmolconvError):
    """Two checkpoints are not the same model."""

    exit_code = 1


class Interrupted(SmolconvError):
    """Ctrl-C, SIGTERM or SIGHUP ended the command."""

    exit_code = 130


class SignalReceived(BaseException):
    """Raised by a signal handler at any point of a command; ``args[0]`` is the signal's name.

    Not a ``SmolconvError``, so that code that handles errors and continues does not catch it.
    """


def first_line(error: BaseException) -> str:
    """The message of another library's error in one line; its class if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
