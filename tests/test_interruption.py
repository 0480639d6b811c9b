"""Claims about conversions that are cut short: nothing looks finished that is not, and ``--resume`` finishes the rest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, Finished, convert, files_below
from mortal import Life, Mortal
from safetensors.torch import save_file

from smolconv.errors import BadCheckpoint, UsageError
from smolconv.layouts.registry import read_checkpoint
from smolconv.storage.atomic import INCOMPLETE, JOURNAL, LOCK
from smolconv.storage.manifest import check_manifest, read_manifest

TP2 = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp1-dp2-zero1"
KILL_POINTS, SEEDS = 50, 5
ENTRY_POINTS = ("config.json", "model_config.json", "latest.txt")
TOPOLOGY = {"tp": 2, "pp": 2}


class Stop(Exception):
    """Ends a conversion in this process."""


@pytest.fixture(scope="module")
def mortal() -> Iterator[Mortal]:
    with Mortal() as process:
        yield process


@pytest.fixture(autouse=True)
def counted(mortal: Mortal, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """For docs/robustness.md: how many kills and faults a test tried."""
    before = mortal.faults
    yield
    record_property("tried", mortal.faults - before)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of 35 MB in bf16, of random bits."""
    hidden, inner, layers, vocab, kv = 768, 2048, 2, 4096, 256
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": vocab, "tie_word_embeddings": True,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    dice = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randint(-(1 << 15), 1 << 15, shape, generator=dice, dtype=torch.int16).view(torch.bfloat16)
        for name, shape in shapes.items()
    }
    folder = tmp_path_factory.mktemp("large")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def digests_below(folder: Path) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in files_below(folder).items()}


def partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def assert_absent_or_whole(target: Path, whole: dict[str, str]) -> bool:
    """Under its final name there is nothing, or everything; whether it is there."""
    if not target.exists():
        return False
    found = digests_below(target)
    found.pop(LOCK, None)  # a kill right after the rename leaves the lock, which holds nothing
    assert found == whole
    check_manifest(read_manifest(target))
    read_checkpoint(target)
    return True


