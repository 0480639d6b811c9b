"""Token files, blending and the order of data, against what datatrove and nanotron do with the same files.

``fixtures/datatrove`` was written, and ``expected.json`` computed, by datatrove (its README says how). Blending is
compared with the formula of nanotron's ``build_blending_indices``, written out sample by sample.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from smolconv.checkpoint import DataStage
from smolconv.continual_pretraining.data.blending import Blend
from smolconv.continual_pretraining.data.folders import open_folders, open_held_out
from smolconv.continual_pretraining.data.position import BEGINNING, position_from_stages, stages_of
from smolconv.continual_pretraining.data.stream import StepData, TrainingData, evaluation_batches
from smolconv.continual_pretraining.recipe.schema import Data, Source
from smolconv.continual_pretraining.tokens.files import IGNORED_LABEL, Batch, RowReader, TokenFolder, Wanted
from smolconv.errors import CorruptFile, MissingFile, MixedCheckpoint, SmolconvError, SourceChanged, UsageError
from smolconv.layouts.nanotron.reader import read_nanotron

ORACLE = Path(__file__).parent.parent / "fixtures" / "datatrove"
EXPECTED = json.loads((ORACLE / "expected.json").read_text())
FOLDERS = sorted(EXPECTED["folders"])
SMOLLM2_VOCABULARY, LLAMA3_VOCABULARY = 49152, 128256

# Real mixtures have large and tiny shares; equal ones make ties, which rounding must not decide otherwise.
MIXTURES = {
    "one": [3.0],
    "halves": [1, 1],
    "thirds": [1, 1, 1],
    "tenths": [0.1] * 10,
    "large and tiny": [0.9989, 0.001, 0.0001],
    "twelve": [0.333, 0.37, 0.02, 0.01, 0.005, 0.01, 0.1, 0.08, 0.03, 0.02, 0.017, 0.005],
    "random": np.random.default_rng(1).dirichlet([0.5] * 12).tolist(),
}


def eos_of(folder: str) -> int | None:
    return EXPECTED["folders"][folder]["eos_token_id"]


def vocabulary_of(folder: str) -> int:
    return LLAMA3_VOCABULARY if folder == "shuffled_4byte" else SMOLLM2_VOCABULARY


def recipe_data(stages: Sequence[dict[str, Any]], **fields: Any) -> Data:
    return Data.model_validate({"sequence_length": 127, "eos_token_id": 0, "stages": stages, **fields})


def one_stage(*sources: str | Path, weights: Sequence[float] | None = None) -> list[dict[str, Any]]:
    shares = weights or [1.0] * len(sources)
    return [{"name": "s", "sources": [{"path": str(path), "weight": w} for path, w in zip(sources, shares)]}]


def open_data(data: Data, **options: Any) -> TrainingData:
    defaults = {
        "global_batch_sequences": 12,
        "micro_batch_sequences": 2,
        "vocab_size": None,
        "rank": 0,
        "world_size": 1,
    }
    return TrainingData(data, **{**defaults, **options})


def read_all(folder: TokenFolder, **options: Any) -> Batch:
    everything = np.arange(folder.windows)
    return RowReader(sequence_length=folder.sequence_length, **options).read(
        [Wanted(folder, everything, everything)], folder.windows
    )


def same(one: Batch, other: Batch) -> bool:
    arrays = ("input_ids", "positions", "labels")
    return one.rows == other.rows and all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)


def whole(step: StepData) -> Batch:
    parts = step.micro_batches
    joined = {a: np.concatenate([getattr(part, a) for part in parts]) for a in ("input_ids", "positions", "labels")}
    return Batch(**joined, rows=tuple(itertools.chain.from_iterable(part.rows for part in parts)))


def copy_of(folder: str, tmp_path: Path, name: str | None = None) -> Path:
    return Path(shutil.copytree(ORACLE / folder, tmp_path / (name or folder)))


def write_tokens(
    folder: Path, tokens: npt.ArrayLike, ends: npt.ArrayLike, dtype: str = "<u2", name: str = "0.ds"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.array(tokens, dtype).tofile(folder / name)
    np.array(ends, "<u8").tofile(folder / f"{name}.index")
    return folder


# --- one folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [127, 1024])
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("boundaries", ["eos", "index"])
def test_windows_are_those_of_datatroves_reader(name: str, length: int, boundaries: str) -> None:
    if boundaries == "eos" and eos_of(name) is None:
        pytest.skip("written without an EOS")
    expected = EXPECTED["folders"][name]["windows"][f"seq_len_{length}"]
    eos = eos_of(name) if boundaries == "eos" else None
    folder = TokenFolder.open(ORACLE / name, length, vocab_size=vocabulary_of(name), eos_token_id=eos)
    assert [file.path.name for file in folder.files] == expected["file_order"]
    assert folder.windows == expected["n_windows"]
    batch = read_all(folder, eos_token_id=eos, boundaries=boundaries, loss_masks=False)
    plain = read_all(folder, mask_documents=False, loss_masks=False)
    for window, sample in expected["sample"].items():
        at = int(window)
        ids = np.append(batch.input_ids[at], plain.labels[at, -1])
        if isinstance(sample["input_ids"], dict):
            assert hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest() == sample["input_ids"]["sha256"]
        else:
            assert ids.tolist() == sample["input_ids"]
        zeros = sample["zero_positions"]
        if name == "loss_2byte" or (name, boundaries) == ("chunked_2byte", "index"):
            # datatrove's reader of the index misses empty documents, and expected.json has only EOS for cut ones.
            (file,) = EXPECTED["folders"][name]["files"].values()
            start = at * (length + 1)
            zeros = sorted({0, *(end - start for end in file["doc_ends"] if start < end <= start + length)})
        assert np.flatnonzero(batch.positions[at] == 0).tolist() == [place for place in zeros if place < length]
        assert np.flatnonzero(batch.labels[at] == IGNORED_LABEL).tolist() == [place - 1 for place in zeros if place]


@pytest.mark.parametrize("name", FOLDERS)
def test_documents_of_the_index_are_the_documents_that_were_written(name: str) -> None:
    folder = TokenFolder.open(ORACLE / name, 127)
    eos = [] if eos_of(name) is None else [eos_of(name)]
    for file in folder.files:
        expected = EXPECTED["folders"][name]["files"][file.path.name]
        assert file.ends.tolist() == expected["doc_ends"]
        assert file.tokens == expected["tokens"] and file.documents == len(expected["doc_ends"])
        begins = [0, *expected["doc_ends"][:-1]]
        for begin, end, number in zip(begins, expected["doc_ends"], expected["doc_order"]):
            if number is not None and vocabulary_of(name) == SMOLLM2_VOCABULARY:
                assert file.ids[begin:end].tolist() == EXPECTED["documents"][number]["smollm2_tokens"] + eos


def slow_rows(folder: TokenFolder, boundaries: str, eos: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Positions and labels token by token, from the definition."""
    length, positions, labels = folder.sequence_length, [], []
    for file in folder.files:
        begins = (
            set(file.ends.tolist()) if boundaries == "index" else {i + 1 for i, t in enumerate(file.ids) if t == eos}
        )
        for start in range(0, file.tokens - length, length + 1):
            row, count = [], 0
            for at in range(start, start + length):
                count = 0 if at == start or at in begins else count + 1
                row.append(count)
            positions.append(row)
            labels.append([
                IGNORED_LABEL if at in begins or (file.has_loss and not file.losses[at]) else int(file.ids[at])
                for at in range(start + 1, start + length + 1)
            ])  # fmt: skip
    return positions, labels


