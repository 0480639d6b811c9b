"""Starting a run's ranks, watching them, and saying how they ended: here, by torchrun, by DeepSpeed, or in Slurm.

Every rank is the module ``run.worker``. Locally its parent is the launcher. With torchrun, DeepSpeed and Slurm it is
this module, once beside each rank, because those launchers turn every failure into exit code 1. It keeps the log,
passes signals on, and leaves ``logs/ends/ATTEMPT/rank-N.json``.

All of them are started through ``smolconv/bootstrap``: nothing is imported from the folder that the user is in.

An attempt is one start of a run. A second start that meets the first one's lock fails, in the same folder and at the
same time, and neither may take the other's end for its own.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import pty
import re
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from smolconv.continual_pretraining.engine.config import accumulation_steps
from smolconv.continual_pretraining.launchers import slurm
from smolconv.continual_pretraining.recipe.files import load_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.ranks import ATTEMPT
from smolconv.errors import Interrupted, MachineError, SmolconvError, UsageError
from smolconv.processes import EMPTY_FOLDER, module_words, safe_environment, script_words, usable_cores
from smolconv.storage.atomic import appearing_whole

WORKER = "smolconv.continual_pretraining.run.worker"
BESIDE = "smolconv.continual_pretraining.launchers.launch"  #: this module, as it runs beside a rank
SAVED = 75  #: a rank's exit code after a signal and a good save
#: What the others get to end by themselves after a rank has failed, before SIGKILL. A rank that waits for the dead one
#: inside a collective never gets to look at the signal.
GRACE_SECONDS = 15.0
#: torchrun's patience with ranks that were told to stop. Saving may take long; a rank that cannot end because another
#: is dead is killed after GRACE_SECONDS by the process beside it.
_TORCHRUN_PATIENCE_SECONDS = 3600
_TAIL_LINES = 20
_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_KNOWN_CODES = frozenset({2, 3, 4, 5, 6, 70, 130})
_LAUNCHER_PID = "SMOLCONV_LAUNCHER_PID"
_ATTEMPT_FILE = "SMOLCONV_ATTEMPT_FILE"
#: In an attempt's folder of ends: a rank has failed. One file for all to look at, however many ranks there are.
_FAILED = "failed"
#: Variables for other nodes, which DeepSpeed's front end reads: DEEPSPEED_ENVIRONMENT_NAME in launcher/runner.py.
_DEEPSPEED_VARIABLES = ".deepspeed_env"
_KILLED = "the ranks were killed by a second Ctrl-C; checkpoints are as they were."


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many ranks run on how many machines."""

    nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        return ranks if self.nodes == 1 else f"{ranks} ({self.nodes} nodes x {self.ranks_per_node})"


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How a rank ended, and when: the earliest failure is the cause of the others."""

    rank: int
    exit_code: int
    seconds: float  #: since the epoch
    message: str = ""  #: "ErrorClass: what happened"; empty for 0 and 75
    last_lines: tuple[str, ...] = ()  #: of the rank's log, with a message


def placement(recipe: Recipe) -> Placement:
    """Where the recipe's ranks go.

    Raises ``UsageError`` when the launcher cannot place them so, or the step's micro-batches cannot be shared equally.
    """
    given = recipe.launch
    nodes, ranks = given.nodes, given.ranks_per_node
    if given.launcher == "deepspeed" and given.hostfile:
        slots = list(read_hostfile(Path(given.hostfile)).values())
        if nodes > len(slots):
            raise UsageError(f"{given.hostfile} lists {len(slots)} hosts, but {nodes} nodes were asked for.")
        # One node is the default, and a hostfile is written to be used: all its hosts.
        slots = slots[:nodes] if nodes > 1 else slots
        nodes, ranks = len(slots), ranks or slots[0]
        if min(slots) < ranks:
            raise UsageError(
                f"{given.hostfile} has a host with {min(slots)} slots, but {ranks} ranks per node are needed: give "
                "--nproc-per-node at most that."
            )
    elif nodes > 1 and given.launcher in ("local", "deepspeed"):
        needed = "torchrun, deepspeed with a hostfile, or slurm" if given.launcher == "local" else "a --hostfile"
        raise UsageError(f"the {given.launcher} launcher cannot start {nodes} nodes by itself: use {needed}.")
    if given.launcher == "torchrun" and nodes > 1 and not given.rendezvous:
        raise UsageError(
            f"torchrun over {nodes} nodes needs a meeting point: --set launch.rendezvous=HOST:PORT, the same on every "
            "node, with HOST one of them."
        )
    if given.launcher == "slurm":
        asked = given.slurm.gpus_per_node
        ranks = ranks or (1 if asked == 0 else asked)
        if asked and ranks and ranks > asked:
            raise UsageError(
                f"{ranks} ranks per node need a GPU each, but launch.slurm.gpus_per_node is {asked}: leave it out, or "
                "give --nproc-per-node at most that."
            )
    placed = Placement(nodes=nodes, ranks_per_node=ranks or _gpus() or 1)
    accumulation_steps(recipe, placed.world_size)
    return placed


def launch_command(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> list[str]:
    """What the launcher starts on this machine, as words of a shell; for Slurm, what starts one node's ranks."""
    placed = placement(recipe)
    rank = [str(run), "--resume", resume]
    beside = [BESIDE, *rank, *(["--worker", worker] if worker != WORKER else [])]
    launcher = recipe.launch.launcher
    if launcher == "local":
        return module_words(worker, *rank)
    if launcher == "deepspeed":
        # Its front end starts `python -m` itself, and puts its working folder on PYTHONPATH for several nodes. So it
        # works in an empty folder, and the ranks return from there.
        words = module_words("deepspeed.launcher.runner", folder=EMPTY_FOLDER) + _deepspeed_slots(recipe, placed)
        words += ["--master_port", str(_free_port()), "--no_local_rank"]
        words += ["--hostfile", str(Path(recipe.launch.hostfile).absolute())] if recipe.launch.hostfile else []
        return [*words, "--log_level", "error", *script_words(*beside, folder=Path.cwd())]
    words = module_words("torch.distributed.run", "--nnodes", str(placed.nodes))
    words += ["--nproc-per-node", str(placed.ranks_per_node), "--max-restarts", "0"]
    if launcher == "torchrun" and placed.nodes == 1:
        words += ["--standalone"]
    elif launcher == "torchrun":
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(recipe.launch.rendezvous), "--rdzv-id", recipe.name]
    return [*words, *script_words(*beside)]


