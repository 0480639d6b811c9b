"""The real Trainer and the real accelerate resume from what is written, at other stages and worlds, as if never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, convert
from trainer_worker import Job, Trained, train

from smolconv.checkpoint import EngineRecord
from smolconv.errors import UnknownLayout, UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")

CONFIG = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf" / "config.json"
NANOTRON = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp1-dp2-zero1"
#: Of losses, between a resume at another stage or world and a run that never stopped.
MAX_LOSS_DIFFERENCE = 1e-6
STOPPED, STEPS = 2, 4


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A checkpoint of 2 ranks, written anew, and resumed by the program."""

    source: str  #: a key of ``saved``
    stage: int  #: of the engine that resumes
    world: int = 2
    universal: bool = False

    @property
    def name(self) -> str:
        return f"{self.source}-to-{'universal-' if self.universal else ''}zero{self.stage}-ws{self.world}"


RESUMES = (
    Resume(source="trainer-zero2", stage=1),
    Resume(source="trainer-zero2", stage=3),
    Resume(source="trainer-zero2", stage=2, world=3),
    Resume(source="trainer-zero2", stage=1, world=3, universal=True),
    Resume(source="trainer-zero3", stage=2),
    Resume(source="accelerate-zero2", stage=3),
    Resume(source="accelerate-zero2", stage=1, world=3),
)
named = pytest.mark.parametrize("name", [resume.name for resume in RESUMES])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Trained]]:
    """Real checkpoints of 2 ranks after step 2, and the steps of the runs that went on without a stop."""
    tmp = tmp_path_factory.mktemp("programs")

    def started(name: str, stage: int | None, schedule: str = "own", steps: int = STEPS) -> Job:
        return Job(
            program=name.partition("-")[0], folder=tmp / name, steps=steps, config=CONFIG, stage=stage,
            schedule=schedule, save_every=STOPPED,
        )  # fmt: skip

    jobs = {
        "trainer-zero2": started("trainer-zero2", 2),
        "trainer-zero3": started("trainer-zero3", 3, "deepspeed"),
        "accelerate-zero2": started("accelerate-zero2", 2),
        "trainer-alone": started("trainer-alone", None, steps=STOPPED),
    }
    trained = dict(zip(jobs, train(list(jobs.values()), 2, tmp / "run")))
    folders = {
        name: job.folder / f"checkpoint-{STOPPED}" if job.program == "trainer" else job.folder
        for name, job in jobs.items()
    }
    return folders, trained


@pytest.fixture(scope="module")
def saved(made: tuple[dict[str, Path], dict[str, Trained]]) -> dict[str, Path]:
    return made[0]


@pytest.fixture(scope="module")
def resumed(
    made: tuple[dict[str, Path], dict[str, Trained]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    """Every case of ``RESUMES``, and three that must be noticed."""
    tmp, (folders, _) = tmp_path_factory.mktemp("resumed"), made
    found: dict[str, Trained] = {}
    for world in (2, 3):
        jobs: dict[str, Job] = {}
        for case in (case for case in RESUMES if case.world == world):
            program = case.source.partition("-")[0]
            form: dict[str, Any] = {} if case.universal else {"zero_stage": case.stage, "world_size": world}
            convert(folders[case.source], tmp / case.name, "deepspeed", program=program, **form)
            jobs[case.name] = job(case.source, tmp / case.name, case.stage, universal=case.universal)
        if world == 2:
            zero1 = {"zero_stage": 1, "world_size": 2}
            convert(folders["trainer-zero2"], tmp / "bare", "deepspeed", **zero1)
            jobs["without what a Trainer needs"] = job("trainer-zero2", tmp / "bare", 1)
            convert(folders["accelerate-zero2"], tmp / "tag", "deepspeed", tag="global_step2", **zero1)
            shutil.copy(folders["accelerate-zero2"] / "scheduler.bin", tmp / "tag")
            jobs["another tag than accelerate's"] = job("accelerate-zero2", tmp / "tag", 1)
            groups = tmp / "groups.json"  # a Trainer's: it does not decay the norms
            groups.write_text(
                json.dumps([{"regex": "^(?!.*norm)", "weight_decay": 0.1}, {"regex": "norm", "weight_decay": 0.0}])
            )
            convert(NANOTRON, tmp / "nanotron", "deepspeed", program="trainer", groups=groups, **zero1)
            jobs["nanotron"] = job("trainer-zero2", tmp / "nanotron", 1, steps=step_of(tmp / "nanotron") + 1)
        found |= zip(jobs, train(list(jobs.values()), world, tmp / f"run-{world}"))
    return found


def job(source: str, folder: Path, stage: int, *, universal: bool = False, steps: int = STEPS) -> Job:
    return Job(
        program=source.partition("-")[0], folder=folder / "again", steps=steps, config=CONFIG, stage=stage, resume=folder,
        schedule="deepspeed" if source == "trainer-zero3" else "own",
        ds_config={"checkpoint": {"load_universal": True}} if universal else {},
    )  # fmt: skip


def step_of(folder: Path) -> int:
    return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])


