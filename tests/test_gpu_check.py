"""The logic of ``make gpu-check``, on the CPU at toy sizes: it notices what is wrong, and claims nothing that did not run."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_worker
import pytest
import torch

from smolconv.continual_pretraining.engine import attention
from smolconv.continual_pretraining.engine.attention import KERNELS, Packing

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check as check  # noqa: E402
import gpu_jobs as jobs  # noqa: E402
import gpu_report  # noqa: E402
import gpu_wheels  # noqa: E402

LLAMA = check._tiny("llama", hidden_size=48, intermediate_size=32, num_attention_heads=6, num_key_value_heads=2)
SMOLLM3 = check._tiny(
    "smollm3", hidden_size=64, intermediate_size=32, num_attention_heads=8, num_key_value_heads=2,
    no_rope_layer_interval=4,
)  # fmt: skip
TOY = check.Sizes(
    heads=((3, 1), (4, 1)), head_sizes=(8,), lengths=(5, 1, 33, 2), long_length=64, tiny=(LLAMA, SMOLLM3), tiny_lengths=(20, 1, 30, 13),
    tiny_steps=3, tiny_sequence=32, cpu_threads=1, save_every_steps=5,
    models=(check.Measured(name="toy", config=LLAMA, sequence_length=64, micro_batches=(2, 1), steps=4, warmup_steps=2),),
    long=(
        check.Measured(
            name="long", config=LLAMA, sequence_length=128, options={"activation_checkpointing": True}, micro_batches=(1,),
            accumulation=1, steps=4, warmup_steps=2,
        ),
    ),
)  # fmt: skip
NOT_HERE = {"flash": "flash-attn is not installed", "varlen": "this run is on cpu", "liger": "liger is not installed"}
H100 = "NVIDIA H100 80GB HBM3"


class InProcess(check.Place):
    """Jobs run here: what a test puts in the place of a kernel reaches them. Workers are forked."""

    def job(self, name: str, seconds: float, **given: Any) -> dict[str, Any]:
        if self.budget.left < seconds:
            raise check.OutOfTime("no time")
        return json.loads(json.dumps(jobs.JOBS[name](**given)))

    def processes(self, commands: Sequence[tuple[Sequence[str], bool]], seconds: float) -> list[tuple[int, str]]:
        ends = []
        for number, ((*_, module, run), _) in enumerate(commands):
            log = Path(run) / f"worker-{number}.log"
            code = f"from {module} import main\nmain()"
            fork = forked_worker.Fork(code=code, words=[module, run], environment=check._environment("cpu"), log=log)
            ends.append((forked_worker.run_ranks([fork], on_cpu=True)[0], check._last_line(log)))
        return ends


class Canned(check.Place):
    """Jobs give what they are told to."""

    answers: Callable[[str, dict[str, Any]], dict[str, Any]]

    def job(self, name: str, seconds: float, **given: Any) -> dict[str, Any]:
        return type(self).answers(name, given)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Any]:
    torch.set_num_threads(1)
    yield InProcess(
        device="cpu", budget=check.Budget(seconds=1000), work=tmp_path, sizes=TOY, gpu=H100, unable=NOT_HERE
    )


def verdicts(lines: Iterator[Any]) -> dict[str, str]:
    return {line.claim: line.verdict for line in lines}


# --- 1. attention -----------------------------------------------------------------------------------------------------


def test_a_correct_kernel_is_met_and_one_that_is_not_there_is_skipped(place):
    found = verdicts(check.attention(place))
    assert found["flash, bfloat16"] == found["varlen, bfloat16"] == "skipped"
    ran = {claim: verdict for claim, verdict in found.items() if "documents" in claim and "memory" not in claim}
    assert set(ran.values()) == {"met"}
    assert "documents, bfloat16: 3 heads in groups of 3, head size 8" in ran
    assert "smollm3, documents, float32: leak test" in ran
    assert len(ran) == 2 * (2 + 2 * 3)


def unpacked(query: Any, key: Any, value: Any, packing: Packing, scale: float, *, causal: bool = True) -> torch.Tensor:
    """As if all tokens were one document."""
    out = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).to(query.dtype)


def by_bounds(query: Any, key: Any, value: Any, packing: Packing, scale: float) -> torch.Tensor:
    """What a varlen kernel does, from ``cu_seqlens`` alone."""
    bounds = packing.cu_seqlens.tolist()
    assert packing.order is None and packing.max_length == max(b - a for a, b in itertools.pairwise(bounds))
    parts = [
        unpacked(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], packing, scale)
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, 1)


def wrong_scale(query: Any, key: Any, value: Any, packing: Packing, scale: float) -> torch.Tensor:
    return by_bounds(query, key, value, packing, scale * 1.2)


@pytest.mark.parametrize(("kernel", "expected"), [(by_bounds, "met"), (unpacked, "not met"), (wrong_scale, "not met")])
def test_a_varlen_kernel_is_judged_by_what_it_computes(place, monkeypatch, kernel, expected):
    monkeypatch.setitem(KERNELS, "varlen", kernel)
    monkeypatch.setattr(attention, "_unable", lambda *_: None)
    monkeypatch.setattr(attention, "_no_varlen", lambda: None)
    monkeypatch.setattr(check, "KERNELS", (("varlen", "bfloat16"),))
    found = verdicts(check.attention(replace(place, unable={})))
    shapes = [verdict for claim, verdict in found.items() if "groups of" in claim]
    gradients = [verdict for claim, verdict in found.items() if claim.endswith("gradients")]
    assert set(shapes) == set(gradients) == {expected}
    leaks = [verdict for claim, verdict in found.items() if claim.endswith("leak test")]
    assert set(leaks) == {"not met" if kernel is unpacked else "met"}


def test_a_kernel_that_gives_no_numbers_or_faults_is_not_met(place, monkeypatch):
    def nothing(query: Any, *_: Any) -> torch.Tensor:
        return query.transpose(1, 2) * torch.nan

    def fault(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(check, "KERNELS", (("documents", "float32"),))
    monkeypatch.setattr(check, "_long_document", lambda _: iter([]))
    small = replace(place, sizes=replace(TOY, tiny=()))
    for kernel in (nothing, fault):
        monkeypatch.setitem(KERNELS, "documents", kernel)
        lines = list(check.attention(small))
        assert {line.verdict for line in lines} == {"not met"} and len(lines) == 2
    assert "illegal memory access" in lines[0].found


def test_a_long_document_is_led_through_attention_and_through_the_gate(place):
    source, _ = check.tiny_source(place)
    sizes = {"heads": 4, "kv_heads": 1, "head_size": 8, "length": 64}
    found = jobs.long_document(**sizes, folder=str(source), device="cpu")
    assert found["attention"] > 0 and found["source"] > 0  # on a CPU, all that the process has held


@pytest.mark.parametrize(
    ("of_scores", "expected"),
    [
        ({"attention": 0.2, "source": 0.2}, ["met", "met"]),
        ({"attention": 2.0, "source": 0.2}, ["not met", "met"]),
        ({"attention": 0.2, "source": 1.0}, ["met", "not met"]),
    ],
)
def test_scores_that_are_written_are_noticed_by_their_memory(place, monkeypatch, of_scores, expected):
    heads = {"attention": 4, "source": 6}  # of the shape, and of the tiny llama
    found = {name: share * 4 * heads[name] * 64**2 for name, share in of_scores.items()}
    monkeypatch.setattr(InProcess, "job", lambda *_, **__: found)
    assert [line.verdict for line in check._long_document(place)] == expected


# --- 2. steps ---------------------------------------------------------------------------------------------------------


def test_the_worker_gives_equal_losses_and_shifted_ones_are_noticed(place, monkeypatch):
    monkeypatch.setattr(check, "WORKER_RUNS", (("bfloat16", 1),))
    (line,) = check.steps(place)
    assert line.verdict == "met", line.found
    assert "in 3 steps" in line.found
    run = place.work / "bfloat16 on cpu"
    real = check.losses(run)
    assert check.same_losses("-", real, check.losses(place.work / "bfloat16 on the CPU"), 0.02).verdict == "met"
    assert check.same_losses("-", [*real[1:], real[-1]], real, 0.02).verdict == "not met"
    assert check.same_losses("-", real[:-1], real, 0.02).verdict == "not met"
    assert check.same_losses("-", [], [], 0.02).verdict == "not met"
    assert check.same_losses("-", [real[0], float("nan")], real[:2], 0.02).verdict == "not met"


def test_a_worker_that_fails_is_not_met_with_its_reason(place, monkeypatch):
    monkeypatch.setattr(check, "WORKER_RUNS", (("float32", 0),))
    monkeypatch.setattr(InProcess, "job", lambda *_, **__: {})  # no checkpoint is made
    (line,) = check.steps(replace(place, sizes=replace(TOY, tiny_sequence=8)))
    assert line.verdict == "not met"
    assert "on cpu: " in line.found and "tiny" in line.found


# --- 3. Liger ---------------------------------------------------------------------------------------------------------


def test_an_export_is_met_when_it_was_written_and_verified(place):
    line = check.exported(place, "an export", liger="off")
    assert line.verdict == "met", line.found
    assert "equal to the engine's" in line.found


def test_an_export_of_a_run_that_ends_is_not_met_with_its_reason(place):
    line = check.exported(place, "an export")
    assert line.verdict == "not met"
    assert "liger" in line.found


# --- 3 and 4. speed ---------------------------------------------------------------------------------------------------


def canned(place: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A place whose measurements are as estimated, and ``changes`` of single runs: trainer, liger, plain, compile, ..."""
    given = check.subject(place, TOY.models[0])
    plain: dict[str, Any] = {
        "tokens_per_second": 989e12 * 0.3 / given.flops["6N"], "losses": [6.0, 5.0], "attention": "varlen",
        "allocated": check._estimated_bytes(given.recipe(), given.spec), "reserved": 10, "graphs": 0,
    }  # fmt: skip
    less = check._estimated_bytes(given.recipe(activation_checkpointing=True), given.spec)
    long = check.subject(place, TOY.long[0])
    by_tiles = check._estimated_bytes(long.recipe(), long.spec)

    def answer(name: str, job: dict[str, Any]) -> dict[str, Any]:
        if name == "saves":
            kind = "asynchronous" if json.loads(Path(job["run"], "kind").read_text()) else "synchronous"
            waits = {"5": 4.0, "10": 2.0, "15": 2.0} if kind == "synchronous" else {"5": 4.0, "10": 0.2, "15": 2.0}
            found: dict[str, Any] = {"stalls": waits, "seconds": {str(step): 0.1 for step in range(1, 16)}}
        elif name == "tiny_checkpoint":
            return {}
        elif name == "hf_trainer":
            kind, found = "trainer", {**plain, "tokens_per_second": plain["tokens_per_second"] / 2}
            del found["attention"], found["losses"]
        else:
            model = job["document"]["model"]
            switched = [kind for kind in ("activation_checkpointing", "compile") if model.get(kind)]
            kind = "liger" if model["liger"] == "on" else " and ".join(switched) or "plain"
            if job["document"]["data"]["sequence_length"] == 128:
                kind, less_or_more = "long", by_tiles * (3 if model.get("tiled_mlp") == "off" else 1)
                return {**plain, "allocated": less_or_more, **changes.get(kind, {})}
            found = {**plain, "graphs": 5 if "compile" in switched else 0}
            found["allocated"] = less if "activation_checkpointing" in switched else plain["allocated"]
        change = changes.get(kind, {})
        if isinstance(change, Exception):
            raise change
        return {**found, **change}

    monkeypatch.setattr(Canned, "answers", staticmethod(answer), raising=False)
    monkeypatch.setattr(check, "exported", lambda _, claim: check.Line(claim=claim, found="exported", verdict="met"))
    fields = {
        name: getattr(place, name)
        for name in ("device", "budget", "work", "sizes", "gpu", "gpu_bytes", "unable", "dry_run")
    }
    return Canned(**fields)


