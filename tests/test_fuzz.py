"""Damaged inputs of every reader end in a clean error or in the right output; and the judge that says so notices what is not.

``make fuzz`` looks for new failures; what it ever found is in fixtures/fuzz and is replayed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import FIXTURES, Finished, convert
from fuzzing import archives
from fuzzing.campaign import search
from fuzzing.inputs import (
    CHECK,
    INPUT,
    INSPECT,
    ORIGINAL,
    OUTPUT,
    SEEDS,
    TO_HF,
    VERIFY,
    WEIGHTS,
    Workshop,
    memory_folder,
)
from fuzzing.judge import CLEAN_ERROR, EXPLAINED, RIGHT_OUTPUT, Judge, Outcome
from fuzzing.minimise import minimised
from fuzzing.mutations import apply
from fuzzing.strategies import Case
from hypothesis import configuration

pytest.importorskip("deepspeed")
pytest.importorskip("gguf")

REGRESSIONS = sorted((FIXTURES / "fuzz").glob("*.json"))
#: Inputs of each kind that ``make test`` draws, always the same ones.
COUNT, SEED = 40, 20250707


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    with tempfile.TemporaryDirectory(prefix="smolconv-fuzz-", dir=memory_folder()) as folder:
        configuration.set_hypothesis_home_dir(str(tmp_path_factory.mktemp("hypothesis")))
        yield Judge(Workshop(Path(folder)))


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_the_fuzzer_once_found_is_well_now(path, judge):
    outcome = judge.outcome(Case.from_json(json.loads(path.read_text())))
    assert not outcome.is_failure, f"{outcome.kind}: {outcome.signature}\n{outcome.detail}"


@pytest.mark.parametrize("kind", sorted(WEIGHTS))
def test_drawn_damages_end_in_a_clean_error_or_in_the_right_output(kind, judge):
    found = search(SEED, judge, [kind], count=COUNT, smaller=False)
    told = "\n".join(
        f"{key[0]}: {key[1]}\n  {json.dumps(found.examples[key][0].to_json())}\n{found.examples[key][1].detail}"
        for key in found.failures
    )
    assert found.tried == COUNT and not found.failures, told


# --- the judge -------------------------------------------------------------------------------------------------------


def judged(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, seed: str, command: tuple[str, ...], run: Callable[[Path], Finished]
) -> Outcome:
    """The outcome where the command does what ``run`` does in the case's folder."""
    judge.baseline(seed, command)
    monkeypatch.setattr(Judge, "_run", lambda _, command, folder: run(folder))
    return judge.outcome(
        Case(seed=seed, command=command, ops=({"file": "config.json", "op": "flip", "at": 0, "bit": 0},))
    )


@pytest.mark.parametrize("seed", ["hf-smollm2-tiny", "hf-torch", "deepspeed-zero2-fp32-ws3"])
def test_a_whole_input_is_well(seed, judge):
    outcome = judge.outcome(Case(seed=seed, command=TO_HF, ops=()))
    assert outcome.kind == RIGHT_OUTPUT


@pytest.mark.parametrize(
    ("code", "said", "kind"),
    [
        (1, "Traceback (most recent call last):\n", "traceback"),
        (70, "unexpected KeyError: 'x'\nThis is a bug of smolconv. Repeat with --debug.", "traceback"),
        (4, "MachineError: [Errno 40] Too many levels of symbolic links: 'in'.", "bare OSError"),
        (4, "MachineError: out of memory. Try fewer --workers.", "memory"),
        (4, "MachineError: the disk is full.", "exit code 4"),
        (-9, "", "hang"),
        (-24, "", "hang"),
        (-11, "", "killed"),
        (1, "CorruptFile: config.json", "exit code 1"),
        (3, "", "no message"),
        (3, "something is wrong", "no message"),
        (3, "CorruptFile: " + "x" * 3000, "long message"),
        (3, "CorruptFile: config.json" + "\nx" * 9, "long message"),
        (3, "CorruptFile: config.json \x1b[31m", "control characters"),
        (3, "CorruptFile: config.json", "output beside an error"),
    ],
)
def test_what_a_command_says_is_judged(code, said, kind, judge, monkeypatch):
    assert judged(judge, monkeypatch, "hf-smollm2-tiny", INSPECT, lambda _: Finished(code, "", said)).kind == kind