def largest_difference(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted) > 0
    return max(abs(a - b) for a, b in zip(found, wanted))


# --- What lies side by side: the DeepSpeed run is read ---


@pytest.mark.parametrize("name", ["trainer-zero2", "trainer-zero3", "accelerate-zero2"])
def test_the_deepspeed_run_is_read_with_adam_and_the_step(saved: Mapping[str, Path], name: str) -> None:
    checkpoint = read_checkpoint(saved[name])
    assert (checkpoint.layout, checkpoint.has_optimizer) == ("deepspeed", True)
    assert checkpoint.optimizer is not None and set(checkpoint.optimizer.steps.values()) == {float(STOPPED)}
    assert checkpoint.progress is not None and checkpoint.progress.step == STOPPED


def test_the_weights_beside_the_run_are_said_and_can_be_chosen(saved: Mapping[str, Path]) -> None:
    (said,) = read_checkpoint(saved["trainer-zero2"]).warnings
    assert "Hugging Face" in said and "--from hf" in said
    chosen = read_checkpoint(saved["trainer-zero2"], ReadOptions(layout="hf"))
    assert (chosen.layout, chosen.has_optimizer) == ("huggingface", False)
    assert read_checkpoint(saved["trainer-zero3"]).warnings == ()  # it has no weights of Hugging Face's


def test_of_a_trainers_output_folder_the_newest_checkpoint_is_named(saved: Mapping[str, Path]) -> None:
    with pytest.raises(UnknownLayout, match=rf"output folder of a Trainer(.|\n)*checkpoint-{STEPS}$"):
        read_checkpoint(saved["trainer-zero2"].parent)


def test_a_trainers_own_adam_is_said_to_be_left_behind(saved: Mapping[str, Path], tmp_path: Path) -> None:
    assert (saved["trainer-alone"] / "optimizer.pt").is_file()
    done = convert(saved["trainer-alone"], tmp_path / "out", "nanotron")
    assert any("optimizer.pt" in warning and "Adam" in warning for warning in done.warnings)
    (saved["trainer-alone"] / "optimizer.pt").rename(tmp_path / "moved.pt")
    assert not any("optimizer.pt" in w for w in read_checkpoint(saved["trainer-alone"]).warnings)


# --- The programs go on ---


@named
def test_the_next_steps_are_those_of_the_run_that_never_stopped(
    made: tuple[dict[str, Path], dict[str, Trained]], resumed: Mapping[str, Trained], name: str
) -> None:
    case = next(case for case in RESUMES if case.name == name)
    whole, found = made[1][case.source], resumed[name]
    assert found.error == "" and found.step == STEPS
    assert largest_difference(found.losses, whole.losses[STOPPED:]) < MAX_LOSS_DIFFERENCE
    assert found.lrs == pytest.approx(whole.lrs[STOPPED:], abs=1e-12)