SPEED_PARTS = ("speed", "long", "liger", "trainer", "compile", "checkpointing")


def speed_verdicts(place: Any) -> dict[str, str]:
    speeds = check.Speeds(place)
    return {
        claim: verdict
        for part in check.PARTS
        if part.name in SPEED_PARTS
        for claim, verdict in verdicts(part.lines(place, speeds)).items()
    }


def test_what_is_as_estimated_is_met(place, monkeypatch):
    found = speed_verdicts(canned(place, monkeypatch))
    assert {claim for claim, verdict in found.items() if verdict == "skipped" and "tiles" not in claim} == {
        "an export after training with Liger, verified on the CPU",
        *(f"toy, Liger on and off: {what}" for what in ("losses of the steps", "tokens/s", "peak memory")),
    }
    assert "not met" not in found.values()
    # Of Liger, of the estimate, of the Trainer, of compile twice and of checkpointing; the rest is of long rows.
    assert len([claim for claim in found if not claim.startswith("long")]) == 4 + 2 + 1 + 2 * 3 + 3
    assert found["long: peak memory as estimated"] == "met"


@pytest.mark.parametrize(
    ("run", "change", "claim"),
    [
        ("plain", {"allocated": 1}, "toy: peak memory as estimated"),
        ("plain", {"tokens_per_second": 1.0}, "toy: tokens/s as estimated at 30% MFU (6N)"),
        ("trainer", {"tokens_per_second": 1e30}, "toy: tokens/s beside HF Trainer's"),
        ("compile", {"losses": [6.0, 5.1]}, "toy, compile on: losses of the steps"),
        ("compile", {"tokens_per_second": 1.0}, "toy, compile on: tokens/s"),
        ("compile", {"graphs": 0}, "toy, compile on: graphs"),
        (
            "activation_checkpointing and compile",
            {"graphs": 0},
            "toy, activation_checkpointing on, compile on: graphs",
        ),
        ("activation_checkpointing", {"allocated": 10**12}, "toy, activation_checkpointing on: peak memory"),
        ("liger", {"losses": [5.0, 4.0]}, "toy, Liger on and off: losses of the steps"),
        ("liger", {"allocated": 10**12}, "toy, Liger on and off: peak memory"),
        ("long", {"allocated": 10**12}, "long: peak memory as estimated"),
    ],
)
def test_what_is_not_as_claimed_is_not_met(place, monkeypatch, run, change, claim):
    with_liger = replace(place, unable={})
    assert speed_verdicts(canned(with_liger, monkeypatch))[claim] == "met"
    assert speed_verdicts(canned(with_liger, monkeypatch, **{run: change}))[claim] == "not met"