@pytest.mark.parametrize("boundaries", ["eos", "index"])
@pytest.mark.parametrize("name", ["chunked_2byte", "loss_2byte", "split_2byte", "shuffled_4byte"])
def test_positions_and_labels_follow_their_definition(name: str, boundaries: str) -> None:
    """Also where documents are cut or empty, which datatrove's own reader of the index misses."""
    folder = TokenFolder.open(ORACLE / name, 127)
    batch = read_all(folder, boundaries=boundaries, eos_token_id=eos_of(name))
    positions, labels = slow_rows(folder, boundaries, eos_of(name))
    assert batch.positions.tolist() == positions
    assert batch.labels.tolist() == labels


def test_chunks_that_cut_documents_are_seen_only_by_the_index() -> None:
    folder = TokenFolder.open(ORACLE / "chunked_2byte", 127)
    by_eos, by_index = (read_all(folder, boundaries=b, eos_token_id=0) for b in ("eos", "index"))
    assert (by_index.positions == 0).sum() > (by_eos.positions == 0).sum()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_boundaries_at_every_place_of_a_row(tmp_path: Path, length: int) -> None:
    """Empty documents at the start, in the middle and at the end, EOS on the last input and on the last label."""
    rng = np.random.default_rng(length)
    for case in range(20):
        tokens = rng.integers(0, 4, 60)
        ends = np.sort(np.append(rng.integers(0, 61, 25), 60))
        folder = TokenFolder.open(write_tokens(tmp_path / f"{case}", tokens, ends), length, vocab_size=4)
        for boundaries in ("eos", "index"):
            batch = read_all(folder, boundaries=boundaries, eos_token_id=0)
            assert (batch.positions.tolist(), batch.labels.tolist()) == slow_rows(folder, boundaries, 0)


def test_without_document_masks_rows_are_single_sequences() -> None:
    folder = TokenFolder.open(ORACLE / "plain_2byte", 127)
    batch = read_all(folder, mask_documents=False)
    assert (batch.positions == np.arange(127)).all()
    windows = folder.files[0].ids[: folder.windows * 128].reshape(-1, 128)
    assert (batch.input_ids == windows[:, :-1]).all() and (batch.labels == windows[:, 1:]).all()


def test_loss_masks_can_be_left_aside() -> None:
    folder = TokenFolder.open(ORACLE / "loss_2byte", 127)
    masked, plain = (read_all(folder, mask_documents=False, loss_masks=masks) for masks in (True, False))
    used = folder.windows * 128
    zeros = (folder.files[0].losses[:used].reshape(-1, 128)[:, 1:] == 0).sum()
    assert (masked.labels == IGNORED_LABEL).sum() == zeros > 2000
    assert not (plain.labels == IGNORED_LABEL).any()


def test_rows_end_with_each_file_and_tails_are_dropped() -> None:
    folder = TokenFolder.open(ORACLE / "split_2byte", 1024)
    per_file = EXPECTED["folders"]["split_2byte"]["windows"]["seq_len_1024"]["per_file"]
    files = [row.file for row in read_all(folder, mask_documents=False).rows]
    assert [len(list(group)) for _, group in itertools.groupby(files)] == per_file


def test_file_seed_permutes_files_as_nanotron_does() -> None:
    files = [file.path.name for file in TokenFolder.open(ORACLE / "split_2byte", 127).files]
    permuted = [file.path.name for file in TokenFolder.open(ORACLE / "split_2byte", 127, file_seed=6).files]
    # nanotron: rand = np.random.default_rng(seed); rand.permutation(range(len(files)))
    assert permuted == [files[i] for i in np.random.default_rng(6).permutation(range(5))] != files


