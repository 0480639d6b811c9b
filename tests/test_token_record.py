"""Token folders that change between the starts of a run: what is the same data, what is refused, what begins again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, run_cli
from forked_worker import work
from training import EOS, VOCABULARY, losses, recipe_document, train
from training import recipe as recipe_of

from smolconv.continual_pretraining.data.position import tokens_of
from smolconv.continual_pretraining.data.stream import TrainingData
from smolconv.continual_pretraining.data.token_record import DataPlace, place_in_data, record_of
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.continual_pretraining.run.checkpoint_files import read_own
from smolconv.continual_pretraining.run.checkpoints import RunState, step_folder
from smolconv.continual_pretraining.run.place import own_place, source_place
from smolconv.continual_pretraining.tokens.files import TokenFile, TokenFolder
from smolconv.errors import UsageError
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

SOURCE = FIXTURES / "nanotron" / "smollm2-tiny" / "tp1-pp1-dp1-zero0"
LENGTH, BATCH = 32, 4
#: Windows of each file that ``written`` writes.
WINDOWS = 20

Row = tuple[str, str, int]  #: source, file, window


def written(folder: Path, name: str, *, seed: int, windows: int = WINDOWS) -> Path:
    """A token file of so many whole windows, of documents of 11 tokens."""
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, windows * (LENGTH + 1)).astype("<u2")
    tokens[10::11] = EOS
    path = folder / f"{name}.ds"
    tokens.tofile(path)
    np.arange(11, len(tokens) + 1, 11).astype("<u8").tofile(folder / f"{name}.ds.index")
    (folder / f"{name}.ds.metadata").write_text(f"tests/random|2\n{len(tokens)}\n{len(tokens)} T")
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for number, name in enumerate(("b", "d")):
        written(tmp_path / "one", name, seed=number)
    written(tmp_path / "two", "b", seed=7)
    return tmp_path / "one", tmp_path / "two"


def given(*folders: Path, **changes: Any) -> Recipe:
    return recipe_of(Path("source"), folders, **changes)


def read(recipe: Recipe, first: int, last: int, position: Mapping[str, Any] | None) -> tuple[list[list[Row]], Any]:
    """The rows of each step, and the position after the last."""
    training = TrainingData(
        recipe.data, global_batch_sequences=BATCH, micro_batch_sequences=1, vocab_size=VOCABULARY, rank=0, world_size=1,
        position=position,
    )  # fmt: skip
    steps = list(training.read_steps(first, last))
    rows = [[(r.source, Path(r.file).name, r.window) for b in step.micro_batches for r in b.rows] for step in steps]
    return rows, steps[-1].position


def recorded(recipe: Recipe) -> Any:
    """As it comes back from a checkpoint."""
    return json.loads(json.dumps(place_in_data(recipe, None, {}, VOCABULARY, "").record))


def go_on(recipe: Recipe, position: Mapping[str, Any], record: Any) -> DataPlace:
    return place_in_data(recipe, position, record, VOCABULARY, "step 5")


# --- what goes on -----------------------------------------------------------------------------------------------------


def test_files_at_the_end_are_read_after_the_others_as_if_they_had_always_been_there(folders):
    """The oracle: a run that found the longer folder at its first step."""
    one, two = folders
    recipe = given(one, two)
    before, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    written(one, "e", seed=9)
    place = go_on(recipe, position, record)
    after, _ = read(recipe, 6, 30, place.position)
    assert before + after == read(recipe, 1, 30, None)[0]
    assert any(file == "e.ds" for step in after for _, file, _ in step)
    assert place.events == (
        "data: one changed since step 5: 1 file at the end (e.ds). All samples keep their numbers, so it continues.",
    )
    assert list(place.record[str(one)]) == ["b.ds", "d.ds", "e.ds"]


@pytest.mark.parametrize("change", ["nothing", "copied", "an index more", "an index less", "nothing was read"])
def test_what_changes_no_row_is_not_said(change, folders):
    one, two = folders
    recipe = given(one, two)
    _, position = read(recipe, 1, 5, None)
    index = one / "b.ds.index"
    if change == "an index more":
        kept = index.read_bytes()
        index.unlink()
    record = recorded(recipe)
    match change:
        case "copied":
            shutil.copytree(one, one.with_name("copy"))
            shutil.rmtree(one)
            one.with_name("copy").rename(one)
        case "an index more":
            index.write_bytes(kept)
        case "an index less":
            index.unlink()
        case "nothing was read":
            written(one, "a", seed=9)
            position = {"step": 5, "stages": []}
    place = go_on(recipe, position, record)
    assert (place.events, place.position) == ((), position)


def test_a_document_that_was_mended_in_its_place_is_said_and_read_on(folders):
    """As after a loss that is not finite. The index tells it from a file that was tokenised anew."""
    one, two = folders
    recipe = given(one, two)
    _, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    another_token(one / "d.ds")
    place = go_on(recipe, position, record)
    assert place.position == position
    assert "1 file with other tokens in documents of the same lengths (d.ds)" in place.events[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def another_token(path: Path, at: int = -3) -> Path:
    ids = np.fromfile(path, "<u2")
    ids[at] = ids[at] % (VOCABULARY - 1) + 1
    ids.tofile(path)
    return path


def masked(path: Path) -> None:
    np.ones(path.stat().st_size // 2, np.uint8).tofile(path.with_name(f"{path.name}.loss"))


def without(path: Path) -> None:
    for name in (path.name, f"{path.name}.index", f"{path.name}.metadata"):
        (path.with_name(name)).unlink()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "before others": (lambda one: written(one, "a", seed=9), r"1 file added \(a\.ds\), read before b\.ds\."),
    "between others": (lambda one: written(one, "c", seed=9), r"1 file added \(c\.ds\), read before d\.ds\."),
    "gone": (lambda one: without(one / "b.ds"), r"1 file gone \(b\.ds\)\."),
    "gone, though not reached": (lambda one: without(one / "d.ds"), r"1 file gone \(d\.ds\)\."),
    "another token, and no index": (
        lambda one: shutil.move(f"{another_token(one / 'b.ds')}.index", one / "away"),
        r"1 file with other content \(b\.ds\)\.",
    ),
    "longer": (lambda one: written(one, "d", seed=1, windows=WINDOWS + 1), r"with other content \(d\.ds\)\."),
    "other documents": (
        lambda one: np.array([5, WINDOWS * (LENGTH + 1)], "<u8").tofile(one / "b.ds.index"),
        r"with other content \(b\.ds\)\.",
    ),
    "a loss mask": (lambda one: masked(one / "b.ds"), r"with other content \(b\.ds\)\."),
    "renamed": (
        lambda one: [shutil.move(one / f"d.ds{end}", one / f"a.ds{end}") for end in ("", ".index", ".metadata")],
        r"1 file added \(a\.ds\), 1 file gone \(d\.ds\)\.",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_whose_files_changed_is_refused_by_their_names(change, folders):
    one, two = folders
    recipe = given(one, two)
    _, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    assert go_on(recipe, position, record).events == ()  # control
    make, said = CHANGES[change]
    make(one)
    with pytest.raises(UsageError, match=f"^data: the files of one changed since step 5: .*{said}") as caught:
        go_on(recipe, position, record)
    first, *rest = str(caught.value).splitlines()
    assert len(first) <= 120 and "10 samples" in rest[0] and "data.on_change: restart-source" in rest[1]


def test_the_control_a_file_before_others_has_rows_trained_again(folders):
    """What nothing said: without the record the position alone goes on at rows that the run has seen."""
    one, _ = folders
    seen, position = read(given(one), 1, 5, None)
    written(one, "a", seed=9)
    again, _ = read(given(one), 6, 15, position)
    assert sum(row in step for step in again for done in seen for row in done) == 20


def test_a_loss_mask_counts_only_where_it_is_used(folders):
    one, _ = folders
    recipe = given(one, data={"loss_masks": False})
    _, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    masked(one / "b.ds")
    assert go_on(recipe, position, record).events == ()


def test_the_order_that_is_compared_is_that_of_reading(folders):
    """With a file_seed a file more, though the last by name, permutes all of them."""
    one, _ = folders
    for number, name in enumerate("efgh"):
        written(one, name, seed=20 + number)
    recipe = given(one, data={"file_seed": 3})
    before, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    names = list(record[str(one)])
    assert names == [f"{'bdefgh'[i]}.ds" for i in np.random.default_rng(3).permutation(6)] != sorted(names)
    written(one, "z", seed=9)
    with pytest.raises(UsageError, match=r"1 file added \(z\.ds\), another order of the files \(data\.file_seed\)"):
        go_on(recipe, position, record)
    assert read(recipe, 1, 5, None)[0] != before  # control


@pytest.mark.parametrize(("steps", "goes_on"), [(10, True), (11, False)])
def test_after_the_first_epoch_a_longer_source_is_refused(steps, goes_on, folders):
    """One epoch is 40 samples: ten steps. From then on the samples begin again at the first, which would move."""
    one, _ = folders
    recipe = given(one)
    _, position = read(recipe, 1, steps, None)
    record = recorded(recipe)
    written(one, "e", seed=9)
    if goes_on:
        assert "so it continues" in go_on(recipe, position, record).events[0]
        return
    with pytest.raises(UsageError, match=r"at the end \(e\.ds\), after the first epoch of 40 samples"):
        go_on(recipe, position, record)


# --- a source that begins again ---------------------------------------------------------------------------------------


def test_a_source_begins_again_at_its_first_sample_and_the_others_go_on(folders):
    one, two = folders
    recipe = given(one, two, data={"on_change": "restart-source"})
    _, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    assert go_on(recipe, position, record).position == position  # control: nothing changed
    untouched, _ = read(recipe, 6, 9, position)
    written(one, "a", seed=9)
    place = go_on(recipe, position, record)
    assert "one changed since step 5" in place.events[0] and "may be trained a second time" in place.events[0]
    rows, after = read(recipe, 6, 9, place.position)
    flat = [row for step in rows for row in step]
    assert [row for row in flat if row[0] == "one"] == [("one", "a.ds", window) for window in range(8)]
    assert [row for row in flat if row[0] == "two"] == [row for step in untouched for row in step if row[0] == "two"]
    assert tokens_of(after) == {"one": 18 * LENGTH, "two": 18 * LENGTH}  # what was really consumed
    # What was saved since goes on like any other, also after a second change.
    later = go_on(recipe, after, json.loads(json.dumps(place.record)))
    assert later.events == () and read(recipe, 10, 10, later.position)[0][0][0] == ("one", "a.ds", 8)
    without(one / "b.ds")
    again = go_on(recipe, after, place.record)
    assert read(recipe, 10, 10, again.position)[0][0][0] == ("one", "a.ds", 0)


def test_a_later_stage_of_another_length_reads_on_from_the_restart(folders):
    """The stage before read 10 samples, began again and read 8: 8 x 32 tokens are 16 samples of 16."""
    one, two = folders
    recipe = given(one, two, data={"on_change": "restart-source"})
    _, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    written(one, "a", seed=9)
    place = go_on(recipe, position, record)
    _, after = read(recipe, 6, 9, place.position)
    sources = [{"path": str(one)}]
    stages = [recipe.data.stages[0].model_dump(), {"name": "later", "start_step": 10, "sources": sources}]
    longer = given(data={"sequence_length": LENGTH // 2, "stages": stages}, schedule={"train_steps": 20})
    assert read(longer, 10, 10, after)[0][0][0] == ("one", "a.ds", 16)


# --- held-out data, and records ---------------------------------------------------------------------------------------


def test_held_out_data_that_changed_is_said_and_not_refused(folders):
    one, two = folders
    held_out = {"every_steps": 2, "sequences": WINDOWS, "sources": [{"path": str(two)}]}
    recipe = given(one, evaluation=held_out)
    _, position = read(recipe, 1, 5, None)
    record = recorded(recipe)
    written(two, "c", seed=9)
    assert go_on(recipe, position, record).events == ()  # the first rows are the same
    more = given(one, evaluation={**held_out, "sequences": WINDOWS + 1})
    assert "can no longer be compared" in go_on(more, position, record).events[0]
    another_token(two / "b.ds")
    assert "can no longer be compared" in go_on(recipe, position, record).events[0]
    written(two, "a", seed=9)
    event = go_on(recipe, position, record).events[0]
    assert event.startswith(
        "evaluation: two changed since step 5: 2 files added (a.ds, c.ds), 1 file with other tokens"
    )


def test_a_file_of_any_size_is_known_by_a_few_reads(tmp_path, monkeypatch):
    path, size = tmp_path / "a.ds", 1 << 36
    path.touch()
    os.truncate(path, size)
    taken = list[int]()
    real = os.pread

    def counted(descriptor: int, length: int, at: int) -> bytes:
        taken.append(length)
        return real(descriptor, length, at)

    monkeypatch.setattr(os, "pread", counted)
    tokens = TokenFile(path=path, token_size=2, tokens=size // 2, tokenizer=None, documents=None, has_loss=False)
    folder = TokenFolder(tmp_path, LENGTH, [tokens], name="a")
    before = record_of({"a": folder})
    assert sum(taken) <= 1 << 18
    for at in (0, size // 3, size - 1):
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"\1")
        now = record_of({"a": folder})
        assert now != before
        before = now


# --- through the run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run of 4 steps over a folder of one file, and the folder."""
    place = tmp_path_factory.mktemp("trained")
    written(place / "tokens", "b", seed=0)
    document = recipe_document(SOURCE, place / "tokens", checkpoints={"every_steps": 2})
    train(document, place / "run")
    return place / "run", place / "tokens"