@pytest.mark.parametrize(("change", "expected"), [({}, "met"), ({"allocated": 10**9}, "not met")])
def test_tiles_that_save_no_memory_are_noticed(place, monkeypatch, change, expected):
    given = canned(place, monkeypatch, long=change)
    monkeypatch.setattr(check.Model, "model_fields", {"tiled_mlp": None})
    found = verdicts(check.long_context(given, check.Speeds(given)))
    assert found["long: peak memory with the MLP by tiles"] == expected
    assert found["long: peak memory with the MLP by tiles: losses of the steps"] == "met"


def test_an_estimate_that_is_wrong_is_noticed(place, monkeypatch):
    honest = canned(place, monkeypatch)
    parts = check.memory_parts
    monkeypatch.setattr(check, "memory_parts", lambda *given: [*parts(*given), *parts(*given)])
    assert speed_verdicts(honest)["toy: peak memory as estimated"] == "not met"


def test_a_peer_without_memory_is_skipped_and_our_own_run_without_it_is_not_met(place, monkeypatch):
    full = check.Failed("OutOfMemoryError: CUDA out of memory")
    found = speed_verdicts(canned(place, monkeypatch, trainer=full))
    assert found["toy: tokens/s beside HF Trainer's"] == "skipped"
    found = speed_verdicts(canned(place, monkeypatch, plain=full))
    assert found["toy: peak memory as estimated"] == "not met"