def _deepspeed_slots(recipe: Recipe, placed: Placement) -> list[str]:
    """How many ranks, or on which GPUs: given a number, DeepSpeed's launcher forgets CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if recipe.launch.hostfile or not visible or not _gpus():
        return ["--num_nodes", str(placed.nodes), "--num_gpus", str(placed.ranks_per_node)]
    devices = visible.replace(" ", "").split(",")[: placed.ranks_per_node]
    if not all(device.isdecimal() for device in devices):
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES is {visible}, but DeepSpeed's launcher knows GPUs by number only. Give numbers, or "
            "take --launcher local or torchrun."
        )
    return ["--include", f"localhost:{','.join(devices)}"]


def batch_script(recipe: Recipe, run: Path, words: Sequence[str]) -> str:
    """The script that Slurm runs, with the words of ``launch_command``."""
    placed = placement(recipe)
    return slurm.batch_script(
        recipe, run, world_size=placed.world_size, ranks_per_node=placed.ranks_per_node, torchrun=words
    )


def launch(recipe: Recipe, run: Path, *, resume: str = "auto", worker: str = WORKER) -> int:
    """Train ``run``, whose ``recipe.resolved.yaml`` is written, to its end; with Slurm, hand it over.

    Returns the exit code: 0, 75 when all ranks stopped after a save, else that of the rank that failed first. What
    happened is on stderr by then. SIGTERM, SIGUSR1, SIGHUP and SIGINT are passed on to the ranks, which save and stop;
    a second SIGINT kills them.
    """
    placed = placement(recipe)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    words = launch_command(recipe, run, resume=resume, worker=worker)
    if recipe.launch.launcher == "slurm":
        print(f"Slurm job {slurm.submit(batch_script(recipe, run, words), run)}", flush=True)
        return 0
    if recipe.launch.launcher != "local":
        return _run_launcher(recipe, run, placed, words)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    size = {"WORLD_SIZE": str(placed.world_size), "LOCAL_WORLD_SIZE": str(placed.ranks_per_node)}
    base = {**rank_environment(recipe, placed.ranks_per_node), **meeting, **size, ATTEMPT: secrets.token_hex(4)}
    environments = {rank: {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(placed.ranks_per_node)}
    return _report(run_ranks(words, environments, run), run, placed.world_size)


def rank_environment(recipe: Recipe, local_world_size: int) -> dict[str, str]:
    """Ours, with the recipe's variables and threads.

    The recipe alone decides the threads: sums on CPU depend on them, and a resumed run shall give the same bits.
    """
    threads = recipe.parallelism.threads or max(1, usable_cores() // local_world_size)
    given = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), **recipe.launch.environment}
    return safe_environment(given)


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host, in the file's order. Its lines are ``host slots=N``, as DeepSpeed and MPI have them."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UsageError(f"the hostfile cannot be read: {error}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", words)
        if not match or match[1] in slots:
            what = f"{match[1]} a second time" if match else repr(words)
            raise UsageError(f"{path}:{number}: found {what}; expected one line `host slots=N` for each host.")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UsageError(f"{path} lists no host. Its lines are `host slots=N`.")
    return slots


@dataclass
class _Rank:
    """A rank's process, from its start until its end is known."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  #: bytes of earlier starts in the log
    attempt: str
    output: int | None = None  #: rank 0: where we read what it writes, to show it and to log it
    log_file: BinaryIO | None = None  #: rank 0: we write it; the others do so themselves
    killed: bool = False  #: by us
    end: RankEnd | None = None

    def pass_through(self) -> bool:
        """Show and log what the rank has written by now; False at its end."""
        if self.output is None or self.log_file is None:
            return False
        try:
            chunk = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:  # a pseudo-terminal's end is EIO
            chunk = b""
        if not chunk:
            return False
        self.log_file.write(chunk)
        _show(chunk)
        return True


