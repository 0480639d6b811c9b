"""Watching a run: every step is a line that survives a kill, trackers cannot end a run, and spikes are told from noise."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smolconv.continual_pretraining.estimate.hardware import peak_flops
from smolconv.continual_pretraining.launchers.output import plain
from smolconv.continual_pretraining.recipe.schema import Recipe, Spikes
from smolconv.continual_pretraining.watch.lines import is_timestamp, lines_backwards
from smolconv.continual_pretraining.watch.metrics import StepRecord, Watch
from smolconv.continual_pretraining.watch.spikes import SpikeDetector
from smolconv.errors import MachineError, NotInstalled


def recipe(train_steps: int = 100, **sections: Any) -> Recipe:
    stage = {"name": "stable", "sources": [{"path": "tokens/web"}]}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"source": "somewhere"},
            "data": {"sequence_length": 128, "eos_token_id": 0, "stages": [stage]},
            "schedule": {"train_steps": train_steps, "peak_lr": 1e-3},
            "parallelism": {"global_batch_sequences": 8},
            **sections,
        }
    )


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "loss": 3.0 - step / 1000, "lr": 1e-3, "grad_norm": 0.5, "tokens": 1024 * step, "step_tokens": 1024,
        "seconds": 0.5, "stage": "stable", "sources": {"web": 1024 * step},
    }  # fmt: skip
    return StepRecord(step=step, **{**values, **changes})


def watch(folder: Path, given: Recipe | None = None, **changes: Any) -> Watch:
    options: dict[str, Any] = {
        "first_step": 1, "flops_per_token": 1e6, "flops_formula": "6N", "peak_flops": 8192e6, "interactive": False,
        "resumed": changes.get("first_step", 1) > 1,
    }  # fmt: skip
    return Watch(folder, given or recipe(), **{**options, **changes})


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constants) for line in (folder / name).read_text().splitlines()]


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_every_step_is_a_line_with_the_promised_fields(tmp_path):
    with watch(tmp_path) as watched:
        for step in (1, 2, 3):
            watched.step(record(step))
            assert len(lines(tmp_path)) == step, "a line is there as soon as its step is over"
    last = lines(tmp_path)[-1]
    assert is_timestamp(last.pop("time"))
    # 1,024 tokens in half a second; 1e6 FLOPs each, on a machine of 8.192e9 FLOP/s: a quarter.
    assert last == {
        "step": 3, "loss": 2.997, "lr": 1e-3, "grad_norm": 0.5, "tokens": 3072, "tokens_per_second": 2048.0,
        "seconds": 0.5, "mfu": 0.25, "stage": "stable", "sources": {"web": 3072},
    }  # fmt: skip


def test_mfu_is_null_when_the_peak_is_unknown(tmp_path):
    with watch(tmp_path, peak_flops=None) as watched:
        watched.step(record(1))
    assert lines(tmp_path)[0]["mfu"] is None and "not_finite" not in lines(tmp_path)[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null_and_named(tmp_path, value):
    with watch(tmp_path) as watched:
        watched.step(record(1, loss=value, grad_norm=value, skipped=True))
    line = lines(tmp_path)[0]
    assert line["loss"] is None and line["grad_norm"] is None and line["lr"] == 1e-3
    assert line["not_finite"] == ["loss", "grad_norm"] and line["skipped"] is True


@pytest.mark.parametrize("torn", [b"", b'{"step": 9', b'{"step": 2, "loss": 1.0}', b"\xff\x00"])
@pytest.mark.parametrize("first", [2, 5, 8, 9])
def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path, first, torn):
    with watch(tmp_path) as watched:
        for step in range(1, 9):
            watched.step(record(step))
            watched.event(step, f"saved step {step}")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(torn)
    with watch(tmp_path, first_step=first) as watched:
        kept = (tmp_path / "metrics.jsonl").read_bytes()
        assert kept == b"".join(before.splitlines(keepends=True)[: first - 1])
        watched.step(record(first))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, first + 1))
    events = lines(tmp_path, "events.jsonl")
    assert [event["step"] for event in events] == [0, *range(1, first + 1)]
    assert events[-1]["kind"] == "resumed" and {event["kind"] for event in events[1:-1]} == {"note"}
    assert events[0]["kind"] == "started" and all(is_timestamp(event["time"]) for event in events)


def test_a_run_that_begins_again_begins_with_empty_files(tmp_path):
    for _ in range(2):
        with watch(tmp_path) as watched:
            watched.event(0, "the start gate holds")
            watched.step(record(1))
    assert len(lines(tmp_path)) == 1
    assert [event["kind"] for event in lines(tmp_path, "events.jsonl")] == ["started", "note"]


@pytest.mark.parametrize("size", [0, 1, 7, 1 << 20, (1 << 20) + 1, 3_000_000])
@pytest.mark.parametrize("seed", range(3))
def test_lines_are_found_from_the_end_across_blocks(tmp_path, seed, size):
    choose = random.Random(seed)
    data = b""
    while len(data) < size:
        data += b"x" * choose.choice([0, 1, 50, 300_000]) + b"\n"
    data = data[:size]
    path = tmp_path / "file"
    path.write_bytes(data)
    expected, end = [], 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        expected += [(end, line)] if line.endswith(b"\n") else []
    with open(path, "rb") as file:
        assert list(lines_backwards(file.fileno())) == expected[::-1]


@pytest.mark.parametrize(
    "torn", [b"[" * 3000 + b"\n", b'{"step": ' + b"9" * 5000 + b"}\n", b'{"step": -1e999}\n', b"\0" * (5 << 20), b"\0" * (5 << 20) + b"\n"]
)  # fmt: skip
def test_resuming_drops_lines_that_are_none(tmp_path, torn):
    with watch(tmp_path) as watched:
        for step in range(1, 4):
            watched.step(record(step))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(before + torn)
    with watch(tmp_path, first_step=4):
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 9999, b""])
def test_a_damaged_id_of_a_run_is_made_anew(tmp_path, content):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run-id").write_bytes(content)
    with watch(tmp_path, first_step=2):
        assert re.fullmatch("[0-9a-f]{8}", (tmp_path / "logs" / "run-id").read_text())


def test_a_kill_loses_no_line_of_a_step_that_was_over(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_metrics import record, watch\n"
        f"watched = watch(Path({str(tmp_path)!r}))\n"
        "for step in range(1, 6): watched.step(record(step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == -9 and [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


class FullDisk:
    """``os.write`` that takes ``room`` bytes, then refuses."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, os.write

    def __call__(self, file: int, data: bytes) -> int:
        if file <= 2:
            return self.write(file, data)
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.write(file, bytes(data[: self.room]))
        self.room -= taken
        return taken