@pytest.fixture
def run(trained, tmp_path) -> Iterator[tuple[Path, Path]]:
    """A copy whose folder of tokens lies at the path of the original's recipe."""
    saved, tokens = trained
    kept = shutil.copytree(tokens, tmp_path / "kept")
    yield shutil.copytree(saved, tmp_path / "run"), tokens
    shutil.rmtree(tokens)
    shutil.copytree(kept, tokens)


def goes_on(tokens: Path, **changes: Any) -> dict[str, Any]:
    return recipe_document(SOURCE, tokens, schedule={"train_steps": 8}, **changes)


def test_a_run_goes_on_in_a_longer_folder_as_if_it_had_never_stopped(run, tmp_path):
    saved, tokens = run
    written(tokens, "c", seed=5)
    train(goes_on(tokens), saved)
    train(goes_on(tokens), tmp_path / "never stopped")
    assert losses(saved) == losses(tmp_path / "never stopped")
    assert "b.ds" in RunState.read(step_folder(saved, 8)).token_files[str(tokens)]
    events = [json.loads(line) for line in (saved / "events.jsonl").read_text().splitlines()]
    assert any("1 file at the end (c.ds)" in str(event) for event in events)


def test_a_run_and_its_dry_run_refuse_a_file_before_others_in_the_same_words(run):
    import yaml

    saved, tokens = run
    written(tokens, "a", seed=5)
    ended = work(goes_on(tokens), saved, resume=str(step_folder(saved, 4)))
    assert not (saved / "resume-from").exists()  # a path that was refused is not remembered
    assert ended.code == 2 and "the files of tokens changed since step 4: 1 file added (a.ds)" in ended.message
    recipe = saved / "recipe.resolved.yaml"
    recipe.write_text(yaml.safe_dump(goes_on(tokens, output=str(saved))))
    dry = run_cli("continue-train", recipe, "--dry-run", before="import smolconv.commands.continue_train")
    assert dry.code == 2 and ended.failure["message"].splitlines()[0] in dry.stderr
    said = run_cli(
        "continue-train", recipe, "--dry-run", "--set", "data.on_change=restart-source",
        before="import smolconv.commands.continue_train",
    )  # fmt: skip
    assert said.code == 0 and "restarts from its first sample" in said.stderr