def run_ranks(
    words: Sequence[str],
    environments: Mapping[int, Mapping[str, str]],
    run: Path,
    *,
    abandoned: Callable[[bool], bool] = lambda stopping: False,
) -> list[RankEnd]:
    """Run one process a rank until all have ended, and say how; ranks that we had to kill are left out.

    When one fails the others get SIGTERM, and SIGKILL after ``GRACE_SECONDS``. ``abandoned`` is asked about once a
    second whether the ranks shall end for a reason of its own; its argument says whether they were told to stop.
    Must be called in the main thread, since it takes signals.
    """
    with _signals() as (wakeup, received), selectors.DefaultSelector() as selector:
        selector.register(wakeup, selectors.EVENT_READ)
        ranks = [_start(words, environment, number, run) for number, environment in environments.items()]
        by_output = {rank.output: rank for rank in ranks if rank.output is not None}
        for output in by_output:
            selector.register(output, selectors.EVENT_READ)
        stopping, deadline = False, float("inf")
        try:
            while running := [rank for rank in ranks if rank.process.returncode is None]:
                for key, _ in selector.select(timeout=min(1.0, max(0.0, deadline - time.monotonic()))):
                    if key.fd == wakeup:
                        os.read(wakeup, 1 << 10)
                    elif not by_output[key.fd].pass_through():
                        selector.unregister(key.fd)
                for signum in _take(received):
                    if signum == signal.SIGWINCH:
                        for output in by_output:
                            _copy_window_size(output)
                    elif not stopping:
                        stopping = True
                        if 0 in environments and _LAUNCHER_PID not in os.environ:
                            _tell_stopping(signum)
                        # A worker listens to SIGTERM and SIGUSR1; what Ctrl-C means is ours to say.
                        _send(running, signal.SIGUSR1 if signum == signal.SIGUSR1 else signal.SIGTERM)
                    elif signum == signal.SIGINT:
                        _kill(running)
                        raise Interrupted(_KILLED)
                for rank in running:
                    if rank.process.poll() is not None:
                        while rank.pass_through():
                            pass
                        rank.end = _end(rank, run)
                ends = [rank.end for rank in ranks if rank.end and rank.end.exit_code]
                if deadline == float("inf") and (ends or abandoned(stopping)):
                    deadline = time.monotonic() + GRACE_SECONDS
                    # Ranks that have saved are closing, and no longer listen.
                    if not all(end.exit_code == SAVED for end in ends) or not ends:
                        _send(running, signal.SIGTERM)
                elif time.monotonic() >= deadline:
                    _kill(running)
        finally:
            _kill([rank for rank in ranks if rank.process.poll() is None])
            for rank in ranks:
                if rank.output is not None and rank.log_file is not None:
                    os.close(rank.output)
                    rank.log_file.close()
    return [rank.end for rank in ranks if rank.end and not rank.killed]