def test_a_full_disk_stops_the_run_or_makes_lines_wait_as_the_recipe_says(tmp_path, monkeypatch, capfd):
    stops = watch(tmp_path / "stop")
    waits = watch(tmp_path / "wait", recipe(checkpoints={"on_full_disk": "continue"}))
    disk = FullDisk(room=300)
    monkeypatch.setattr(os, "write", disk)
    for step in range(1, 6):
        waits.step(record(step))
    assert (tmp_path / "wait/metrics.jsonl").stat().st_size == 300, "a line and a torn one"
    assert capfd.readouterr().err.count("no space left") == 1
    with pytest.raises(MachineError, match="no space left to write step 1"):
        stops.step(record(1))
    disk.room = 1 << 20
    waits.step(record(6))
    assert [line["step"] for line in lines(tmp_path / "wait")] == [1, 2, 3, 4, 5, 6]


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_lines_every_so_many_steps(tmp_path, capfd):
    with watch(tmp_path, recipe(12, logging={"every_steps": 5})) as watched:
        for step in range(1, 13):
            watched.step(record(step, seconds=10.0 if step == 1 else 0.5))
        watched.evaluation(12, {"held-out": 2.5})
    said = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in said] == ["step 0", *(f"step {k}/12" for k in (1, 5, 10, 12)), "step 12"]
    # Speed, MFU and time left are not those of the first step, which was slow.
    assert said[2].split("  ")[1:] == [
        "loss 2.9950", "lr 1.00e-03", "grad norm 0.500", "2,048 tokens/s", "MFU 25.0% (6N)", "ETA 0:00:04", "stable",
    ]  # fmt: skip
    assert "evaluation: held-out 2.5000" in said[-1] and "\x1b" not in "".join(said)