def test_token_size_is_found_without_metadata(tmp_path: Path) -> None:
    for name in ("shuffled_4byte", "plain_2byte"):
        for suffixes in (["metadata"], ["metadata", "index"]):
            folder = copy_of(name, tmp_path, f"{name}-{len(suffixes)}")
            for file in [path for suffix in suffixes for path in folder.glob(f"*.{suffix}")]:
                file.unlink()
            found = TokenFolder.open(folder, 127, vocab_size=vocabulary_of(name))
            assert found.token_size == EXPECTED["folders"][name]["token_size"]


def test_the_mergers_total_is_not_a_file() -> None:
    assert (ORACLE / "merged_2byte" / "merged.ds.metadata").exists()
    assert [file.path.name for file in TokenFolder.open(ORACLE / "merged_2byte", 127).files] == ["000_merged.ds"]


# --- blending --------------------------------------------------------------------------------------------------------


def nanotrons_blend(weights: Sequence[float], samples: int) -> list[int]:
    """argmax of weight * max(i, 1) - count in float64, the first of equals; weights as numpy normalises them."""
    shares = np.array(weights, dtype=np.float64)
    shares = (shares / np.sum(shares)).tolist()
    counts, chosen = [0] * len(shares), []
    for i in range(samples):
        at = max(float(i), 1.0)
        best = max(range(len(shares)), key=lambda d: (shares[d] * at - float(counts[d]), -d))
        counts[best] += 1
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("mixture", MIXTURES)
def test_blend_is_nanotrons(mixture: str) -> None:
    weights = MIXTURES[mixture]
    expected = nanotrons_blend(weights, 70_000)  # more than what is computed in one go
    blend, taken = Blend(weights), []
    for samples in (1, 7, 576, 0, 60_000, 9_416):
        taken += blend.take(samples).tolist()
    assert taken == expected
    assert blend.counts == tuple(expected.count(d) for d in range(len(weights)))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_blend_goes_on_from_its_counts(mixture: str) -> None:
    weights = MIXTURES[mixture]
    blend = Blend(weights)
    blend.skip(12_345)
    again = Blend(weights, blend.counts)
    assert np.array_equal(blend.take(80_000), again.take(80_000)) and blend.counts == again.counts


def test_blend_is_nanotrons_after_billions_of_samples() -> None:
    """Products and counts are large there, and float64 rounds them."""
    weights = MIXTURES["twelve"]
    shares = np.array(weights) / np.sum(weights)
    counts = [int(count) for count in np.floor(shares * 3_000_000_000)]
    counts[0] += 3_000_000_000 - sum(counts)
    blend, expected = Blend(weights, counts), []
    for i in range(3_000_000_000, 3_000_003_000):
        best = max(range(12), key=lambda d: (float(shares[d]) * float(i) - float(counts[d]), -d))
        counts[best] += 1
        expected.append(best)
    assert blend.take(3000).tolist() == expected


def test_counts_of_another_blend_give_another_order() -> None:
    blend = Blend([0.7, 0.3])
    blend.skip(1000)
    one, other = blend.counts
    assert not np.array_equal(Blend([0.7, 0.3], (one - 1, other + 1)).take(10), blend.take(10))


# --- steps -----------------------------------------------------------------------------------------------------------

TWO_STAGES: list[dict[str, Any]] = [
    {
        "name": "stable",
        "sources": [
            {"path": str(ORACLE / "plain_2byte"), "weight": 6},
            {"path": str(ORACLE / "shuffled_2byte"), "weight": 3, "name": "mixed"},
            {"path": str(ORACLE / "loss_2byte"), "weight": 1},
        ],
    },
    {
        "name": "decay",
        "start_step": 9,
        "sources": [
            {"path": str(ORACLE / "split_2byte"), "weight": 1},
            {"path": str(ORACLE / "shuffled_2byte"), "weight": 1, "name": "mixed"},
        ],
    },
]


def test_every_step_reads_what_nanotron_would(tmp_path: Path) -> None:
    """Blend anew in each stage, folders read on from earlier stages, and begun again after their last window."""
    data, per_step = recipe_data(TWO_STAGES), 60
    folders = {s.path: TokenFolder.open(s.path, 127) for stage in data.stages for s in stage.sources}
    read = dict.fromkeys(folders, 0)
    expected = []
    for stage, count in zip(data.stages, (8, 7)):
        for d in nanotrons_blend([source.weight for source in stage.sources], count * per_step):
            path = stage.sources[d].path
            expected.append((folders[path], read[path] % folders[path].windows))
            read[path] += 1
    assert read[str(ORACLE / "shuffled_2byte")] > folders[str(ORACLE / "shuffled_2byte")].windows  # it wraps

    steps = list(open_data(data, global_batch_sequences=per_step).read_steps(1, 15))
    assert [step.stage for step in steps] == ["stable"] * 8 + ["decay"] * 7
    got = [row for step in steps for batch in step.micro_batches for row in batch.rows]
    for row, (folder, sample) in zip(got, expected, strict=True):
        number, window = folder.places(np.array([sample]))
        assert (row.file, row.window) == (str(folder.files[number[0]].path), window[0])
    names = {str(ORACLE / "shuffled_2byte"): "mixed"}
    assert steps[-1].tokens == {names.get(path, Path(path).name): count * 127 for path, count in read.items()}
    assert sum(steps[-1].tokens.values()) == 15 * per_step * 127
    assert len(steps[7].tokens) == 3  # of sources that have begun