def _start(words: Sequence[str], environment: Mapping[str, str], number: int, run: Path) -> _Rank:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    _failure_file(run, number).unlink(missing_ok=True)  # of an earlier start
    path = run / "logs" / f"rank-{number:05d}.log"
    log = path.open("ab", buffering=0)
    start = log.tell()
    ours, theirs = _open_output() if number == 0 else (None, log.fileno())
    try:
        # Ctrl-C in a terminal goes to its whole process group: a session of their own keeps the ranks out of it.
        process = subprocess.Popen(
            words, env=dict(environment), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=_die_with_us(signal.SIGKILL),  # noqa: PLW1509 - no threads here
        )  # fmt: skip
    except OSError as error:
        raise MachineError(f"rank {number} could not be started: {error}") from error
    finally:
        if ours is None:
            log.close()
        else:
            os.close(theirs)
    return _Rank(number, process, path, start, environment.get(ATTEMPT, ""), ours, None if ours is None else log)


def _open_output() -> tuple[int, int]:
    """Rank 0's output: a pseudo-terminal when ours is a terminal, so that its progress bars show; else a pipe."""
    if not os.isatty(2):
        ours, theirs = os.pipe()
    else:
        ours, theirs = pty.openpty()
        tty.setraw(theirs)  # bytes come as they are written; the user's own terminal interprets them
        _copy_window_size(ours)
    os.set_blocking(ours, False)
    return ours, theirs


def _copy_window_size(terminal: int) -> None:
    with suppress(OSError):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, fcntl.ioctl(2, termios.TIOCGWINSZ, bytes(8)))


def _die_with_us(signum: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: the kernel sends ``signum`` to the child when we end, even by SIGKILL."""
    ours, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signum))
        if os.getppid() != ours:  # we ended before the kernel knew
            os._exit(1)

    return before_exec


@contextmanager
def _signals() -> Iterator[tuple[int, list[int]]]:
    """Signals as a list, and a file descriptor that wakes a ``select`` when one has come, a child's end included."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGCHLD:
            received.append(signum)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
    wanted = {*_STOPS, signal.SIGCHLD, signal.SIGWINCH} - ignored
    handlers = {signum: signal.signal(signum, note) for signum in wanted}
    try:
        yield reading, received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def _take(received: list[int]) -> list[int]:
    taken = received[:]
    del received[: len(taken)]
    return taken


def _send(ranks: Sequence[_Rank], signum: signal.Signals) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(signum)


def _kill(ranks: Sequence[_Rank]) -> None:
    """SIGKILL for the ranks and the processes that they have started."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.killed = True
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()


def _end(rank: _Rank, run: Path) -> RankEnd:
    """How the rank ended, from its process and the failure file that it may have left."""
    code, now = rank.process.returncode, time.time()
    if code in (0, SAVED):
        return RankEnd(rank=rank.number, exit_code=code, seconds=now)
    path = _failure_file(run, rank.number)
    try:
        failure = json.loads(path.read_text())
        if failure["attempt"] != rank.attempt:
            raise ValueError("another start's")
        code, now = int(failure["exit_code"]), path.stat().st_mtime
        text = f"{failure['error']}: {failure['message']}"
    except (OSError, ValueError, KeyError, TypeError):  # it had no time to write one
        # Whoever sent it: Slurm signals every process of a task, ours perhaps after the rank.
        if code < 0 and -code in _STOPS:
            text = "Interrupted: stopped by a signal while it was starting; checkpoints are as they were."
            code = Interrupted.exit_code
        elif code < 0:
            text = f"MachineError: killed by {_signal_name(-code)}."
            text += " Often that is for want of memory: `dmesg` says so." if -code == signal.SIGKILL else ""
            # Its peers' failure files are stamped by a clock that lags by up to 10 ms, and its own death was seen late.
            code, now = MachineError.exit_code, now - 0.1
        else:
            text = f"ended with exit code {code}."
            code = code if code in _KNOWN_CODES else SmolconvError.exit_code
    lines = tuple(_last_lines(rank.log, rank.log_start))
    return RankEnd(rank=rank.number, exit_code=code, seconds=now, message=text, last_lines=lines)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_failure(ends: Sequence[RankEnd]) -> RankEnd | None:
    """The failure that came first; without any, a rank that saved and stopped; None when all are done.

    A start that was stopped by a signal comes first where it came first: its peers then fail for want of it.
    """
    failed = [end for end in ends if end.exit_code not in (0, SAVED, Interrupted.exit_code)]
    saved = [end for end in ends if end.exit_code == SAVED]  # then all have: they save together
    stopped = [end for end in ends if end.exit_code == Interrupted.exit_code]
    return min([*failed, *stopped] if failed else saved or stopped, key=lambda end: end.seconds, default=None)


def _report(ends: Sequence[RankEnd], run: Path, world_size: int, *, shown: bool = False) -> int:
    """Say on stderr how the run ended, when not well, and return its exit code.

    ``shown``: the failing rank's last lines have been shown by the process beside it.
    """
    end = _first_failure(ends)
    if end is None:
        return 0
    if end.exit_code == SAVED:
        _tell(f"stopped after a save; the same command goes on from there ({run}).")
        return SAVED
    log = run / "logs" / f"rank-{end.rank:05d}.log"
    if end.last_lines and end.rank != 0 and not shown:  # rank 0's were passed through
        _tell("\n".join([f"the last lines of {log}:", *(f"  {line}" for line in end.last_lines)]))
    _tell(f"rank {end.rank} of {world_size} failed first: {end.message}\nIts log: {log}")
    return end.exit_code


def _last_lines(log: Path, start: int) -> list[str]:
    """The log's end, without what earlier starts wrote before ``start``."""
    with suppress(OSError), log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - (1 << 16)))
        return [line[:1000] for line in file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]]
    return []