def on_terminal(text: str) -> list[str]:
    """Every line as it was when it was drawn over or ended: without escape codes."""
    return [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-?]*[@-~]", "", text)) if line.strip()]


def test_a_terminal_gets_a_live_line_and_events_above_it(tmp_path, capfd):
    with watch(tmp_path, recipe(logging={"every_steps": 2}), interactive=True) as watched:
        for step in range(1, 6):
            watched.step(record(step))
        watched.event(5, "wrote [checkpoints/step-5]")
    said = capfd.readouterr().err
    assert "\x1b[" in said
    stay = [re.split(r"  | started", plain(line).decode())[0] for line in said.encode().split(b"\n")]
    first, live = "step 1/100", "step 5/100"
    assert stay == ["step 0", first, "step 2/100", "step 4/100", "step 5", live, ""], "a line stays every 2 steps"


@pytest.mark.parametrize("columns", [40, 80, 100, 120, 200])
@pytest.mark.parametrize("steps", [100, 1_000_000])
def test_the_live_line_fits_the_terminal_and_drops_the_least_first(tmp_path, capfd, monkeypatch, columns, steps):
    monkeypatch.setenv("COLUMNS", str(columns))
    given = recipe(steps, logging={"every_steps": 3})
    with watch(tmp_path, given, interactive=True, first_step=steps - 2, flops_formula="6N + attention") as watched:
        for step in range(steps - 2, steps):
            watched.step(record(step, step_tokens=123_456_789, seconds=3000.0, stage="a long name of a stage" * 3))
    drawn = [line for line in on_terminal(capfd.readouterr().err) if "/" in line]
    assert drawn and all(len(line.rstrip()) < columns for line in drawn), drawn
    assert all(f"step {steps - 2:,}/{steps:,}" in line or f"step {steps - 1:,}/{steps:,}" in line for line in drawn)
    assert ("loss" in drawn[-1]) and ("tokens/s" in drawn[-1]) == (columns >= 80)
    assert "stage" not in drawn[-1] or columns == 200


def test_what_saves_took_is_in_the_next_steps_line_and_goes_to_trackers_once(tmp_path, monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fake.init))
    with watch(tmp_path, recipe(logging={"wandb": "smol"})) as watched:
        watched.step(record(1))
        watched.event(1, "saved", kind="saved", write_seconds=2.5, stall_seconds=0.5, bytes=100)
        watched.step(record(2))
        watched.step(record(3))
    found = [(line.get("save_seconds"), line.get("stall_seconds")) for line in lines(tmp_path)]
    assert found == [(None, None), (2.5, 0.5), (None, None)]
    saved = next(event for event in lines(tmp_path, "events.jsonl") if event["kind"] == "saved")
    assert (saved["write_seconds"], saved["stall_seconds"], saved["bytes"]) == (2.5, 0.5, 100)
    assert [each for each in fake.logged if "save/save_seconds" in each[1]] == [
        (1, {"save/save_seconds": 2.5, "save/stall_seconds": 0.5})
    ]
    assert not any("stall" in name for _, sent in fake.logged[2:] for name in sent)


def test_tasks_on_an_earlier_checkpoint_go_to_trackers_under_the_newest_step(tmp_path, monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fake.init))
    with watch(tmp_path, recipe(logging={"wandb": "smol"})) as watched:
        watched.step(record(1))
        watched.step(record(2))
        watched.tasks(1, {"cloze": {"acc": 0.5}})
    event = next(each for each in lines(tmp_path, "events.jsonl") if each["kind"] == "evaluation")
    assert (event["step"], event["tasks"], event["text"]) == (
        1,
        {"cloze": {"acc": 0.5}},
        "evaluation: cloze acc 0.5000",
    )
    assert fake.logged[-1] == (2, {"evaluation/cloze/acc": 0.5, "evaluation/checkpoint_step": 1.0})