def test_rows_of_a_step_hold_what_their_names_say() -> None:
    folders = {source["path"]: TokenFolder.open(source["path"], 127) for s in TWO_STAGES for source in s["sources"]}
    everything = {row: at for path in folders for at in [read_all(folders[path], eos_token_id=0)] for row in at.rows}
    for step in open_data(recipe_data(TWO_STAGES)).read_steps(8, 9):
        for batch in step.micro_batches:
            for i, row in enumerate(batch.rows):
                alone = next(at for key, at in everything.items() if key[1:] == row[1:])
                j = [key[1:] for key in alone.rows].index(row[1:])
                for array in ("input_ids", "positions", "labels"):
                    assert np.array_equal(getattr(batch, array)[i], getattr(alone, array)[j])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_data_order_is_the_same_for_every_world_size(world_size: int) -> None:
    data = recipe_data(TWO_STAGES)
    options = {"global_batch_sequences": 24, "micro_batch_sequences": 2, "world_size": world_size}
    alone = list(open_data(data, **{**options, "world_size": 1}).read_steps(7, 11))
    ranks = [list(open_data(data, **options, rank=rank).read_steps(7, 11)) for rank in range(world_size)]
    for number, step in enumerate(alone):
        assert len({len(rank[number].micro_batches) for rank in ranks}) == 1
        for m, batch in enumerate(step.micro_batches):
            assert same(batch, ranks[m % world_size][number].micro_batches[m // world_size])
        for rank in ranks:
            assert rank[number].position == step.position and rank[number].tokens == step.tokens


def test_the_micro_batch_only_cuts_the_rows() -> None:
    data = recipe_data(TWO_STAGES)
    wholes = [
        [whole(step) for step in open_data(data, micro_batch_sequences=size).read_steps(1, 3)] for size in (1, 4, 12)
    ]
    for other in wholes[1:]:
        assert all(same(a, b) for a, b in zip(wholes[0], other, strict=True))


@pytest.mark.parametrize("stopped_after", [1, 4, 8, 9, 13])
def test_going_on_from_a_position_is_never_having_stopped(stopped_after: int) -> None:
    data = recipe_data(TWO_STAGES)
    steps = list(open_data(data).read_steps(1, 16))
    position = json.loads(json.dumps(steps[stopped_after - 1].position))
    for options in ({"position": position}, {}):  # without a position the blend is replayed
        again = list(open_data(data, **options).read_steps(stopped_after + 1, 16))
        for one, other in zip(steps[stopped_after:], again, strict=True):
            assert one.position == other.position and one.tokens == other.tokens
            assert all(same(a, b) for a, b in zip(one.micro_batches, other.micro_batches, strict=True))


def test_a_position_off_by_one_step_gives_other_rows() -> None:
    data = recipe_data(TWO_STAGES)
    steps = list(open_data(data).read_steps(1, 6))
    late = next(iter(open_data(data, position=steps[3].position).read_steps(6, 6)))
    assert late.micro_batches[0].rows != steps[5].micro_batches[0].rows


def test_the_beginning_is_a_position_for_any_step() -> None:
    data = recipe_data(TWO_STAGES)
    first = next(iter(open_data(data).read_steps(1, 1)))
    later = next(iter(open_data(data, position=BEGINNING).read_steps(5, 5)))
    assert later.step == 5 and same(whole(first), whole(later))


def test_folders_of_stages_left_behind_may_be_gone(tmp_path: Path) -> None:
    stages = json.loads(json.dumps(TWO_STAGES))
    gone = copy_of("plain_2byte", tmp_path)
    stages[0]["sources"][0]["path"] = str(gone)
    data = recipe_data(stages)
    position = list(open_data(data).read_steps(1, 9))[-1].position
    shutil.rmtree(gone)
    assert next(iter(open_data(data, position=position).read_steps(10, 10))).stage == "decay"
    with pytest.raises(MissingFile):
        open_data(data)


def test_a_changed_blend_is_refused_within_its_stage() -> None:
    position = next(iter(open_data(recipe_data(TWO_STAGES)).read_steps(1, 1))).position
    heavier, shorter = json.loads(json.dumps(TWO_STAGES)), json.loads(json.dumps(TWO_STAGES))
    heavier[0]["sources"][0]["weight"] = 7
    del shorter[0]["sources"][2]
    for stages, fields in ((heavier, {}), (shorter, {}), (TWO_STAGES, {"sequence_length": 63})):
        with pytest.raises(UsageError, match="stage stable began with"):
            next(iter(open_data(recipe_data(stages, **fields), position=position).read_steps(2, 2)))


def test_epochs_are_passes_over_the_folders() -> None:
    data = recipe_data(TWO_STAGES)
    training = open_data(data, global_batch_sequences=60)
    last = list(training.read_steps(1, 15))[-1]
    windows = {folder.name: folder.windows for folder in training.folders.values()}
    for name, passes in training.epochs(15).items():
        assert passes == pytest.approx(last.tokens[name] / 127 / windows[name], abs=2 / windows[name])
    resumed = open_data(data, global_batch_sequences=60, position=list(training.read_steps(1, 10))[-1].position)
    for name, passes in resumed.epochs(15).items():
        assert passes == pytest.approx(training.epochs(15)[name], abs=2 / windows[name])


def test_world_size_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be divided among 4 ranks"):
        open_data(recipe_data(TWO_STAGES), world_size=4)


def test_sources_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    plain, copied = ORACLE / "plain_2byte", copy_of("plain_2byte", tmp_path)
    sources: list[dict[str, object]] = [{"path": str(plain), "name": "a"}, {"path": f"{plain}/", "name": "b"}]
    with pytest.raises(UsageError, match="twice"):
        open_data(recipe_data([{"name": "s", "sources": sources}]))
    sources[1] = {"path": os.path.relpath(plain), "name": "b"}
    with pytest.raises(UsageError, match="twice, also as"):
        open_data(recipe_data([{"name": "s", "sources": sources}]))
    later = {**one_stage(copied)[0], "name": "later", "start_step": 2}
    with pytest.raises(UsageError, match="two sources are named plain_2byte"):
        open_data(recipe_data([*one_stage(plain), later]))


def test_another_spelling_of_a_folder_continues_where_the_stage_before_ended() -> None:
    path = str(ORACLE / "plain_2byte")
    for other in (path, path.replace("/plain", "//./plain") + "/"):
        later = {**one_stage(other)[0], "name": "later", "start_step": 3}
        opened = open_data(recipe_data([*one_stage(path), later]))
        rows = [batch.rows for step in opened.read_steps(1, 4) for batch in step.micro_batches]
        windows = [row.window for each in rows for row in each]
        assert windows == list(range(len(windows))), other


def test_a_folder_of_each_token_size_can_be_blended() -> None:
    two, four = ORACLE / "plain_2byte", ORACLE / "shuffled_4byte"
    data = recipe_data(one_stage(two, four), boundaries="index")
    step = whole(next(iter(open_data(data, vocab_size=LLAMA3_VOCABULARY).read_steps(1, 1))))
    for path in (two, four):
        alone = read_all(TokenFolder.open(path, 127), boundaries="index")
        rows = [i for i, row in enumerate(step.rows) if row.source == path.name]
        assert len(rows) == 6
        assert np.array_equal(step.input_ids[rows], alone.input_ids[:6])
        assert np.array_equal(step.positions[rows], alone.positions[:6])


def test_rows_are_described_by_their_documents() -> None:
    data = open_data(recipe_data(one_stage(ORACLE / "plain_2byte")))
    batch = next(iter(data.read_steps(1, 1))).micro_batches[1]
    ends = EXPECTED["folders"]["plain_2byte"]["files"]["00000_unshuffled.ds"]["doc_ends"]
    first, last = (next(n for n, end in enumerate(ends) if end > token) for token in (256, 383))
    path = ORACLE / "plain_2byte" / "00000_unshuffled.ds"
    assert data.describe(batch)[0] == f"plain_2byte: {path}, tokens 256 to 383, documents {first} to {last}"


# --- prefetch --------------------------------------------------------------------------------------------------------


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data"]


def test_prefetched_steps_are_the_same_steps() -> None:
    data = open_data(recipe_data(TWO_STAGES))
    for one, other in zip(data.steps(1, 12), data.read_steps(1, 12), strict=True):
        assert one.position == other.position and same(whole(one), whole(other))
    assert not data_threads()


def test_close_ends_the_thread_in_the_middle() -> None:
    data = open_data(recipe_data(TWO_STAGES))
    steps = data.steps(1, 1_000_000)
    next(steps)
    assert len(data_threads()) == 1
    data.close()
    assert not data_threads()
    assert list(steps) == []


def test_a_bad_row_is_told_in_its_own_step_though_small_steps_are_read_together(tmp_path: Path) -> None:
    folder = copy_of("plain_2byte", tmp_path)
    path = folder / "00000_unshuffled.ds"
    tokens = np.fromfile(path, "<u2")
    data = open_data(
        recipe_data(one_stage(folder)), vocab_size=SMOLLM2_VOCABULARY, global_batch_sequences=1, micro_batch_sequences=1
    )
    tokens[30 * 128 + 5] = 50_000
    tokens.tofile(path)  # after the folder was checked
    read = []
    with pytest.raises(CorruptFile, match="is 50000"):
        for step in data.read_steps(1, 100):
            read.append(step.step)
    assert read == list(range(1, 31))


def test_a_folder_may_have_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    for number in range(600):
        write_tokens(tmp_path / "many", [number % 7 + 1, 0, 3, 0], [2, 4], name=f"{number:05d}.ds")
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
from smolconv.continual_pretraining.data.stream import TrainingData
from smolconv.continual_pretraining.recipe.schema import Data
stages = [{{"name": "s", "sources": [{{"path": {str(tmp_path / "many")!r}}}]}}]
data = TrainingData(
    Data.model_validate({{"sequence_length": 3, "eos_token_id": 0, "boundaries": "index", "stages": stages}}),
    global_batch_sequences=4, micro_batch_sequences=4, vocab_size=8, rank=0, world_size=1,
)
print(sum(int(step.micro_batches[0].input_ids[:, 0].sum()) for step in data.steps(1, 150)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.strip()) == ("", str(sum(number % 7 + 1 for number in range(600))))


def test_ranks_share_what_one_of_them_opened() -> None:
    data = recipe_data(TWO_STAGES)
    opened = open_folders(data, None, SMOLLM2_VOCABULARY)
    assert all(file.ids.size for folder in opened.values() for file in folder.files)
    sent = pickle.dumps(opened)  # tables, not tokens
    assert len(sent) < 10_000
    mine = open_data(data, vocab_size=SMOLLM2_VOCABULARY)
    theirs = open_data(data, vocab_size=SMOLLM2_VOCABULARY, folders=pickle.loads(sent))
    for one, other in zip(mine.read_steps(1, 20), theirs.read_steps(1, 20)):
        assert (one.position, one.tokens) == (other.position, other.tokens)
        for a, b in zip(one.micro_batches, other.micro_batches):
            assert a.rows == b.rows and (a.labels == b.labels).all()


def test_errors_of_the_thread_are_raised_where_steps_are_taken(tmp_path: Path) -> None:
    folder = copy_of("plain_2byte", tmp_path)
    path = folder / "00000_unshuffled.ds"
    tokens = np.fromfile(path, "<u2")
    beyond = 30 * 128 + 5  # in window 30, further than what is looked at in one step
    tokens[beyond] = 50_000
    data = open_data(recipe_data(one_stage(folder)), vocab_size=SMOLLM2_VOCABULARY)
    tokens.tofile(path)  # after the folder was checked
    steps = data.steps(1, 100)
    assert [next(steps).step, next(steps).step] == [1, 2]
    with pytest.raises(CorruptFile, match=f"token {beyond} is 50000"):
        list(steps)
    assert not data_threads()


# --- what is refused -------------------------------------------------------------------------------------------------


def tokens_file(folder: Path) -> Path:
    return folder / "00000_unshuffled.ds"


def add_bytes(suffix: str, extra: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with Path(f"{tokens_file(folder)}{suffix}").open("ab") as file:
            file.write(extra)

    return change


def edit_index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = Path(f"{tokens_file(folder)}.index")
        change(np.fromfile(path, "<u8")).tofile(path)

    return edit


def swap(ends: Any) -> Any:
    ends[[10, 11]] = ends[[11, 10]]
    return ends


def metadata(text: str) -> Callable[[Path], None]:
    return lambda folder: void(Path(f"{tokens_file(folder)}.metadata").write_text(text))


def void(_: object) -> None:
    return None


def into_subfolder(folder: Path) -> None:
    folder.rename(folder.parent / "x")
    folder.mkdir()
    (folder.parent / "x").rename(folder / "x")


def second_tokenizer(folder: Path) -> None:
    for suffix in ("", ".index"):
        shutil.copy(f"{tokens_file(folder)}{suffix}", folder / f"00001_unshuffled.ds{suffix}")
    (folder / "00001_unshuffled.ds.metadata").write_text("gpt2|2\n41908\n41.9 kT")


def instead(suffix: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def change(folder: Path) -> None:
        path = Path(f"{tokens_file(folder)}{suffix}")
        path.unlink()
        make(path)

    return change


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def beyond(ends: Any) -> Any:
    """Ascending as signed differences, though the entries in the middle are far beyond the file."""
    quarter = 1 << 62
    return np.array([quarter, 2 * quarter, 3 * quarter, ends[-1]], "<u8")


BROKEN: dict[str, tuple[Callable[[Path], None], type[SmolconvError], str]] = {
    "missing": (shutil.rmtree, MissingFile, "is not a folder"),
    "empty": (lambda f: void(list(map(Path.unlink, f.iterdir()))), MissingFile, r"holds no token files \(\*.ds\)"),
    "in a subfolder": (into_subfolder, MissingFile, "Some are in .*/x"),
    "half a token": (add_bytes("", b"\0"), CorruptFile, "83817 bytes, which is not a multiple of its token size"),
    "a token more": (add_bytes("", b"\0\0"), CorruptFile, "has 41909 tokens .* counts 41908"),
    "index of bytes": (add_bytes(".index", b"\0"), CorruptFile, "8 bytes a document"),
    "index too short": (edit_index(lambda ends: ends[:-1]), CorruptFile, "has 41908 tokens .* ends at"),
    "index falls": (edit_index(swap), CorruptFile, "document 11 ends at token .* before"),
    "metadata counts otherwise": (metadata("x|2\n41907\n41.9 kT"), CorruptFile, "counts 41907"),
    "metadata of another size": (metadata("x|4\n41908\n41.9 kT"), CorruptFile, "has 20954 tokens of 4 bytes"),
    "no metadata": (metadata("{}"), CorruptFile, "begins with"),
    "a count of thousands of digits": (metadata(f"x|2\n{'9' * 3000}\n"), CorruptFile, "begins with"),
    "index beyond the file": (edit_index(beyond), CorruptFile, "document 3 ends at token 41908, before"),
    "index of nothing": (edit_index(lambda ends: ends[:0]), CorruptFile, "has 41908 tokens .* ends at 0"),
    "loss of another length": (add_bytes(".loss", b"\1"), CorruptFile, "41909 bytes, but .* has 41908 tokens"),
    "two tokenizers": (second_tokenizer, MixedCheckpoint, "the tokenizer of 00001_unshuffled.ds is gpt2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case: str, tmp_path: Path) -> None:
    folder = copy_of("loss_2byte", tmp_path)
    TokenFolder.open(folder, 127, vocab_size=SMOLLM2_VOCABULARY, eos_token_id=0)  # as it was, it is accepted
    change, error, message = BROKEN[case]
    change(folder)
    with pytest.raises(error, match=message) as raised:
        TokenFolder.open(folder, 127, vocab_size=SMOLLM2_VOCABULARY, eos_token_id=0)
    assert type(raised.value) is error and len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize("suffix", ["", ".index", ".metadata", ".loss"])
@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (os.mkfifo, CorruptFile, "is a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), CorruptFile, "is a device"),
        (link_to_itself, MissingFile, "is a link that leads back to itself"),
        (lambda path: path.symlink_to("nothing"), MissingFile, "is a dangling link"),
    ],
    ids=["a pipe", "a device", "a loop", "a link to nothing"],
)
def test_what_is_no_regular_file_is_neither_waited_for_nor_passed_over(suffix, make, error, said, tmp_path) -> None:
    folder = copy_of("loss_2byte", tmp_path)
    instead(suffix, make)(folder)
    with pytest.raises(error, match=rf"00000_unshuffled\.ds{suffix} {said}"):
        TokenFolder.open(folder, 127)


def test_a_file_that_shrinks_after_it_was_opened_is_said(tmp_path: Path) -> None:
    folder = TokenFolder.open(copy_of("loss_2byte", tmp_path), 127)
    tokens_file(folder.path).write_bytes(b"")
    with pytest.raises(SourceChanged, match=r"00000_unshuffled\.ds is shorter"):
        folder.files[0].ids  # noqa: B018 - a look maps it


def test_a_sequence_longer_than_the_files_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not one window of data\.sequence_length 100000"):
        TokenFolder.open(ORACLE / "plain_2byte", 100_000)


def test_ids_beyond_the_vocabulary_are_refused_when_a_folder_is_opened() -> None:
    with pytest.raises(CorruptFile, match="vocabulary has 49152 entries"):
        TokenFolder.open(ORACLE / "shuffled_4byte", 127, vocab_size=SMOLLM2_VOCABULARY)


@pytest.mark.parametrize(
    ("name", "eos", "message"),
    [
        ("plain_2byte", 2, "0 of 200 documents end in data.eos_token_id 2 .* 200 end in 0"),
        ("shuffled_4byte", 128009, r"200 end in 128001(.|\n)*data.eos_token_id=128001"),
        ("noeos_2byte", 0, r"no other token either(.|\n)*data.boundaries: index"),
    ],
)
def test_a_wrong_eos_is_refused_with_the_right_one(name: str, eos: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_data(recipe_data(one_stage(ORACLE / name), eos_token_id=eos))
    right = recipe_data(one_stage(ORACLE / name), eos_token_id=eos, boundaries="index")
    assert open_data(right).folders


def test_a_wrong_eos_would_have_moved_boundaries() -> None:
    folder = TokenFolder.open(ORACLE / "plain_2byte", 127)
    right, wrong = (read_all(folder, eos_token_id=eos) for eos in (0, 198))
    assert not np.array_equal(right.positions, wrong.positions) and not np.array_equal(right.labels, wrong.labels)


def test_without_an_index_the_eos_must_occur(tmp_path: Path) -> None:
    folder = copy_of("plain_2byte", tmp_path)
    (folder / "00000_unshuffled.ds.index").unlink()
    TokenFolder.open(folder, 127, eos_token_id=0)
    with pytest.raises(UsageError, match="49151 does not occur in 41973 tokens"):
        TokenFolder.open(folder, 127, eos_token_id=49151)
    data = recipe_data(one_stage(folder), boundaries="index")
    with pytest.raises(MissingFile, match="every token file needs its index"):
        next(iter(open_data(data).read_steps(1, 1)))


# --- nanotron's record -----------------------------------------------------------------------------------------------


def test_a_run_of_nanotron_goes_on_where_it_was() -> None:
    data = recipe_data(TWO_STAGES)
    steps = list(open_data(data).read_steps(1, 13))
    stages = stages_of(steps[11].position)
    assert [stage.consumed_train_samples for stage in stages] == [96, 48]
    assert sum(stages[0].consumed_tokens_per_dataset_folder.values()) == 96 * 127
    position = json.loads(json.dumps(position_from_stages(stages, data, 12)))
    again = next(iter(open_data(data, position=position).read_steps(13, 13)))
    assert same(whole(again), whole(steps[12])) and again.tokens == steps[12].tokens
    assert stages_of(again.position) == stages_of(steps[12].position)


def test_nanotrons_own_record_becomes_a_position_and_comes_back() -> None:
    run = ORACLE.parent / "nanotron" / "smollm3-tiny" / "tp1-pp2-dp1-zero0"
    progress = read_nanotron(run).progress
    assert progress is not None and len(progress.stages) == 2
    stages: list[dict[str, Any]] = [
        {"name": "stable phase", "sources": [{"path": "datasets/stable-a"}, {"path": "datasets/stable-b"}]},
        {
            "name": "decay phase",
            "start_step": 3,
            "sources": [{"path": "datasets/decay-a"}, {"path": "datasets/decay-b"}],
        },
    ]
    position = position_from_stages(progress.stages, recipe_data(stages, sequence_length=32), progress.step)
    assert [[source["samples"] for source in stage["sources"]] for stage in position["stages"]] == [[4, 4], [2, 2]]
    assert stages_of(position) == progress.stages


def test_counts_that_nanotron_took_at_the_wrong_place_do_not_move_the_blend() -> None:
    data = recipe_data(TWO_STAGES)
    steps = list(open_data(data).read_steps(1, 13))
    stable, decay = stages_of(steps[11].position)
    split, mixed = (source["path"] for source in TWO_STAGES[1]["sources"])
    drifted = DataStage(
        name="decay", start_training_step=9, consumed_train_samples=48, sequence_length=127,
        consumed_tokens_per_dataset_folder={split: 25 * 127, mixed: 23 * 127},
    )  # fmt: skip
    assert drifted != decay
    position = position_from_stages((stable, drifted), data, 12)
    assert same(whole(next(iter(open_data(data, position=position).read_steps(13, 13)))), whole(steps[12]))


def test_a_new_stage_reads_folders_on_from_the_source() -> None:
    """The source ended in stage ``decay``; the recipe trains a stage of its own on one of its folders."""
    data = recipe_data(TWO_STAGES)
    last = list(open_data(data).read_steps(1, 12))[-1]
    mixed = str(ORACLE / "shuffled_2byte")
    mine = recipe_data([{"name": "mine", "sources": [{"path": mixed}]}])
    position = position_from_stages(stages_of(last.position), mine, 0)
    row = next(iter(open_data(mine, position=position).read_steps(1, 1))).micro_batches[0].rows[0]
    folder = TokenFolder.open(mixed, 127)
    number, window = folder.places(np.array([last.tokens["mixed"] // 127]))
    assert (row.file, row.window) == (str(folder.files[number[0]].path), window[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other", "paths": True}, "last stage is 'other' .* it read"),
        ({"paths": True}, r"did not read .*plain_2byte.*and read \['/elsewhere/plain_2byte"),
        ({"weight": 60}, "by the recipe's weights, stage 'stable' read"),
        ({"sequence_length": 255}, "in sequences of 255"),
    ],
)
def test_what_does_not_match_the_source_is_named(change: dict[str, Any], message: str) -> None:
    steps = list(open_data(recipe_data(TWO_STAGES)).read_steps(1, 5))
    (stage,) = stages_of(steps[-1].position)
    folders = dict(stage.consumed_tokens_per_dataset_folder or {})
    if "paths" in change:
        folders = {f"/elsewhere/{Path(path).name}": tokens for path, tokens in folders.items()}
    record = DataStage(
        name=change.get("name", "stable"), start_training_step=1, consumed_train_samples=stage.consumed_train_samples,
        sequence_length=change.get("sequence_length", 127), consumed_tokens_per_dataset_folder=folders,
    )  # fmt: skip
    if change.get("sequence_length"):
        record = DataStage(
            name="stable", start_training_step=1, consumed_train_samples=5, sequence_length=255,
            consumed_tokens_per_dataset_folder=dict.fromkeys(folders, 0),
        )  # fmt: skip
    stages = json.loads(json.dumps(TWO_STAGES))
    stages[0]["sources"][1]["weight"] = change.get("weight", 3)
    with pytest.raises(UsageError, match=message):
        position_from_stages((record,), recipe_data(stages), 5)


def test_a_source_without_a_record_is_refused() -> None:
    with pytest.raises(UsageError, match="no record of its data"):
        position_from_stages((), recipe_data(TWO_STAGES), 5)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_reads_every_sequence_once_and_keeps_ranks_in_step(world_size: int) -> None:
    data = recipe_data(TWO_STAGES)
    folder = open_held_out(Source(path=str(ORACLE / "plain_2byte")), data, SMOLLM2_VOCABULARY)
    ranks = [
        list(evaluation_batches(folder, data, 9, 2, rank, world_size, SMOLLM2_VOCABULARY)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    real = [batch for turn in zip(*ranks) for batch in turn if batch.rows]
    assert [row.window for batch in real for row in batch.rows] == list(range(9))
    empty = [batch for turn in zip(*ranks) for batch in turn if not batch.rows]
    assert all((batch.labels == IGNORED_LABEL).all() and batch.input_ids.size for batch in empty)
    assert len(list(evaluation_batches(folder, data, 10**9, 2, 0, 1, None))) == -(-327 // 2)


def test_folders_are_found_by_the_names_that_the_source_recorded() -> None:
    """nanotron counts by ``dataset_folder``, an address, though it reads a copy on the disk."""
    data = recipe_data(TWO_STAGES)
    steps = list(open_data(data).read_steps(1, 13))
    address = {str(Path(each["path"])): f"s3://bucket/{number}" for number, each in enumerate(TWO_STAGES[0]["sources"])}
    address |= {
        each["path"]: address.get(each["path"], f"s3://bucket/b{n}") for n, each in enumerate(TWO_STAGES[1]["sources"])
    }
    elsewhere = [
        DataStage(
            name=stage.name, start_training_step=stage.start_training_step, sequence_length=stage.sequence_length,
            consumed_train_samples=stage.consumed_train_samples,
            consumed_tokens_per_dataset_folder={
                address[path]: count for path, count in (stage.consumed_tokens_per_dataset_folder or {}).items()
            },
        )
        for stage in stages_of(steps[11].position)
    ]  # fmt: skip
    with pytest.raises(UsageError, match="recorded_as"):
        position_from_stages(elsewhere, data, 12)
    named = [
        {**stage, "sources": [{**each, "recorded_as": address[each["path"]]} for each in stage["sources"]]}
        for stage in TWO_STAGES
    ]
    told = recipe_data(named)
    position = json.loads(json.dumps(position_from_stages(elsewhere, told, 12)))
    again = next(iter(open_data(told, position=position).read_steps(13, 13)))
    assert same(whole(again), whole(steps[12])) and again.tokens == steps[12].tokens


def test_a_stage_that_training_would_begin_before_is_no_place_to_go_on() -> None:
    """The source is in stage ``decay``, from step 9 on; its learning rate, and so its step, are not taken over."""
    data = recipe_data(TWO_STAGES)
    stages = stages_of(list(open_data(data).read_steps(1, 12))[-1].position)
    with pytest.raises(UsageError, match=r"begins at step 9; training would begin at step 1, in stage 'stable'"):
        position_from_stages(stages, data, 0)


def test_borders_of_shuffled_chunks_within_documents_are_no_sign_of_another_eos(tmp_path: Path) -> None:
    """Long documents: datatrove's index then mostly holds borders of chunks, where any token may be the last."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 300, 65 * 80)
    tokens[700::701] = 0
    ends = np.unique([*(np.flatnonzero(tokens == 0) + 1), *range(65, len(tokens) + 1, 65)])
    assert 2 * len(np.flatnonzero(tokens == 0)) < len(ends)

    def written(name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        tokens.astype("<u2").tofile(folder / f"{name}.ds")
        ends.astype("<u8").tofile(folder / f"{name}.ds.index")
        return str(folder)

    def opened(name: str, eos: int) -> None:
        stage = {"name": "only", "sources": [{"path": written(name)}]}
        open_data(recipe_data([stage], sequence_length=64, eos_token_id=eos)).close()

    opened("000_00000_00000_chunk_shuffled", 0)
    with pytest.raises(UsageError, match="eos_token_id 7"):
        opened("001_00000_00000_chunk_shuffled", 7)
    with pytest.raises(UsageError, match="without an EOS"):
        opened("00000_00000_doc_shuffled", 0)