def test_a_gpu_whose_peak_is_not_known_has_no_mfu(place, monkeypatch):
    unknown = canned(replace(place, gpu="Some GPU"), monkeypatch)
    speeds = check.Speeds(unknown)
    found = verdicts(check.speed(unknown, speeds))
    assert found["toy: tokens/s as estimated at 30% MFU (6N)"] == "skipped"
    assert gpu_report._speed_cells(speeds.rows[0])[4:6] == ["", ""]


@pytest.mark.slow
def test_real_runs_of_the_trainer_and_of_hugging_face_are_measured(place):
    outside = check.Place(device="cpu", budget=place.budget, work=place.work, sizes=TOY, gpu=H100)
    speeds, given = check.Speeds(outside), check.subject(outside, TOY.models[0])
    ours, theirs = speeds.ours(given), speeds.trainer(given)
    assert len(ours["losses"]) == TOY.models[0].steps
    assert speeds.ours(given) is ours  # not run twice
    assert [row.what for row in speeds.rows] == ["smolconv", "HF Trainer"]
    assert all(found["tokens_per_second"] > 0 and found["allocated"] > 0 for found in (ours, theirs))


# --- time, report, exit codes -----------------------------------------------------------------------------------------


def test_nothing_is_started_when_there_is_no_time(place, monkeypatch):
    late = check.Place(
        device="cpu", budget=check.Budget(seconds=5, clock=lambda: 0.0), work=place.work, sizes=TOY, gpu=H100
    )
    monkeypatch.setattr(subprocess, "Popen", None)
    report = check.Report(place.work / "out", ["a machine"], check.PARTS)
    assert check.check(late, report) == 0
    assert {line.verdict for line in report.lines} == {"skipped"}
    assert list(report.sections) == [part.name for part in check.PARTS]
    assert "5 s are left, and it takes about 20 s" in report.path.read_text()