# --- trackers --------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_every_value(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = recipe(logging={"tensorboard": True})
    with watch(tmp_path, given) as watched:
        for step in range(1, 6):
            watched.step(record(step))
    with watch(tmp_path, given, first_step=4) as watched:  # steps 4 and 5 are trained again
        watched.step(record(4, loss=1.25))
        watched.evaluation(4, {"web": 2.0})
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx({1: 2.999, 2: 2.998, 3: 2.997, 4: 1.25})
    assert [(event.step, event.value) for event in found.Scalars("evaluation/web")] == [(4, 2.0)]
    assert found.Scalars("tokens/web")[-1].value == 4096 and found.Scalars("train/mfu")[0].value == 0.25


class FakeTracker:
    """As much of wandb and trackio as a run uses: ``init`` gives a run with ``log(values, step=)`` and ``finish()``."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished, self.fails_at = 0, fails_at

    def init(self, **options: Any) -> FakeTracker:
        self.started.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("the server has gone\nwith details")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_recipe_and_every_step_and_knows_a_resumed_run(tmp_path, monkeypatch, name):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=fake.init))
    given = recipe(logging={name: "smol"})
    for first in (1, 2, 1):
        with watch(tmp_path, given, first_step=first) as watched:
            watched.step(record(first))
    assert [step for step, _ in fake.logged] == [1, 2, 1] and fake.finished == 3
    assert fake.logged[0][1]["train/loss"] == 2.999 and fake.logged[0][1]["tokens/web"] == 1024
    key = {"wandb": "id", "trackio": "name"}[name]
    ids = [start[key] for start in fake.started]
    assert ids[0] == ids[1] != ids[2], "a resumed run is the same one, a new run in its folder is not"
    for start in fake.started:
        assert start["project"] == "smol" and start["resume"] == "allow" and start["name"].startswith("tiny")
        assert start["config"]["schedule"]["train_steps"] == 100
        json.dumps(start["config"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_stops_the_run_before_its_first_step(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(NotInstalled, match=f"pip install {name}"):
        watch(tmp_path, recipe(logging={name: True if name == "tensorboard" else "smol"}))
    watch(tmp_path).close()  # nothing is asked of trackers that are not wanted


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_step(tmp_path, monkeypatch):
    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(MachineError, match="api_key not configured"):
        watch(tmp_path, recipe(logging={"wandb": "smol"}))


def test_a_tracker_that_fails_later_is_left_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    fake, other = FakeTracker(fails_at=3), FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fake.init))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=other.init))
    with watch(tmp_path, recipe(logging={"wandb": "smol", "trackio": "smol", "every_steps": 1000})) as watched:
        for step in range(1, 7):
            watched.step(record(step))
    assert [step for step, _ in fake.logged] == [1, 2] and len(other.logged) == 6 and len(lines(tmp_path)) == 6
    said = capfd.readouterr().err
    assert said.count("wandb") == 1 and "wandb failed at step 3 and is switched off: the server has gone" in said


# --- what the machine could do ---------------------------------------------------------------------------------------


def test_peaks_are_known_by_what_torch_calls_a_device():
    # torch.cuda.get_device_name() of each; dense bf16 TFLOPS of NVIDIA's datasheets.
    for name, tflops in {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100 80GB PCIe": 312, "A100-SXM4-40GB": 312, "NVIDIA B200": 2250, "NVIDIA L40S": 362,
        "NVIDIA GeForce RTX 4090": 165,
    }.items():  # fmt: skip
        assert peak_flops(name) == tflops * 1e12
    assert peak_flops("NVIDIA H100 PCIe", 500.0) == 500e12 and peak_flops(None, 2.0) == 2e12


@pytest.mark.parametrize("name", [None, "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D", "cpu"])
def test_no_peak_is_made_up(name):
    assert peak_flops(name) is None


def test_watching_imports_no_torch(tmp_path):
    code = "import sys, smolconv.continual_pretraining.watch.metrics, smolconv.continual_pretraining.watch.spikes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- spikes ----------------------------------------------------------------------------------------------------------


def found_spikes(losses: np.ndarray, **options: Any) -> list[int]:
    """Indices that the detector calls spikes, in a run that logs them."""
    detector, found = SpikeDetector(Spikes(**options)), []
    for i, loss in enumerate(losses.tolist()):
        if detector.is_spike(loss):
            found.append(i)
        detector.observe(loss)
    return found


def falling(seed: int, steps: int = 10_000, noise: float = 0.03) -> np.ndarray:
    """As a run's losses: from 11 down to 2.2, fast and then slowly, with noise."""
    step = np.arange(1, steps + 1)
    return 2.2 + 8.8 * (step / 5 + 1) ** -0.6 + np.random.default_rng(seed).normal(0, noise, steps)


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_noisy_falling_losses_hold_no_spike(seed):
    assert found_spikes(falling(seed)) == []