def test_the_steps_of_a_run_that_began_anew_would_be_seen(
    made: tuple[dict[str, Path], dict[str, Trained]], resumed: Mapping[str, Trained]
) -> None:
    whole, found = made[1]["trainer-zero2"], resumed[RESUMES[0].name]
    assert largest_difference(found.losses, whole.losses[: STEPS - STOPPED]) > 1e-3


@pytest.mark.parametrize("name", ["trainer-zero2-to-zero1-ws2", "accelerate-zero2-to-zero3-ws2"])
def test_random_states_go_on_in_a_world_of_the_same_size(
    made: tuple[dict[str, Path], dict[str, Trained]], resumed: Mapping[str, Trained], name: str
) -> None:
    drawn = made[1][name.partition("-to-")[0]].random
    assert resumed[name].random == drawn[STOPPED:] != drawn[: STEPS - STOPPED]


def test_a_trainer_resumes_from_a_nanotron_run(resumed: Mapping[str, Trained]) -> None:
    found = resumed["nanotron"]
    assert found.error == "" and len(found.losses) == 1


def test_without_for_a_trainer_does_not_resume(resumed: Mapping[str, Trained]) -> None:
    assert "trainer_state.json" in resumed["without what a Trainer needs"].error


def test_another_tag_than_accelerates_is_not_loaded(
    resumed: Mapping[str, Trained],
) -> None:
    found = resumed["another tag than accelerate's"]
    assert found.error and not found.losses


# --- What is carried, made, left out and said ---


def said(source: Path, target: Path, **options: Any) -> str:
    return "\n".join(convert(source, target, "deepspeed", **options).warnings)


