"""How benchmarks measure: fresh processes, alternating pairs, a synced disk, and a note of the machine.

Standard library only, and nothing large is ever held here: a child's peak memory starts at what its parent holds.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from smolconv.processes import usable_cores

REPOSITORY = Path(__file__).resolve().parent.parent
_DISKLESS = ("tmpfs", "ramfs")
_NOT_INSTALLED = "(not installed)"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process, from before its start to after its end."""

    seconds: float
    processor_seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Runs of A and of B that took turns."""

    a: tuple[Run, ...]
    b: tuple[Run, ...]

    @property
    def ratio(self) -> float:
        """Median seconds of A by median seconds of B."""
        return median_seconds(self.a) / median_seconds(self.b)

    @property
    def ratios(self) -> list[float]:
        """Of each pair, so that a drift of the machine shows."""
        return [a.seconds / b.seconds for a, b in zip(self.a, self.b)]


class Stopped(RuntimeError):
    """A process that a guard ended, with the guard's reason."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Ends a process, with its children, before it takes the machine's last memory or a disk's last space."""

    folder: Path
    memory_bytes: int = 1_000_000_000
    disk_bytes: int = 3_000_000_000
    every_seconds: float = 0.05

    def reason(self) -> str | None:
        """Why the process must end now, if it must."""
        if available_memory_bytes() < self.memory_bytes:
            return f"out of memory (under {self.memory_bytes / 1e9:.0f} GB of {memory_bytes() / 1e9:.1f} GB left)"
        if shutil.disk_usage(self.folder).free < self.disk_bytes:
            return f"out of disk (under {self.disk_bytes / 1e9:.0f} GB left)"
        return None

    def watch(self, process: subprocess.Popen[bytes], ended: threading.Event, found: list[str]) -> None:
        """Look again and again, until the process has ended or is ended here."""
        while not ended.wait(self.every_seconds):
            if reason := self.reason():
                found.append(reason)
                kill_group(process)
                return


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    then_sync: bool = False,
    folder: Path | None = None,
    guard: Guard | None = None,
) -> Run:
    """Run a process and wait for it, with ``sync`` inside the time when asked for. Its output goes to a file.

    The peak is that of the largest process, where a process starts others. Raises ``RuntimeError`` with the end of the
    output when it fails, and ``Stopped`` when the guard ended it.
    """
    stopped: list[str] = []
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=folder, start_new_session=guard is not None
        )
        ended = threading.Event()
        if guard:
            # Should the kernel run short before the guard sees it, it takes this process and no other one.
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            threading.Thread(target=guard.watch, args=(process, ended, stopped), daemon=True).start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            if guard:  # Ctrl-C does not reach a session of its own
                kill_group(process)
            raise
        finally:
            ended.set()
        process.returncode = os.waitstatus_to_exitcode(status)
        if then_sync:
            subprocess.run(["sync"], check=True)
        seconds = time.perf_counter() - started
        if stopped:
            raise Stopped(f"{stopped[0]} after {seconds:.0f} s")
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return Run(
        seconds=seconds,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * 1024,
    )


def alternate(a: Callable[[], Run], b: Callable[[], Run], pairs: int, done: Callable[[Run, Run], None]) -> Pairs:
    """Measure A and B in turns, first A then B, then B then A: neither always follows the other."""
    found: list[tuple[Run, Run]] = []
    for index in range(pairs):
        if index % 2:
            second = b()
            first = a()
        else:
            first = a()
            second = b()
        found.append((first, second))
        done(first, second)
    return Pairs(a=tuple(first for first, _ in found), b=tuple(second for _, second in found))


def take_turns(
    sides: Mapping[str, Callable[[], Run | None]], counts: Mapping[str, int], done: Callable[[str, Run], None]
) -> dict[str, list[Run]]:
    """Measure several sides in rounds, each round beginning with another side: none always follows the same one.

    A side takes part in the first ``counts[side]`` rounds, and in no further one once it has returned None.
    """
    found: dict[str, list[Run]] = {side: [] for side in sides}
    left = dict(counts)
    for index in range(max(counts.values())):
        order = list(sides)
        first = index % len(order)
        for side in order[first:] + order[:first]:
            if left[side] > index:
                one = sides[side]()
                if one is None:
                    left[side] = 0
                else:
                    found[side].append(one)
                    done(side, one)
    return found


def median_seconds(runs: Sequence[Run]) -> float:
    return statistics.median(each.seconds for each in runs)


def peak_rss_bytes(runs: Sequence[Run]) -> int:
    return max(each.peak_rss_bytes for each in runs)


def warm(folder: Path) -> int:
    """Read every file once, so that it lies in the page cache. Returns the bytes."""
    buffer, total = bytearray(1 << 20), 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
    return total


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stored_bytes(folder: Path) -> int:
    """As they lie on the disk: holes of a file take none."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def remove(folder: Path) -> None:
    """Delete a folder, and wait until the disk has done so."""
    shutil.rmtree(folder, ignore_errors=True)
    sync()


def sync() -> None:
    subprocess.run(["sync"], check=True)


# --- the machine -----------------------------------------------------------------------------------------------------


def file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on, such as ext4."""
    mounts = [line.split() for line in _lines("/proc/mounts")]
    inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    # Of two mounts on one point, the later one hides the other.
    return max(reversed(inside), key=lambda mount: len(mount[1]))[2] if inside else "unknown"


def is_diskless(folder: Path) -> bool:
    return file_system(folder) in _DISKLESS


def memory_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """What a process can still take: free memory, and the page cache that can be given back."""
    line = next(line for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def is_installed(package: str) -> bool:
    return _version(package) != _NOT_INSTALLED


def machine_lines(packages: Sequence[str]) -> list[str]:
    """What the figures belong to, as lines for people."""
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    cores = usable_cores()
    return [
        f"{cores} cores ({processor}), {memory_bytes() / 1e9:.1f} GB RAM, load {os.getloadavg()[0]:.1f} at the start",
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        ", ".join(f"{name} {_version(name)}" for name in packages) + f"; commit {_commit()}",
    ]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _NOT_INSTALLED


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    try:
        code = ("smolconv", "commands", "continual_pretraining")
        changed = " with changes" if git("status", "--porcelain", "--", *code).strip() else ""
        return git("rev-parse", "--short", "HEAD").strip() + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; every column but the first words is right-aligned where its cells are numbers."""
    numeric = [
        bool(rows) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows) for i in range(len(titles))
    ]
    lines = [titles, ["---:" if right else "---" for right in numeric], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, then min..max."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)