@pytest.mark.parametrize("seed", range(2))
def test_injected_spikes_are_found_and_nothing_else(seed):
    losses, planted = falling(seed), [500, 501, 502, 2000, 2010, 9999]
    losses[planted] += 0.5
    assert found_spikes(losses) == planted


def test_a_spike_does_not_hide_the_next_smaller_one():
    losses = falling(0, 1000)
    losses[[600, 603]] += [100.0, 0.4]
    assert found_spikes(losses) == [600, 603]


@pytest.mark.parametrize("slope", [-0.01, -1e-4, 1e-4, 0.01])
def test_a_trend_is_no_spike(slope):
    noise = np.random.default_rng(0).normal(0, 0.01, 5000)
    assert found_spikes(60 + slope * np.arange(5000) + noise) == []


@pytest.mark.parametrize("slope", [-0.004, 0.004])
def test_a_line_without_noise_has_no_spike_and_hides_none(slope):
    losses = 60 + slope * np.arange(1000)
    losses[500] += 0.05
    assert found_spikes(losses) == [500]


def test_a_plateau_without_variance_does_not_make_noise_a_spike():
    losses = np.full(1000, 2.0)
    losses[500:] += np.random.default_rng(0).choice([0.0, 1e-6], 500)
    assert found_spikes(losses) == []
    losses[800] += 0.01
    assert found_spikes(losses) == [800]


def test_nothing_is_a_spike_before_the_window_is_full():
    losses = np.full(200, 2.0)
    losses[[5, 100]] = 50.0
    assert found_spikes(losses) == []
    assert found_spikes(losses, window_steps=64) == [100]


def test_a_loss_that_stays_up_is_a_new_level_and_skipping_ends():
    losses = np.random.default_rng(0).normal(2.0, 0.02, 2000)
    losses[1000:] += 1.0
    assert found_spikes(losses) == list(range(1000, 1032)), "a quarter of the window of 128"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_left_to_others(loss):
    detector = SpikeDetector(Spikes())
    for each in falling(0, 300).tolist():
        detector.observe(each)
    before = detector.state()
    assert not detector.is_spike(loss)
    detector.observe(loss)
    assert detector.state() == before


def test_a_detector_goes_on_from_its_state_as_if_never_stopped():
    losses = falling(1, 600)
    losses[[299, 300, 420]] += 0.5
    detector, found = SpikeDetector(Spikes()), []
    for i, loss in enumerate(losses.tolist()):
        if i in (64, 300, 301, 421):
            state = json.loads(json.dumps(detector.state()))
            detector = SpikeDetector(Spikes())
            detector.restore(state)
        found += [i] if detector.is_spike(loss) else []
        detector.observe(loss)
    assert found == found_spikes(losses) == [299, 300, 420]