def test_what_still_holds_is_carried_byte_for_byte(saved: Mapping[str, Path], tmp_path: Path) -> None:
    names = {"trainer": ("trainer_state.json", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"),
             "accelerate": ("scheduler.bin", "random_states_0.pkl", "random_states_1.pkl")}  # fmt: skip
    for program, files in names.items():
        source, target = saved[f"{program}-zero2"], tmp_path / program
        convert(source, target, "deepspeed", program=program, zero_stage=1, world_size=2)
        assert all((target / file).read_bytes() == (source / file).read_bytes() for file in files)


def test_random_states_of_another_world_are_left_out_and_said(saved: Mapping[str, Path], tmp_path: Path) -> None:
    found = said(saved["trainer-zero2"], tmp_path / "out", program="trainer", zero_stage=1, world_size=3)
    assert "random states of 2 ranks do not fit 3" in found
    assert not list((tmp_path / "out").glob("rng_state*"))


def test_a_state_of_another_step_is_not_carried(saved: Mapping[str, Path], tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    shutil.copytree(saved["trainer-zero2"], stale)
    state = json.loads((stale / "trainer_state.json").read_text())
    (stale / "trainer_state.json").write_text(json.dumps({**state, "global_step": 7}))
    found = said(stale, tmp_path / "out", program="trainer", zero_stage=1, world_size=2)
    assert "trainer_state.json is of step 7, the checkpoint of step 2: it was left out" in found
    assert step_of(tmp_path / "out") == STOPPED


def test_a_schedule_of_another_step_is_not_carried(saved: Mapping[str, Path], tmp_path: Path) -> None:
    import torch

    stale = tmp_path / "stale"
    shutil.copytree(saved["trainer-zero2"], stale)
    state = torch.load(stale / "scheduler.pt", weights_only=True)
    torch.save({**state, "last_epoch": 7}, stale / "scheduler.pt")
    found = said(stale, tmp_path / "out", program="trainer", zero_stage=1, world_size=2)
    assert "scheduler.pt is of step 7, the checkpoint of step 2: it was left out" in found
    made = torch.load(tmp_path / "out/scheduler.pt", weights_only=True)
    assert {key: made[key] for key in ("last_epoch", "_step_count", "_last_lr")} == {
        key: state[key] for key in ("last_epoch", "_step_count", "_last_lr")
    }


def test_a_pickle_that_names_anything_is_not_carried(saved: Mapping[str, Path], tmp_path: Path) -> None:
    import torch

    hostile = tmp_path / "hostile"
    shutil.copytree(saved["trainer-zero2"], hostile)
    torch.save({"last_epoch": STOPPED, "mode": print}, hostile / "scheduler.pt")
    assert "scheduler.pt" in said(hostile, tmp_path / "out", program="trainer", zero_stage=1, world_size=2)
    assert torch.load(tmp_path / "out/scheduler.pt", weights_only=True)["last_epoch"] == STOPPED


def test_what_a_nanotron_run_does_not_know_is_said(tmp_path: Path) -> None:
    found = said(NANOTRON, tmp_path / "trainer", program="trainer")
    assert "trainer_state.json was made: only the step is known" in found
    assert "no random states are known" in found
    assert "no scheduler.bin is known" in said(NANOTRON, tmp_path / "accelerate", program="accelerate")


def test_universal_says_that_zero_3_shares_one_step(saved: Mapping[str, Path], tmp_path: Path) -> None:
    assert "one Adam step for all 2 groups" in said(saved["trainer-zero2"], tmp_path / "universal")
    assert "one Adam step" not in said(saved["trainer-zero2"], tmp_path / "zero3", zero_stage=3, world_size=2)


def test_without_for_the_program_of_the_source_is_named(saved: Mapping[str, Path], tmp_path: Path) -> None:
    for program in ("trainer", "accelerate"):
        assert f"--for {program}" in said(saved[f"{program}-zero2"], tmp_path / program)


def test_the_tag_is_kept_and_can_be_chosen(saved: Mapping[str, Path], tmp_path: Path) -> None:
    def tag(name: str, **options: Any) -> str:
        convert(saved["accelerate-zero2"], tmp_path / name, "deepspeed", **options)
        (pointer,) = (tmp_path / name).glob("latest*")
        assert (tmp_path / name / pointer.read_text()).is_dir()
        return pointer.read_text()

    assert tag("kept", zero_stage=1, world_size=2) == "pytorch_model"
    assert tag("universal") == "pytorch_model"
    assert tag("chosen", tag="here", zero_stage=1, world_size=2) == "here"
    assert tag("deeper", tag="epoch1/here", zero_stage=1, world_size=2) == "epoch1/here"
    assert tag("trainer", program="trainer") == "global_step2_universal"


@pytest.mark.parametrize("options", [{"tag": "a//b"}, {"tag": ".."}, {"tag": "two\nlines"}, {"tag": "config.json"},
                                     {"tag": "x", "program": "accelerate"}, {"tag": "x", "program": "trainer"},
                                     {"program": "lightning"}])  # fmt: skip
def test_a_tag_that_could_not_be_loaded_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"--tag|--for"):
        convert(NANOTRON, tmp_path / "out", "deepspeed", **options)


@pytest.mark.parametrize("words", [("--for", "trainer"), ("--tag", "here")])
def test_these_options_are_for_deepspeed_alone(tmp_path: Path, cli: Any, words: tuple[str, str]) -> None:
    done = cli("convert", NANOTRON, tmp_path / "out", "--to", "hf", *words)
    assert done.code == 2 and f"{words[0]} has no meaning for --to hf" in done.stderr


def test_what_was_written_for_a_trainer_may_be_overwritten(saved: Mapping[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        convert(saved["trainer-zero2"], tmp_path / "out", "deepspeed", program="trainer", overwrite=True)
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        convert(saved["trainer-zero2"], tmp_path / "out", "deepspeed", program="trainer", overwrite=True)


def test_the_record_goes_through_hugging_faces_layout_and_back(saved: Mapping[str, Path], tmp_path: Path) -> None:
    convert(saved["accelerate-zero2"], tmp_path / "hf", "hf")
    again = read_checkpoint(tmp_path / "hf").source.engine
    assert isinstance(again, EngineRecord) and again.tag == "pytorch_model"