@pytest.mark.parametrize("named", [None, 4])
def test_a_branch_compares_with_what_its_source_recorded(named, run):
    saved, tokens = run
    recipe = recipe_of(step_folder(saved, 4), tokens, start={"data": True, "learning_rate": True})
    source = read_checkpoint(saved / "checkpoints", ReadOptions(step=named))
    assert source_place(recipe, source, 4, VOCABULARY).events == ()  # control
    moved = tokens.with_name("moved")
    shutil.copytree(tokens, moved)
    renamed = recipe_document(
        step_folder(saved, 4), moved, start={"data": True, "learning_rate": True},
        data={"stages": [{"name": "only", "sources": [{"path": str(moved), "recorded_as": str(tokens)}]}]},
    )  # fmt: skip
    assert source_place(Recipe.model_validate(renamed), source, 4, VOCABULARY).events == ()
    written(moved, "a", seed=5)
    with pytest.raises(UsageError, match=r"moved changed since step 4 of the source: 1 file added \(a\.ds\)"):
        source_place(Recipe.model_validate(renamed), source, 4, VOCABULARY)
    renamed["data"]["on_change"] = "restart-source"
    place = source_place(Recipe.model_validate(renamed), source, 4, VOCABULARY)
    assert read(Recipe.model_validate(renamed), 5, 5, place.position)[0][0][0] == ("moved", "a.ds", 0)
    shutil.rmtree(moved)


