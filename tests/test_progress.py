"""Work that takes seconds shows how far it is, on a terminal and nowhere else, and what it tells adds up to the whole."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import convert, nanotron_topologies

from smolconv import doctor
from smolconv.commands import console
from smolconv.commands.convert import convert as convert_command
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.compare import VerifyOptions, verify_checkpoints

TINY = next(path for path in nanotron_topologies() if path.parent.name == "smollm2-tiny")


class Told:
    """Every bar that was shown: title, how much there was to do, how much was told."""

    def __init__(self) -> None:
        self.bars: list[list[object]] = []

    @contextmanager
    def __call__(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        self.bars.append([title, total, sum(done)])


class Terminal:
    """stderr as a terminal of 80 columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        monkeypatch.setenv("TERM", "xterm")
        self.stderr = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", self.stderr)
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()

    def _collect(self) -> None:
        try:
            while data := os.read(self._master, 1 << 16):
                self._read.append(data)
        except OSError:  # how a terminal ends
            pass

    def shown(self) -> str:
        self.stderr.close()
        self._thread.join(timeout=20)
        return b"".join(self._read).decode()


def test_verify_tells_of_every_tensor_and_layer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    convert(TINY, tmp_path / "hf", "hf")
    a, b, told = read_checkpoint(TINY), read_checkpoint(tmp_path / "hf"), Told()
    assert verify_checkpoints(a, b, VerifyOptions(optimizer=True, length=16), bar=told).passed
    tensors = sum(len(found) for found in a.tensors.values())
    assert told.bars == [
        ["comparing tensors", tensors, tensors],
        ["comparing layers", a.spec.num_layers + 2, a.spec.num_layers + 2],
    ]


def test_the_verification_of_a_conversion_has_a_bar_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    terminal = Terminal(monkeypatch)
    convert_command(str(TINY), tmp_path / "hf", "hf", verify=True)
    shown = terminal.shown()
    assert shown.index("nanotron -> huggingface") < shown.index("comparing tensors") < shown.index("comparing layers")
    assert (tmp_path / "hf" / "config.json").exists()


def test_a_bar_is_seen_while_stderr_goes_elsewhere_and_only_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with console.progress_bar("in a pipe", 2) as advance:
        advance(2)
    assert capfd.readouterr().err == ""
    terminal = Terminal(monkeypatch)
    descriptor = terminal.stderr.fileno()
    with console.progress_bar("a title", 2) as advance:
        kept = os.dup(descriptor)
        with open(tmp_path / "log", "w") as log:
            os.dup2(log.fileno(), descriptor)
        advance(1)
        os.dup2(kept, descriptor)
        os.close(kept)
        advance(1)
    shown = terminal.shown()
    assert "a title" in shown and "100%" in shown
    assert (tmp_path / "log").read_text() == ""


def test_the_doctor_tells_of_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_import_problem", lambda name: None)
    monkeypatch.setattr(doctor, "_ask_torch", lambda: None)
    told = Told()
    found = doctor.diagnose(told)
    names = {package.name for state in found.commands.values() for package in state.packages}
    assert told.bars == [["importing packages", len(names) + len(found.faster), len(names) + len(found.faster)]]