# --- SIGKILL ---


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, SEEDS))])
def test_a_kill_at_any_moment_leaves_nothing_unfinished_and_resume_completes(mortal, large, tmp_path, seed):
    whole = mortal.convert(large, tmp_path / "whole", "nanotron", tp=2)
    assert whole.status == 0
    expected, chance, killed = digests_below(tmp_path / "whole"), random.Random(seed), 0
    seconds = whole.seconds
    for point in range(KILL_POINTS // SEEDS):
        target = tmp_path / f"out-{point}"
        kill_after = chance.uniform(0, seconds)
        life = mortal.convert(large, target, "nanotron", tp=2, kill_after=kill_after)
        killed += life.status == -9
        if life.status == 0:
            seconds = kill_after  # it ended before: the first was slow, beside other tests
        if not assert_absent_or_whole(target, expected):
            assert mortal.convert(large, target, "nanotron", tp=2, resume=True).status == 0, kill_after
        assert assert_absent_or_whole(target, expected), kill_after
        assert not partial(target).exists()
        shutil.rmtree(target)
    assert killed >= KILL_POINTS // SEEDS // 2, "the kills were to come while something was being done"


KILLS = [("open", False), ("ftruncate", False), ("pwrite", False), ("pwrite", True), ("write", False), ("write", True),
         ("fsync", False), ("mkdir", False), ("rename", False), ("unlink", False)]  # fmt: skip


def some_of(count: int, most: int = 4) -> list[int]:
    """At most so many of 0 .. count - 1, with the first and the last three."""
    return sorted({*range(0, count, max(1, count // most)), *range(max(0, count - 3), count)})


def never_came(life: Life, call: str, at: int) -> bool:
    """Threads open files anew or find them open, so the last calls of one life may not come in another."""
    return life.status == 0 and life.calls[call] <= at


@pytest.mark.parametrize(("call", "torn"), KILLS)
def test_a_kill_at_any_call_leaves_nothing_unfinished_and_resume_completes(mortal, tmp_path, call, torn):
    whole = mortal.convert(TP2, tmp_path / "whole", "hf", workers=1)
    expected = digests_below(tmp_path / "whole")
    assert whole.calls[call] > 0
    for at in some_of(whole.calls[call]):
        target = tmp_path / f"out-{at}"
        life = mortal.convert(TP2, target, "hf", workers=1, call=call, at=at, torn=torn)
        assert life.status == -9 or never_came(life, call, at)
        if not assert_absent_or_whole(target, expected):
            assert mortal.convert(TP2, target, "hf", workers=1, resume=True).status == 0, at
        assert assert_absent_or_whole(target, expected), at
        assert not partial(target).exists()


@pytest.mark.parametrize("call", ["open", "write", "fsync", "truncate", "rename", "unlink"])
def test_a_kill_of_the_resumed_conversion_can_be_resumed_again(mortal, tmp_path, call):
    mortal.convert(TP2, tmp_path / "whole", "hf")
    expected = digests_below(tmp_path / "whole")
    for at in range(4):
        target = tmp_path / f"out-{at}"
        assert mortal.convert(TP2, target, "hf", workers=1, call="write", at=6, torn=True).status == -9
        again = mortal.convert(TP2, target, "hf", workers=1, resume=True, call=call, at=at)
        assert again.status in (-9, 0)
        if not assert_absent_or_whole(target, expected):
            assert mortal.convert(TP2, target, "hf", workers=1, resume=True).status == 0
        assert assert_absent_or_whole(target, expected)


@pytest.mark.parametrize(
    "call", ["rename", "unlink", *(pytest.param(call, marks=pytest.mark.slow) for call in ("rmdir", "fsync"))]
)
def test_a_kill_while_overwriting_loses_neither_the_old_nor_the_new(mortal, tmp_path, call):
    new = mortal.convert(TP2, tmp_path / "new", "hf", workers=1)
    assert new.status == mortal.convert(TP2, tmp_path / "old", "nanotron").status == 0
    expected, old = digests_below(tmp_path / "new"), digests_below(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "counted")
    count = mortal.convert(TP2, tmp_path / "counted", "hf", workers=1, overwrite=True).calls[call]
    for at in some_of(count):
        home = tmp_path / f"home-{at}"
        target = Path(shutil.copytree(tmp_path / "old", home / "out"))
        mortal.convert(TP2, target, "hf", workers=1, overwrite=True, call=call, at=at)
        aside = target.with_name("out.smolconv-replaced")
        if not target.exists():
            assert digests_below(aside) == old and digests_below(partial(target)).keys() >= expected.keys()
        elif digests_below(target) != old:
            assert_absent_or_whole(target, expected)
        assert mortal.convert(TP2, target, "hf", workers=1, overwrite=True, resume=True).status == 0
        assert digests_below(target) == expected
        assert os.listdir(home) == ["out"]


# --- Errors of the machine ---


@pytest.mark.parametrize(
    ("call", "error"),
    [("ftruncate", "ENOSPC"), ("pwrite", "ENOSPC"), ("pwrite", "EIO"), ("write", "ENOSPC"), ("fsync", "EIO"),
     ("mkdir", "EDQUOT"), ("open", "EMFILE"), ("rename", "EACCES")],
)  # fmt: skip
def test_an_error_at_any_call_ends_with_4_and_resume_completes(mortal, tmp_path, call, error):
    whole = mortal.convert(TP2, tmp_path / "whole", "hf", workers=2)
    expected = digests_below(tmp_path / "whole")
    for at in some_of(whole.calls[call]):
        target = tmp_path / f"out-{at}"
        life = mortal.convert(TP2, target, "hf", workers=2, call=call, at=at, error=error)
        # A folder's own entries cannot be flushed on every file system, so that failure is not one.
        assert life.status == 4 or call == "fsync" or never_came(life, call, at), at
        if not assert_absent_or_whole(target, expected):
            assert mortal.convert(TP2, target, "hf", resume=True).status == 0
        assert assert_absent_or_whole(target, expected)


def test_an_overwrite_whose_last_step_fails_puts_the_old_target_back(mortal, tmp_path):
    target = Path(shutil.copytree(TP2, tmp_path / "out"))
    assert mortal.convert(TP2, target, "hf", overwrite=True, call="rename", at=1, error="EACCES", once=True).status == 4
    assert files_below(target) == files_below(TP2)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial"]


# --- Resuming ---


def interrupted(target: Path, to: str = "hf", after_bytes: int = 600_000, **options: object) -> None:
    """A conversion of TP2 that ends, by an error of the caller, when so many bytes were written."""
    seen = 0

    def stop(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > after_bytes:
            raise Stop

    with pytest.raises(Stop):
        convert(TP2, target, to, workers=1, progress=stop, **options)
    assert not target.exists()


def test_resume_keeps_what_is_done(tmp_path):
    target = tmp_path / "out"
    interrupted(target)
    journal = (partial(target) / JOURNAL).read_text()
    written = {path.name: path.stat() for path in partial(target).glob("*.safetensors") if f'"{path.name}"' in journal}
    assert written
    seen: list[int] = []
    convert(TP2, target, "hf", resume=True, progress=seen.append)
    assert seen[0] >= sum(stat.st_size for stat in written.values())
    for name, stat in written.items():
        again = (target / name).stat()
        assert (again.st_ino, again.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_without_resume_everything_is_done_again(tmp_path):
    interrupted(tmp_path / "out")
    (partial(tmp_path / "out") / "stale.bin").write_text("of an older attempt")
    convert(TP2, tmp_path / "out", "hf")
    convert(TP2, tmp_path / "whole", "hf")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


@pytest.mark.parametrize(
    "other", [{"dtype": "bfloat16"}, {"digest": "sha256"}, {"optimizer": False}, {"max_shard_bytes": 99_999}]
)
def test_resume_with_other_options_is_a_usage_error(tmp_path, other):
    interrupted(tmp_path / "out")
    before = files_below(partial(tmp_path / "out"))
    with pytest.raises(UsageError, match="belongs to another plan") as raised:
        convert(TP2, tmp_path / "out", "hf", resume=True, **other)
    assert raised.value.exit_code == 2
    assert files_below(partial(tmp_path / "out")) == before


def test_resume_from_a_source_that_changed_is_a_usage_error(cli: Callable[..., Finished], mortal, tmp_path):
    source = Path(shutil.copytree(TP2, tmp_path / "source"))
    assert mortal.convert(source, tmp_path / "out", "hf", call="write", at=4).status == -9
    path = next(iter(sorted((source / "3/model").rglob("*.safetensors"))))
    path.write_bytes(path.read_bytes())
    done = cli("convert", source, tmp_path / "out", "--to", "hf", "--resume")
    assert (done.code, "belongs to another plan" in done.stderr) == (2, True)
    assert cli("convert", source, tmp_path / "out", "--to", "hf").code == 0


def test_resume_without_anything_to_resume_begins(tmp_path):
    convert(TP2, tmp_path / "out", "hf", resume=True)
    check_manifest(read_manifest(tmp_path / "out"))


@pytest.mark.parametrize("tail", [b"", b'{"path": "model.saf', b"\xff\xfe\x00", b"[]\n", b'{"path": 1}\n', b"null\n"])
@pytest.mark.parametrize("kept_lines", [0, 1, 3])
def test_a_torn_journal_costs_only_what_it_no_longer_says(tmp_path, tail, kept_lines):
    interrupted(tmp_path / "out")
    journal = partial(tmp_path / "out") / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:kept_lines]) + tail)
    convert(TP2, tmp_path / "out", "hf", resume=True)
    convert(TP2, tmp_path / "whole", "hf")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


def test_a_finished_file_that_was_cut_since_is_written_again(tmp_path):
    interrupted(tmp_path / "out")
    path = partial(tmp_path / "out") / "model.safetensors"
    assert "model.safetensors" in (partial(tmp_path / "out") / JOURNAL).read_text()
    os.truncate(path, 1000)
    convert(TP2, tmp_path / "out", "hf", resume=True)
    check_manifest(read_manifest(tmp_path / "out"))


# --- File systems that cannot rename folders ---


def without_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "rename", refuse)


@pytest.mark.parametrize(("to", "options"), [("hf", {}), ("nanotron", TOPOLOGY)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_without_rename_the_result_is_the_same(tmp_path, monkeypatch, to, options, overwrite):
    convert(TP2, tmp_path / "whole", to, **options)
    if overwrite:
        shutil.copytree(TP2, tmp_path / "out")
    without_rename(monkeypatch)
    convert(TP2, tmp_path / "out", to, overwrite=overwrite, **options)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    assert not partial(tmp_path / "out").exists()


@pytest.mark.parametrize(("to", "options"), [("hf", {"max_shard_bytes": 200_000}), ("nanotron", TOPOLOGY)])
def test_without_rename_an_interruption_leaves_what_no_reader_takes(tmp_path, monkeypatch, to, options):
    target, copy, copies = tmp_path / "out", shutil.copyfile, 0
    convert(TP2, tmp_path / "whole", to, **options)
    whole = files_below(tmp_path / "whole")

    def copy_until(source: Path, destination: Path) -> None:
        nonlocal copies
        if copies == 0:
            raise Stop
        copies -= 1
        copy(source, destination)

    without_rename(monkeypatch)
    monkeypatch.setattr(shutil, "copyfile", copy_until)
    last = sum(Path(name).name in ENTRY_POINTS or name.endswith(".index.json") for name in whole)
    for made in some_of(len(whole)):
        copies = made
        with pytest.raises(Stop):
            convert(TP2, target, to, resume=True, **options)
        assert (target / INCOMPLETE).exists()
        with pytest.raises(BadCheckpoint, match="was being published"):
            read_checkpoint(target)
        there = {Path(name).name for name in files_below(target)}
        assert made > len(whole) - last or not there & set(ENTRY_POINTS)
    copies = len(whole)
    convert(TP2, target, to, resume=True, **options)
    assert files_below(target) == whole