def test_a_process_that_hangs_is_ended(place, tmp_path):
    outside = check.Place(device="cpu", budget=check.Budget(seconds=1.0), work=tmp_path, sizes=TOY)
    with pytest.raises(check.OutOfTime):
        outside.processes([([sys.executable, "-c", "import time; time.sleep(600)"], True)], 0.1)


def test_a_process_that_dies_is_a_failure_with_its_last_line(place, tmp_path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text("import os, sys; print('CUDA error', flush=True); os.abort()")
    monkeypatch.setattr(check, "JOBS", script)
    outside = check.Place(device="cpu", budget=check.Budget(seconds=1000), work=tmp_path, sizes=TOY)
    with pytest.raises(check.Failed, match=r"ended with -6: CUDA error"):
        outside.job("kernel_errors", 1)
    outside.close()
    assert outside.waiting == []


def test_a_process_that_waits_for_a_job_is_used_by_the_next_one_and_ended_with_the_check(tmp_path, monkeypatch):
    script = tmp_path / "echo.py"
    script.write_text(
        "import json, os\ngiven = json.load(open(input()))\n"
        "json.dump({'found': {'process': os.getpid(), 'asked': given['asked']}}, open(given['result'], 'w'))\n"
    )
    monkeypatch.setattr(check, "JOBS", script)
    outside = check.Place(device="cpu", budget=check.Budget(seconds=1000), work=tmp_path, sizes=TOY)
    found = [outside.job("echo", 1, asked=number) for number in range(2)]
    ((waiting, _),) = outside.waiting
    assert [each["asked"] for each in found] == [0, 1]
    assert len({*(each["process"] for each in found), waiting.pid}) == 3  # each job's memory is its own
    outside.close()
    assert waiting.poll() is not None


def part(name: str, *lines: Any, seconds: float = 100) -> Any:
    def found(*_: Any) -> Iterator[Any]:
        for line in lines:
            if isinstance(line, Exception):
                raise line
            yield line

    return check.Part(name=name, title=f"The {name}", seconds=seconds, lines=found)


def test_the_files_have_every_line_from_the_moment_it_is_known(tmp_path):
    first, second = part("first"), part("second")
    report = check.Report(tmp_path, ["GPU X, driver 1"], [first, second])
    report.add(first, check.within("a | b", 0.5, 1.0))
    killed_here = report.path.read_text()
    assert "| The first | a \\| b | 0.5 | at most 1 | met |" in killed_here
    assert "was not ended" in killed_here and "1 met, 0 not met, 0 skipped." in killed_here and "GPU X" in killed_here
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["ended"] is False and document["counts"]["met"] == 1
    report.add(second, check.skipped("c", "no time"))
    report.speeds.append(
        check.Speed(
            model="m", what="smolconv", batch="2 x 8 x 2048", tokens_per_second=123456.7,
            mfu={"6N": 0.3, "nanotron": None}, allocated=5 * 10**9, reserved=6 * 10**9,
        )
    )  # fmt: skip
    report.ended = True
    report.write()
    ended = report.path.read_text()
    assert "was not ended" not in ended and "1 met, 0 not met, 1 skipped." in ended
    assert "| m | smolconv | 2 x 8 x 2048 | 123,457 | 30.0% |  | 5.00 | 6.00 |  |" in ended
    assert ended.index("| The first |") < ended.index("| The second |")
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["ended"] is True and document["speeds"][0]["tokens_per_second"] == 123456.7
    assert [(each["name"], each["lines"][0]["verdict"]) for each in document["parts"]] == [
        ("first", "met"), ("second", "skipped"),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.md", "gpu.json"}


@pytest.mark.parametrize(("found", "code"), [(0.5, 0), (2.0, 1), (float("nan"), 1)])
def test_the_exit_code_says_whether_something_was_not_met(place, found, code):
    parts = [part("one", check.within("x", found, 1.0)), part("two", check.skipped("y", "why"))]
    assert check.check(place, check.Report(place.work / "out", [], parts), parts) == code


def test_a_part_that_breaks_is_not_met_and_leaves_the_others_and_every_part_has_its_own_time(place):
    asked = []

    def spend(given: Any, _: Any) -> Iterator[Any]:
        asked.append(given.budget.left)
        yield check.within("after it", 0.5, 1.0)

    broken = part("broken", check.within("before it", 0.5, 1.0), KeyError("a mistake"))
    parts = [broken, check.Part(name="short", title="Short", seconds=7, lines=spend)]
    report = check.Report(place.work / "out", [], parts)
    assert check.check(place, report, parts) == 1
    assert [(line.claim, line.verdict) for line in report.lines] == [
        ("before it", "met"), ("all of The broken", "not met"), ("after it", "met"),
    ]  # fmt: skip
    assert "a mistake" in report.lines[1].found
    assert 0 < asked[0] <= 7  # of the 1000 that the whole has
    assert set(report.seconds) == {"broken", "short"} and report.ended


def test_a_dry_run_says_nothing_of_a_gpu(place, monkeypatch):
    dry = replace(place, dry_run=True, gpu=None)
    monkeypatch.setattr(check, "exported", lambda _, claim: check.skipped(claim, "-"))
    found = speed_verdicts(canned(dry, monkeypatch))
    assert {claim for claim, verdict in found.items() if "tokens/s" in claim or "memory" in claim} >= {
        "toy: tokens/s beside HF Trainer's", "toy: peak memory as estimated", "toy, compile on: tokens/s",
    }  # fmt: skip
    judged = {claim for claim, verdict in found.items() if verdict in ("met", "not met")}
    assert judged and all("losses" in claim or "graphs" in claim for claim in judged)
    assert {found[f"toy, Liger on and off: {what}"] for what in ("tokens/s", "peak memory")} == {"needs a GPU"}
    report = check.Report(place.work / "dry", [], [part("one")], dry_run=True)
    report.write()
    assert report.path.name == "gpu-dry-run.md" and "nothing of a GPU" in report.path.read_text()


# --- saves ------------------------------------------------------------------------------------------------------------


def save_lines(place: Any, monkeypatch: pytest.MonkeyPatch, both: bool, **changes: Any) -> list[Any]:
    given = canned(place, monkeypatch, **changes)
    fields = {"asynchronous": None} if both else {}
    monkeypatch.setattr(check.Checkpoints, "model_fields", fields)
    real = check.worker_run

    def noted(document: Any, folder: Path) -> Path:
        run = real(document, folder)
        (run / "kind").write_text(json.dumps(document["checkpoints"].get("asynchronous", False)))
        return run

    monkeypatch.setattr(check, "worker_run", noted)
    return list(check.saves(given))


def test_the_wait_for_an_asynchronous_save_is_judged_by_that_for_a_synchronous_one(place, monkeypatch):
    lines = save_lines(place, monkeypatch, True)
    assert [line.verdict for line in lines] == ["met", "met", "met"]
    assert "4.00 s, then 2.00 s" in lines[0].found and lines[2].found == "0.1"


def test_a_long_wait_is_not_met_and_a_missing_save_is_noticed(place, monkeypatch):
    slow = {"stalls": {"5": 0.1, "10": 1.0, "15": 0.1}}
    assert [line.verdict for line in save_lines(place, monkeypatch, True, asynchronous=slow)][2] == "not met"


def test_without_asynchronous_saves_the_synchronous_is_told_and_the_other_skipped(place, monkeypatch):
    assert [line.verdict for line in save_lines(place, monkeypatch, False)] == ["met", "skipped"]


# --- wheels and the command -------------------------------------------------------------------------------------------


def wheels(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_checksums_are_those_of_sha256sum(tmp_path):
    folder = wheels(tmp_path / "w", "deepspeed-0.19.8-py3-none-any.whl", "rich-15.0.0-py3-none-any.whl")
    assert [path.name for path in gpu_wheels.checked(folder)] == sorted(path.name for path in folder.glob("*.whl"))
    said = subprocess.run(
        ["sha256sum", "--check", "--strict", gpu_wheels.CHECKSUMS], cwd=folder, capture_output=True, check=False
    )  # fmt: skip
    assert said.returncode == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["deepspeed-0.19.8-cp312-cp312-linux_x86_64.whl"], "without compiled operators"),
        (["rich-15.0.0-py3-none-any.whl"], "without compiled operators"),
        (["deepspeed-0.19.8-py3-none-any.whl", "rich-1-py3-none-any.whl", "rich-2-py3-none-any.whl"], "more than one"),
    ],
)
def test_a_folder_that_would_not_serve_is_refused(tmp_path, names, expected):
    with pytest.raises(SystemExit, match=expected):
        gpu_wheels.checked(wheels(tmp_path / "w", *names))