def test_an_error_is_a_document_with_json_and_nothing_without(judge, monkeypatch):
    said = "CorruptFile: config.json is damaged.\nCopy it again."
    error = {"class": "CorruptFile", "exit_code": 3, "message": "config.json is damaged.", "advice": "Copy it again."}
    document = json.dumps({"schema": 1, "error": error})
    other = json.dumps({"schema": 1, "error": {**error, "exit_code": 4}})
    for command, stdout, kind in (
        (INSPECT, document, CLEAN_ERROR), (INSPECT, "", "output beside an error"), (INSPECT, other, "output beside an error"),
        (INSPECT[:-1], "", CLEAN_ERROR), (INSPECT[:-1], "x", "output beside an error"),
    ):  # fmt: skip
        done = Finished(3, stdout, said)
        assert judged(judge, monkeypatch, "hf-smollm2-tiny", command, partial(_ended, done)).kind == kind


def _ended(done: Finished, _: Path) -> Finished:
    return done


def test_an_error_leaves_nothing_and_writes_nothing(judge, monkeypatch):
    document = {"schema": 1, "error": {"class": "CorruptFile", "exit_code": 3, "message": "config.json", "advice": ""}}
    error = Finished(3, json.dumps(document), "CorruptFile: config.json")

    def leaves(folder: Path) -> Finished:
        (folder / f"{OUTPUT}.partial").mkdir()
        return error

    def changes(folder: Path) -> Finished:
        os.truncate(folder / INPUT / "config.json", 3)
        return error

    def prints(folder: Path) -> Finished:
        return Finished(3, "{", error.stderr)

    for run, kind in ((leaves, "leftover"), (changes, "source changed"), (prints, "output beside an error")):
        assert judged(judge, monkeypatch, "hf-smollm2-tiny", TO_HF, run).kind == kind


def test_a_wrong_byte_in_the_output_is_noticed(judge, monkeypatch):
    def run(folder: Path, flip: int | None = None, name: str = "model.safetensors") -> Finished:
        convert(folder / ORIGINAL, folder / OUTPUT, "hf")
        if flip is not None:
            content = bytearray((folder / OUTPUT / name).read_bytes())
            content[flip] ^= 1
            (folder / OUTPUT / name).write_bytes(content)
        return Finished(0, "{}", "")

    for flip, kind in ((None, RIGHT_OUTPUT), (-1, "wrong output"), (0, "unreadable output")):
        assert judged(judge, monkeypatch, "ours-hf", TO_HF, partial(run, flip=flip)).kind == kind
    broken = partial(run, flip=0, name="config.json")
    assert judged(judge, monkeypatch, "ours-hf", TO_HF, broken).kind == "wrong output"


def test_a_digest_that_does_not_hold_and_a_difference_that_is_not_told_are_noticed(judge, monkeypatch):
    flip = {"file": "model.safetensors", "op": "flip", "at": 440_000, "bit": 3}
    monkeypatch.setattr(Judge, "_run", lambda *_: Finished(0, '{"passed": true}', ""))
    assert judge.outcome(Case(seed="ours-hf", command=CHECK, ops=(flip,))).kind == "not noticed"
    assert judge.outcome(Case(seed="hf-smollm2-tiny", command=CHECK, ops=(flip,))).kind == RIGHT_OUTPUT
    assert judge.outcome(Case(seed="hf-smollm2-tiny", command=VERIFY, ops=(flip,))).kind == "wrong output"
    monkeypatch.setattr(Judge, "_run", lambda *_: Finished(0, '{"loss": NaN}', ""))
    assert judge.outcome(Case(seed="hf-smollm2-tiny", command=INSPECT, ops=(flip,))).kind == "no JSON"


def test_bytes_without_a_digest_may_change(judge):
    flip = {"file": "model.safetensors", "op": "flip", "at": 440_000, "bit": 3}
    assert judge.outcome(Case(seed="hf-smollm2-tiny", command=TO_HF, ops=(flip,))).kind == EXPLAINED
    assert judge.outcome(Case(seed="ours-hf", command=TO_HF, ops=(flip,))).kind != EXPLAINED