def test_a_branch_is_told_that_its_source_has_decayed(run):
    """The source's rate fell over steps 3 and 4; the branch, which takes its step, would decay after step 8."""
    saved, tokens = run
    own = step_folder(saved, 4)
    falls = {"train_steps": 4, "peak_lr": 1e-3, "warmup_steps": 0, "decay": "linear", "decay_steps": 2}
    replace(RunState.read(own), schedule=falls).write(own)
    longer = {**falls, "train_steps": 10}
    for learning_rate in (True, False):
        branch = recipe_of(own, tokens, schedule=longer, start={"learning_rate": learning_rate})
        events = source_place(branch, read_own(own), 4 if learning_rate else 0, VOCABULARY).events
        assert bool(events) == learning_rate
        if learning_rate:
            assert "Step 4 trained at 0.0005; step 5 will at 0.001." in events[0]
            assert f"resume from it with model.source: {step_folder(saved, 2)}." in events[0]


def test_a_checkpoint_of_an_early_version_goes_on_and_it_is_said_that_nothing_can_be_compared(run):
    saved, tokens = run
    own = step_folder(saved, 4)
    state = replace(RunState.read(own), token_files={})
    written(tokens, "a", seed=5)
    place = own_place(recipe_of(SOURCE, tokens, schedule={"train_steps": 8}), own, state, VOCABULARY)
    assert place.position == state.position and "step-4 has no record of its token files" in place.events[0]
    done = own_place(recipe_of(SOURCE, tokens), own, state, VOCABULARY)
    assert done.events == ()  # nothing is read any more