def test_a_folder_beyond_what_may_be_carried_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_wheels, "LIMIT_BYTES", 10)
    with pytest.raises(SystemExit, match="may be carried"):
        gpu_wheels.checked(wheels(tmp_path / "w", "deepspeed-0.19.8-py3-none-any.whl"))


def test_a_wheel_that_was_damaged_on_the_way_is_not_installed(tmp_path):
    folder = wheels(tmp_path / "w", "deepspeed-0.19.8-py3-none-any.whl")
    gpu_wheels.checked(folder)
    (folder / "deepspeed-0.19.8-py3-none-any.whl").write_bytes(b"something else")
    said = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh")], check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "GPU_WHEELS": str(folder), "PYTHON": "false", "OUT": str(tmp_path / "out")},
    )  # fmt: skip
    assert said.returncode == 1 and "not as make gpu-wheels wrote it" in said.stderr
    assert not (tmp_path / "out").exists()


def test_a_command_that_is_ended_ends_its_check_and_removes_what_it_installed(tmp_path):
    """``python`` stands in: it installs nothing, and as the check it waits."""
    folder, python, temporary = tmp_path / "w", tmp_path / "python", tmp_path / "temporary"
    wheels(folder, "deepspeed-0.19.8-py3-none-any.whl")
    gpu_wheels.checked(folder)
    temporary.mkdir()
    python.write_text(f'#!/bin/sh\ncase "$1" in -m) exit 0;; esac\necho $$ > {tmp_path}/process\nexec sleep 600\n')
    python.chmod(0o755)
    command = subprocess.Popen(
        ["bash", str(BENCHMARKS / "gpu_check.sh")], stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "GPU_WHEELS": str(folder), "PYTHON": str(python), "TMPDIR": str(temporary)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "process").is_file() or not (tmp_path / "process").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list(temporary.iterdir())
    command.terminate()
    assert command.wait(60) == 143
    assert not Path("/proc", (tmp_path / "process").read_text().strip()).exists()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("seconds", ["0", "8m", "-5"])
def test_a_time_that_is_none_is_refused(tmp_path, seconds):
    said = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh")], check=False, capture_output=True, text=True, timeout=60,
        env={**os.environ, "GPU_CHECK_SECONDS": seconds, "PYTHON": "false"},
    )  # fmt: skip
    assert said.returncode == 2 and "GPU_CHECK_SECONDS" in said.stderr


def test_without_a_gpu_one_line_is_said_and_nothing_written(tmp_path):
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--output", str(tmp_path / "results"), "--work", str(tmp_path)],
        check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 5
    assert ended.stdout == "" and len(ended.stderr.strip().splitlines()) == 1 and "GPU" in ended.stderr
    assert list(tmp_path.iterdir()) == []