@pytest.mark.parametrize(
    ("hang", "kind"),
    [("while True: pass", "hang"), ("import time; time.sleep(60)", "hang"), ("x = bytearray(2 << 30)", "memory")],
)
def test_a_hang_and_a_memory_bomb_are_ended_and_noticed(hang, kind, judge, tmp_path):
    """A process of its own: the forks of this one's server run nothing but smolconv."""
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
import forked_cli
from smolconv.commands import main
def broken():
    try: exec({hang!r})
    except MemoryError: print("MachineError: out of memory.", file=sys.stderr); sys.exit(4)
main.main = broken
import json, os
asked = {{"words": [], "cwd": {str(tmp_path)!r}, "folder": {str(tmp_path)!r}, "seconds": 2, "memory_bytes": 1 << 30}}
print(forked_cli._ended(asked))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said = (tmp_path / "stderr").read_text()
    case = Case(seed="hf-smollm2-tiny", command=INSPECT, ops=())
    outcome = judge._failure(Finished(int(done.stdout), "", said), case, tmp_path)
    assert outcome is not None and outcome.kind == kind


# --- damages ---------------------------------------------------------------------------------------------------------


def test_a_rebuilt_archive_is_as_good_as_the_one_before(judge):
    whole = judge.workshop.seed("deepspeed-zero2-fp32-ws3")
    path = next(whole.rglob("*optim_states.pt"))
    case = judge.workshop.case("deepspeed-zero2-fp32-ws3")
    damaged = case / INPUT / path.relative_to(whole)
    damaged.unlink()
    damaged.write_bytes(archives.rebuilt(path.read_bytes(), {}))
    done = judge._run(CHECK, case)
    assert done.code == 0, done.stderr


def test_a_damage_never_reaches_the_whole_input(judge):
    name = "ours-hf"
    before = {path: path.read_bytes() for path in judge.workshop.seed(name).rglob("*") if path.is_file()}
    for op in ("empty", "fifo", "missing", "directory", "socket"):
        apply([{"file": "config.json", "op": op}], judge.workshop.case(name) / INPUT)
    apply([{"file": "model.safetensors", "op": "sparse", "size": 9, "keep": True}], judge.workshop.case(name) / INPUT)
    assert {path: path.read_bytes() for path in judge.workshop.seed(name).rglob("*") if path.is_file()} == before


def test_a_failure_is_made_small():
    """By a judge for whom two of three damages are one failure too many."""
    flip = {"file": "a", "op": "flip", "at": 1, "bit": 1}
    long = {"file": "b", "op": "json", "do": "set", "at": ["x"], "value": {"$": "letters", "n": 100_000}}

    def judge(case: Case) -> Outcome:
        bad = any(op["op"] == "json" and op["value"]["n"] > 300 for op in case.ops)
        return Outcome(kind="traceback" if bad else CLEAN_ERROR)

    small = minimised(Case(seed="x", command=INSPECT, ops=(flip, long, flip)), Outcome(kind="traceback"), judge)
    assert [op["op"] for op in small.ops] == ["json"] and 300 < small.ops[0]["value"]["n"] < 700


def test_every_seed_can_be_made_and_read(judge):
    refused = {
        f"{name} {' '.join(command)}"
        for name, seed in SEEDS.items()
        for command in seed.commands[:4]
        if judge.baseline(name, command)[0].code
    }
    names = ("recipe-smollm3-3b-long-context-32k", "recipe-finemath-cpt")  # whose data are not there
    shipped = {f"{name} {' '.join(SEEDS[name].commands[0])}" for name in names}
    assert refused == {"tokens-shuffled_4byte data inspect in --json --eos 0", *shipped}


def test_a_damage_reads_no_pipe_that_another_one_made(judge):
    fifo = {"file": "config.json", "op": "fifo"}
    folder = judge.workshop.case("hf-smollm2-tiny") / INPUT
    for op in (
        {"file": "config.json", "op": "flip", "at": 0, "bit": 0},
        {"file": "config.json", "op": "sparse", "size": 9, "keep": True},
        {"file": "generation_config.json", "op": "splice", "at": 0, "from": "config.json", "from_at": 0, "count": 1},
    ):
        apply([fifo, op], folder)
    assert (folder / "config.json").is_fifo()
