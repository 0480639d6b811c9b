"""The console script: turns every error into a few lines on stderr and the exit code of docs/cli.md."""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from typer import rich_utils

# numpy's BLAS would start a thread per core on import, for matrix products that no command needs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from smolconv.commands import (  # noqa: F401  (they register themselves)
    console,
    continue_train,
    convert,
    data,
    diff,
    doctor,
    evaluate,
    import_gguf,
    inspect,
    plan,
    plot,
    publish,
    recipe,
    runs,
    tokenize,
    verify,
)
from smolconv.commands.app import app
from smolconv.errors import Interrupted, SignalReceived, SmolconvError
from smolconv.hub.address import require_known


def main() -> None:
    """Run the app and end the process with its exit code."""
    console.prepare_streams()
    _listen()
    try:
        _refuse_other_addresses(sys.argv[1:])
        # Not standalone, so that usage errors are printed here, like all others.
        code = app(_common_first(sys.argv[1:]), standalone_mode=False)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):  # a library gave up: its code means something else
            _stop(error, 70, f"unexpected exit of a library, {error.code}\nRepeat with --debug to see which.")
        code = 0  # the reader of a help text has closed stdout, where rich exits
    except SignalReceived as error:
        _stop(error, Interrupted.exit_code, f"Interrupted: stopped by {error.args[0]}. {_left(sys.argv[1:])}")
    except SmolconvError as error:
        _stop(error, error.exit_code, f"{type(error).__name__}: {error}")
    except BrokenPipeError:
        # The reader of stdout has closed it. Python would report that again while it flushes stdout.
        console.discard_output()
        sys.exit(0)
    except MemoryError as error:
        _stop(error, 4, "MachineError: out of memory. Try fewer --workers or a smaller --max-memory.")
    except OSError as error:
        # No file system has room for such a name: the words or the document that give it are wrong, not the machine.
        name, code = ("UsageError", 2) if error.errno == errno.ENAMETOOLONG else ("MachineError", 4)
        _stop(error, code, f"{name}: {_told(error)}\n{_advice(error)}")
    except Exception as error:
        if hasattr(error, "format_message"):  # a click error; newer versions of Typer bundle click
            _usage(error)
        _stop(error, 70, f"unexpected {type(error).__name__}: {error}\nThis is a bug of smolconv. Repeat with --debug.")
    sys.exit(code)


def _refuse_other_addresses(words: list[str]) -> None:
    """Raise ``UsageError`` for an address that no command can open, before it becomes a local path."""
    for word in words[: words.index("--")] if "--" in words else words:
        if "://" in word:
            require_known(word)


def _common_first(words: list[str]) -> list[str]:
    """Move the common options to the front, where Typer expects them, from anywhere in the command."""
    end = words.index("--") if "--" in words else len(words)
    common = [word for word in words[:end] if word in ("-q", "--quiet", "-v", "--verbose", "--debug")]
    return common + [word for word in words[:end] if word not in common] + words[end:]


#: Longest line of an error.
MOST_LETTERS = 1000
#: Signals that end a command in order. A second Ctrl-C ends it at once, which loses nothing either.
_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP (the terminal was closed)"}


def _listen() -> None:
    own = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        if os.getpid() != own:  # a forked child process, which its parent ends
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        raise SignalReceived(_SIGNALS[signal.Signals(signum)])

    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)


def _left(words: list[str]) -> str:
    """What remains after a command that was not writing an output folder at that moment."""
    command = next((word for word in words if not word.startswith("-")), "")
    if command in ("verify", "inspect", "diff", "doctor", "runs", "evaluate"):
        return "Nothing was written. Repeat the command to start again."
    return "Finished parts are kept. Repeat the command to continue."


def _told(error: OSError) -> str:
    """The file and the system's message, in a line of limited length."""
    names = [f"{name!s:.300}" for name in (error.filename, error.filename2) if name is not None]
    return f"{' and '.join(names) or 'a file or a connection'}: {error.strerror or error!s:.300}."


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free some space and repeat the command. What convert has written is kept for --resume."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return "Make it accessible, or choose another place."
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR):
        return "Check the path."
    return "Expected files and folders that can be read and written: check the disk, and repeat the command."


def _usage(error: Any) -> NoReturn:
    """Print a usage error in Typer's box."""
    try:
        rich_utils.rich_format_error(error)
    except (OSError, SystemExit):  # nobody reads stderr
        console.discard_output(2)
    _tell_scripts("UsageError", error.exit_code, error.format_message())
    sys.exit(error.exit_code)


def _stop(error: BaseException, code: int, text: str) -> NoReturn:
    if console.settings.debug:
        import traceback

        console.tell("".join(traceback.format_exception(error)).rstrip("\n"))
    text = "\n".join(map(_short, console.printable(text).split("\n")))
    console.tell(text)
    name, _, message = text.partition(": ")
    _tell_scripts(name, code, message)
    sys.exit(code)


def _short(line: str) -> str:
    """A line that a terminal can show, whatever a file put in it, such as a shape of 20,000 numbers."""
    over = len(line) - MOST_LETTERS
    return line if over <= 0 else f"{line[: MOST_LETTERS - 100]} ... ({over:,} letters) ... {line[-100:]}"


def _tell_scripts(name: str, code: int, message: str) -> None:
    """Print a failure as a JSON document for --json: what happened, then what to do."""
    if "--json" in sys.argv[1:]:
        first, _, advice = message.partition("\n")
        error = {"class": name, "exit_code": code, "message": first, "advice": advice}
        try:
            console.print_json({"schema": 1, "error": error})
        except OSError:  # a full disk, which may be the failure itself
            console.discard_output()


if __name__ == "__main__":
    main()