def _tell_stopping(signum: int) -> None:
    more = " A second Ctrl-C kills them." if signum == signal.SIGINT else ""
    _tell(f"{signal.Signals(signum).name}: the ranks save and stop.{more}")


def _tell(text: str) -> None:
    _show(f"{text}\n".encode())


def _show(chunk: bytes) -> None:
    """Bytes to stderr. Nobody listening any more is no reason to end a run: its logs go on."""
    with suppress(OSError):
        while chunk:
            chunk = chunk[os.write(2, chunk) :]


def _failure_file(run: Path, rank: int) -> Path:
    return run / "logs" / f"failure-rank-{rank:05d}.json"


def _ends_folder(run: Path, attempt: str) -> Path:
    return run / "logs" / "ends" / attempt


def _leave_end(folder: Path, end: RankEnd) -> bool:
    """Write down how the rank ended, for its launcher; False when another of its attempt has failed before it."""
    path = folder / f"rank-{end.rank:05d}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with appearing_whole(path) as part:
            part.write_text(json.dumps(asdict(end)))
        if end.exit_code not in (0, SAVED):
            (folder / _FAILED).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # the disk may be what failed; it is said on stderr all the same
    return True


def _read_ends(folder: Path) -> list[RankEnd]:
    """The ends that the ranks of one attempt left."""
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            document = json.loads(path.read_text())
            found.append(RankEnd(**{**document, "last_lines": tuple(document["last_lines"])}))
    return found


def _gpus() -> int:
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0  # without the seconds that torch takes to import
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# torchrun, DeepSpeed, Slurm


def _run_launcher(recipe: Recipe, run: Path, placed: Placement, words: Sequence[str]) -> int:
    """Run torchrun or DeepSpeed's launcher on this machine, and tell from the ranks' own files how it went."""
    attempt = secrets.token_hex(4)
    environment = {
        **rank_environment(recipe, placed.ranks_per_node),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_TORCHRUN_PATIENCE_SECONDS),
        _LAUNCHER_PID: str(os.getpid()),
    }
    deepspeed = recipe.launch.launcher == "deepspeed"
    if deepspeed and Path(_DEEPSPEED_VARIABLES).is_file():  # looked for in the working folder, which is another there
        environment.setdefault("DS_ENV_FILE", os.path.abspath(_DEEPSPEED_VARIABLES))
    with tempfile.TemporaryDirectory() as private, _signals() as (wakeup, received):
        told = Path(private) / "attempt"
        if deepspeed or placed.nodes == 1:
            words = [*words, "--attempt", attempt]
        else:  # each node has a launcher of its own: the ranks tell it what they have in common
            environment[_ATTEMPT_FILE] = str(told)
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=_die_with_us(signal.SIGTERM),  # noqa: PLW1509
        )  # fmt: skip
        stopping = False
        os.set_blocking(wakeup, True)
        while process.poll() is None:
            os.read(wakeup, 1 << 10)
            for signum in _take(received):
                if signum in _STOPS and not stopping:
                    stopping = True
                    _tell_stopping(signum)
                    # Both know SIGTERM only, and DeepSpeed's front end does not pass it on to its own child.
                    (os.killpg if deepspeed else os.kill)(process.pid, signal.SIGTERM)
                elif signum == signal.SIGINT:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    raise Interrupted(_KILLED)
        if told.exists():
            attempt = told.read_text()
    # DeepSpeed's front end may be gone before its ranks have ended, for which its launcher gives them 30 seconds.
    patience = time.monotonic() + 40
    while deepspeed and _group_lives(process.pid) and time.monotonic() < patience:
        time.sleep(0.1)
    return _outcome(_read_ends(_ends_folder(run, attempt)), run, placed.world_size, process.returncode)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _outcome(ends: Sequence[RankEnd], run: Path, world_size: int, status: int) -> int:
    if status and not any(end.exit_code for end in ends):
        _tell(f"MachineError: the launcher ended with status {status}, and no rank said why. See {run / 'logs'}.")
        return MachineError.exit_code
    return _report(ends, run, world_size, shown=True)


def _meeting_point() -> str:
    """What all ranks of a start have in common, and no other start at the same time: where they meet."""
    return f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"


def _beside_a_rank(run: Path, resume: str, worker: str, attempt: str) -> int:
    """Run the one rank that the environment names, as torchrun, DeepSpeed or Slurm has set it."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ["LOCAL_SIZE"]  # the latter is DeepSpeed's
    launcher = int(os.environ.get(_LAUNCHER_PID, "0"))
    _die_with(os.getppid())
    if _ATTEMPT_FILE in os.environ:
        Path(os.environ[_ATTEMPT_FILE]).write_text(attempt)
    recipe = load_recipe(run / "recipe.resolved.yaml")
    folder, leads = _ends_folder(run, attempt), os.environ["LOCAL_RANK"] == "0"

    def abandoned(stopping: bool) -> bool:
        if launcher and not _lives(launcher):
            return True
        # One rank of a node looks, and torchrun ends the node's others when that one ends. Once it has told its ranks
        # to stop, torchrun waits for each of them, so each looks for itself. os.path: an error is no "yes".
        return (leads or stopping) and os.path.exists(folder / _FAILED)

    own = {"LOCAL_WORLD_SIZE": local_world_size, ATTEMPT: attempt}
    environment = {**rank_environment(recipe, int(local_world_size)), **own}
    words = module_words(worker, str(run), "--resume", resume)
    ends = run_ranks(words, {rank: environment}, run, abandoned=abandoned)
    if not ends:  # we had to kill it, so another has the reason
        return SmolconvError.exit_code
    first = _leave_end(folder, ends[0])
    if ends[0].exit_code == SAVED:
        return 0  # else torchrun and DeepSpeed would end the ranks that are still closing
    return _report(ends, run, world_size) if first else ends[0].exit_code


def _run_and_exit() -> None:
    try:
        sys.exit(main())
    except SmolconvError as error:
        _tell(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, but its parent has not looked yet


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit(SmolconvError.exit_code)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {BESIDE}", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--worker", default=WORKER, help=argparse.SUPPRESS)
    parser.add_argument("--attempt", help="what the files of this start are told apart by from another's")
    parser.add_argument("--outcome", type=int, metavar="STATUS", help="say how ranks ended whose launcher left STATUS")
    parser.add_argument("--world-size", type=int, default=1, help="for --outcome")
    given = parser.parse_args()
    attempt = given.attempt or _meeting_point()
    if given.outcome is not None:
        return _outcome(_read_ends(_ends_folder(given.run, attempt)), given.run, given.world_size, given.outcome)
    return _beside_a_rank(given.run, given.resume, given.worker, attempt)


if __name__ == "__main__":
    _run_and_exit()
