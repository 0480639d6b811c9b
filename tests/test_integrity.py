"""Claims about damage: what was recorded for a source's bytes is compared with what is read of it, and nothing differs
unnoticed. torch, zipfile and safetensors make the inputs; the values expected are those of undamaged conversions."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, Finished, convert, files_below
from safetensors.torch import load_file, save_file
from zip_tricks import archive_bytes, end, evil_pickle, moved, parts, two_directories, zip64_elsewhere

from smolconv.conversion import ConvertOptions, plan_conversion, run_conversion
from smolconv.errors import CorruptFile, DigestMismatch, SmolconvError, SourceChanged, UnsafePickle
from smolconv.inspection import check_checkpoint
from smolconv.layouts.registry import read_checkpoint
from smolconv.storage import integrity
from smolconv.storage.integrity import Seal, SourceCheck
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.storage.torch_archive.records import read_archive_records

DEEPSPEED, NANOTRON = FIXTURES / "deepspeed", FIXTURES / "nanotron"
UNEVEN = DEEPSPEED / "zero1-bf16-ws3-uneven"
ZERO1, ZERO3 = DEEPSPEED / "smollm2-tiny-bf16-zero1-ws2", DEEPSPEED / "zero3-bf16-ws3"
TP2 = NANOTRON / "smollm2-tiny" / "tp2-pp1-dp2-zero1"
MANIFEST = "smolconv_manifest.json"

# --- Archives that two readers would understand differently ------------------------------------------------------------


@pytest.fixture
def canary(tmp_path) -> Iterator[Path]:
    """A file that must not be there after the test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def plain() -> bytes:
    return archive_bytes(pickle.dumps({"module": {"a": 1, "b": "x" * 20}}, 2))


@pytest.mark.parametrize("trick", [two_directories, zip64_elsewhere])
def test_what_python_and_torch_would_read_differently_is_refused(trick, tmp_path, canary):
    path = tmp_path / "a.pt"
    path.write_bytes(trick(plain(), archive_bytes(evil_pickle(canary))))
    with zipfile.ZipFile(path) as archive:  # what looks first finds nothing wrong
        assert pickle.loads(archive.read("archive/data.pkl")) == {"module": {"a": 1, "b": "x" * 20}}
    torch.load(path, weights_only=False)  # and what loads afterwards executes
    assert canary.exists()
    canary.unlink()
    with pytest.raises(CorruptFile, match="directory cannot be read"):
        read_torch_archive(path)


def records_of(*entries: tuple[str, bytes]) -> bytes:
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


PICKLE = pickle.dumps({"a": 1}, 2)


def with_comment() -> bytes:
    records, directory, count = parts(plain())
    return records + directory + end(count, len(directory), len(records), b"hidden")


def with_a_gap() -> bytes:
    records, directory, count = parts(plain())
    return records + directory + bytes(8) + end(count, len(directory), len(records))


def on_the_same_bytes() -> bytes:
    """Two records of one header: whoever changes one changes the other."""
    records, directory, count = parts(plain())
    (name_bytes,) = struct.unpack_from("<H", directory, 28)
    first = bytearray(directory[: 46 + name_bytes])
    first[46 + 8] ^= 0x20  # another name in the directory
    return records + directory + bytes(first) + end(count + 1, len(directory) + len(first), len(records))


def reaching_into_the_next() -> bytes:
    records, directory, count = parts(plain())
    data = bytearray(directory)
    (size,) = struct.unpack_from("<I", data, 24)
    struct.pack_into("<2I", data, 20, size + 40, size + 40)
    return records + bytes(data) + end(count, len(directory), len(records))


def under_another_name() -> bytes:
    """The local header says another name than the directory."""
    archive = bytearray(plain())
    archive[30 + 8] = ord("D")
    return bytes(archive)


def before_the_first_record() -> bytes:
    """Something is put before an archive; zipfile corrects all offsets, torch does not."""
    records, directory, count = parts(plain())
    evil = archive_bytes(PICKLE)[:60]
    return evil + records + directory + end(count, len(directory), len(records))


@pytest.mark.parametrize(
    "make",
    [
        with_comment, with_a_gap, on_the_same_bytes, reaching_into_the_next, under_another_name,
        before_the_first_record,
        lambda: plain() + b"\0" * 30,
        lambda: plain() + plain(),
        lambda: records_of(("first/byteorder", b"little"), ("archive/data.pkl", PICKLE)),  # torch: the first's folder
        lambda: records_of(("archive/data.pkl", PICKLE), ("archive/DATA.PKL", PICKLE)),  # torch: whatever the case
        lambda: records_of(("archive/data.pkl", PICKLE), ("Archive/version", b"3")),
        lambda: records_of(("archive/data.pkl", PICKLE), ("archive\\data/0", b"3")),
        lambda: records_of(("archive/data.pkl", PICKLE), ("archive/", b"")),
        lambda: records_of(("data.pkl", PICKLE)),
    ],
)  # fmt: skip
def test_an_archive_that_contradicts_itself_is_refused(make, tmp_path):
    (tmp_path / "a.pt").write_bytes(make())
    with pytest.raises(CorruptFile):
        read_torch_archive(tmp_path / "a.pt")


def test_the_archive_that_these_were_made_from_is_read(tmp_path):
    (tmp_path / "a.pt").write_bytes(plain())
    assert read_torch_archive(tmp_path / "a.pt") == {"module": {"a": 1, "b": "x" * 20}}
    records, directory, count = parts(plain())
    (tmp_path / "b.pt").write_bytes(records + moved(directory, 0) + end(count, len(directory), len(records)))
    assert read_torch_archive(tmp_path / "b.pt") == {"module": {"a": 1, "b": "x" * 20}}


def test_a_torchscript_archive_is_refused_since_it_holds_code(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    with pytest.raises(UnsafePickle, match="TorchScript"):
        read_torch_archive(tmp_path / "a.pt")


def test_records_lie_where_zipfile_finds_them_with_their_checksums(tmp_path):
    torch.save({"a": torch.arange(100.0), "b": [torch.ones(3).bfloat16()]}, tmp_path / "a.pt")
    found = {record.name: record for record in read_archive_records(tmp_path / "a.pt")}
    data = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        assert found.keys() == entries.keys()
        for name, entry in entries.items():
            record = found[name]
            assert data[record.offset : record.offset + record.nbytes] == archive.read(entry)
            assert record.crc == entry.CRC


# --- Changed records --------------------------------------------------------------------------------------------------

CHANGED = [
    (ZERO1, {"to": "hf"}), (ZERO1, {"to": "hf", "optimizer": False}), (ZERO1, {"to": "nanotron", "tp": 2}),
    (ZERO1, {"to": "hf", "digest": "none"}), (ZERO3, {"to": "hf", "dtype": "float32"}), (ZERO3, {"to": "deepspeed"}),
    (UNEVEN, {"to": "hf"}), (DEEPSPEED / "universal-from-zero2-ws3", {"to": "hf"}), (DEEPSPEED / "autotp2-zero1-bf16", {"to": "hf"}),
    (DEEPSPEED / "zero0-bf16", {"to": "deepspeed", "zero_stage": 2, "world_size": 2}),
    (TP2, {"to": "hf"}), (TP2, {"to": "nanotron", "dp": 3, "zero_stage": 1}),
]  # fmt: skip


def outcome(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_below(folder).items() if name not in (MANIFEST, "README.md")}


@pytest.mark.parametrize("small_bytes", [1 << 20, 16], ids=["small records", "large records"])
@pytest.mark.parametrize(("case", "options"), CHANGED, ids=str)
def test_no_changed_record_goes_unnoticed(case, options, small_bytes, tmp_path, monkeypatch):
    """It is refused with exit code 3, or was not needed: then the result is that of the source before the change."""
    monkeypatch.setattr(integrity, "_SMALL_BYTES", small_bytes)
    root = case / "checkpoint" if (case / "checkpoint").is_dir() else case
    convert(root, tmp_path / "good", **options)
    expected = outcome(tmp_path / "good")
    dice, refused = random.Random(f"{case.name} {options}"), 0
    copy = tmp_path / "copy"
    shutil.copytree(case, copy)
    source = copy / root.relative_to(case)
    archives = [path for path in sorted(source.rglob("*.pt")) if zipfile.is_zipfile(path)]
    for attempt in range(6):
        path = dice.choice(archives)
        record = dice.choice([record for record in read_archive_records(path) if record.nbytes])
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[record.offset + dice.randrange(record.nbytes)] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
        try:
            convert(source, tmp_path / f"out{attempt}", **options)
            assert outcome(tmp_path / f"out{attempt}") == expected, f"{path.name} {record}"
        except SmolconvError as error:
            assert error.exit_code == 3
            assert not (tmp_path / f"out{attempt}").exists()
            refused += 1
        path.write_bytes(whole)
    assert refused


def test_an_archive_without_checksums_converts_and_says_that_nothing_could_be_compared(tmp_path):
    case = tmp_path / "case"
    shutil.copytree(ZERO1, case)
    torch.serialization.set_crc32_options(False)
    try:
        for path in case.glob("checkpoint/*/*.pt"):
            torch.save(torch.load(path, weights_only=False), path)
    finally:
        torch.serialization.set_crc32_options(True)
    result = convert(case / "checkpoint", tmp_path / "out", "hf")
    assert result.source_check["checked"] == 0
    assert {Path(name).suffix for name in result.source_check["without_digest"]} >= {".pt"}
    checked = check_checkpoint(read_checkpoint(case / "checkpoint"))
    assert "a torch archive without checksums" in checked.unchecked.values()


def test_zeroing_one_records_checksum_does_not_switch_the_check_off(tmp_path):
    case = tmp_path / "case"
    shutil.copytree(ZERO1, case)
    path = next(case.glob("checkpoint/*/mp_rank_00_model_states.pt"))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    at = data.rindex(entry.filename.encode()) - 46
    assert struct.unpack_from("<I", data, at + 16) == (entry.CRC,)
    struct.pack_into("<I", data, at + 16, 0)
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        convert(case / "checkpoint", tmp_path / "out", "hf")


def seal_of(path: Path, digest: str) -> Seal:
    return Seal(path=path, ranges=((0, path.stat().st_size),), digest=digest, what="it")


def test_a_checksum_is_put_together_from_ranges_of_any_order_and_thread(tmp_path):
    path = tmp_path / "data"
    content = random.Random(0).randbytes(3 << 20)
    path.write_bytes(content)
    right, wrong = (f"crc32:{zlib.crc32(content) ^ bit:08x}" for bit in (0, 1))
    cuts = [0, 5, 1 << 20, (1 << 20) + 7, 2 << 20, 3 << 20]
    for digest in (right, wrong):
        check = SourceCheck([seal_of(path, digest)], tmp_path)
        observers = [check.observer(), check.observer()]
        ranges = list(itertools.pairwise(cuts))
        # One range twice, one overlapping, one left out: it is read again, since it is small.
        for number, (start, stop) in enumerate([ranges[3], ranges[0], ranges[4], (1, 4), ranges[0], ranges[1]]):
            observers[number % 2](path, start, memoryview(content)[start:stop])
        if digest == right:
            assert check.finish((), 1).checked == 1
        else:
            with pytest.raises(DigestMismatch, match=right):
                check.finish((), 1)


def test_a_large_gap_is_said_and_read_only_when_that_is_asked_for(tmp_path):
    path = tmp_path / "data"
    content = bytes(4 << 20)
    path.write_bytes(content)
    seal = seal_of(path, f"crc32:{zlib.crc32(content) ^ 1:08x}")
    check = SourceCheck([seal], tmp_path)
    check.observer()(path, 0, memoryview(content)[: 1 << 20])
    assert check.finish((), 1).unchecked == (seal,)
    with pytest.raises(DigestMismatch):
        check.finish({path}, 1)


# --- Manifests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A Hugging Face folder with Adam's state, as smolconv writes it."""
    target = tmp_path_factory.mktemp("hf") / "out"
    convert(ZERO1 / "checkpoint", target, "hf")
    return target


@pytest.fixture
def copy(hf, tmp_path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_every_byte_of_every_file_is_covered_by_the_manifest(hf, copy):
    files = sorted(name for name in files_below(hf) if name != MANIFEST)
    assert "smolconv_state/state.json" in files
    for name in files:
        data = (hf / name).read_bytes()
        for offset in {0, 9, len(data) // 2, len(data) - 1} & set(range(len(data))):
            flip(copy / name, offset)
            with pytest.raises(SmolconvError) as raised:
                check_checkpoint(read_checkpoint(copy))
            assert raised.value.exit_code == 3, name
            (copy / name).write_bytes(data)
    assert check_checkpoint(read_checkpoint(copy)).unchecked == {}


@pytest.mark.parametrize("name", ["model.safetensors", "smolconv_state/exp_avg-00001-of-00001.safetensors"])
@pytest.mark.parametrize("to", [{"to": "nanotron"}, {"to": "hf"}, {"to": "deepspeed"}, {"to": "hf", "digest": "none"}])
def test_a_source_that_its_own_manifest_contradicts_is_not_certified_anew(name, to, copy, tmp_path):
    flip(copy / name, (copy / name).stat().st_size - 1)
    with pytest.raises(DigestMismatch):
        convert(copy, tmp_path / "out", **to)
    assert not (tmp_path / "out").exists()
    # Without the record nobody can know, where no sidecar has digests of its own.
    (copy / MANIFEST).unlink()
    convert(copy, tmp_path / "out", optimizer=False, **to)


def test_a_saved_again_archive_with_right_checksums_is_noticed_by_the_manifest(tmp_path):
    convert(ZERO1 / "checkpoint", tmp_path / "run", "deepspeed", zero_stage=1, world_size=2)
    path = next(tmp_path.glob("run/*/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"))
    data = bytearray(path.read_bytes())
    record = max(read_archive_records(path), key=lambda record: record.nbytes)
    data[record.offset + record.nbytes // 2] ^= 4
    right = struct.pack("<I", zlib.crc32(data[record.offset : record.offset + record.nbytes]))
    path.write_bytes(data.replace(struct.pack("<I", record.crc), right))
    torch.load(path, weights_only=False)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with pytest.raises(DigestMismatch):
        convert(tmp_path / "run", tmp_path / "out", "hf")


def test_what_is_read_in_part_is_said_and_compared_with_check_source(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "_SMALL_BYTES", 16)
    convert(ZERO1 / "checkpoint", tmp_path / "run", "hf", optimizer=False)
    options: dict[str, Any] = {"optimizer": False, "vocab_size": 8}  # most of the embedding stays unread
    result = convert(tmp_path / "run", tmp_path / "out", "nanotron", **options)
    assert [name for name in result.source_check["unchecked"] if "embed_tokens" in name]
    assert any("--check-source" in warning for warning in result.warnings)
    plan = plan_conversion(tmp_path / "run", tmp_path / "again", ConvertOptions(to="nanotron", **options))
    assert run_conversion(plan, check_source=True).source_check["unchecked"] == []


def edited_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    edit(document)
    (folder / MANIFEST).write_text(json.dumps(document))


BAD_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "lists nothing": lambda m: (m["files"].clear(), m["tensors"].clear()),
    "lists no files": lambda m: m["files"].clear(),
    "files is a number": lambda m: m.update(files=3),
    "a path outside": lambda m: m["files"][0].update(path="../model.safetensors"),
    "an absolute path": lambda m: m["files"][0].update(path="/etc/passwd"),
    "a file twice": lambda m: m["files"].append(m["files"][0]),
    "a negative size": lambda m: m["files"][0].update(bytes=-1),
    "a tensor past the end": lambda m: m["tensors"][0].update(offset=1 << 60),
    "a tensor of no file": lambda m: m["tensors"][0].update(file="x.safetensors"),
    "an unknown digest": lambda m: m["tensors"][0].update(digest="md5:00"),
    "another schema": lambda m: m.update(schema=2),
    "tensors are missing": lambda m: m.pop("tensors"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_manifest_that_cannot_be_believed_is_refused(name, copy, tmp_path):
    edited_manifest(copy, BAD_MANIFESTS[name])
    for use in (lambda: convert(copy, tmp_path / "out", "nanotron"), lambda: check_checkpoint(read_checkpoint(copy))):
        with pytest.raises(CorruptFile, match=MANIFEST):
            use()


def test_a_weight_file_that_the_manifest_does_not_list_is_refused(copy, tmp_path):
    edited_manifest(copy, lambda m: m.update(
        files=[f for f in m["files"] if f["path"] != "model.safetensors"],
        tensors=[t for t in m["tensors"] if t["file"] != "model.safetensors"],
    ))  # fmt: skip
    with pytest.raises(DigestMismatch, match=r"model\.safetensors is not listed"):
        convert(copy, tmp_path / "out", "nanotron")


def test_a_later_step_that_a_trainer_saved_beside_ours_is_not_refused(tmp_path):
    convert(TP2, tmp_path / "run", "nanotron")
    run = tmp_path / "run"
    shutil.copytree(run / "3", run / "5")
    for path in (run / "5").rglob("checkpoint_metadata.json"):
        document = json.loads(path.read_text())
        document["metas"]["last_train_step"] = 5
        path.write_text(json.dumps(document))
    (run / "latest.txt").write_text("5")
    assert convert(run, tmp_path / "out", "hf").plan.source.progress.step == 5


def test_an_edited_readme_is_a_warning_and_a_folder_without_the_sidecar_says_so(copy, tmp_path):
    (copy / "README.md").write_text("my model")
    shutil.rmtree(copy / "smolconv_state")
    result = convert(copy, tmp_path / "out", "nanotron")
    assert any("README.md was changed" in warning for warning in result.warnings)
    assert any("smolconv_state/" in warning and "are gone" in warning for warning in result.warnings)


def test_the_new_manifest_says_what_was_compared(copy, hf, tmp_path):
    convert(copy, tmp_path / "again", "hf")
    check = json.loads((tmp_path / "again" / MANIFEST).read_text())["source"]["check"]
    assert check["checked"] > 0 and check["unchecked"] == [] and check["without_digest"] == []
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hf / name, bare)
    convert(bare, tmp_path / "out", "nanotron")
    check = json.loads((tmp_path / "out" / MANIFEST).read_text())["source"]["check"]
    assert check["checked"] == 0
    assert {Path(name).name for name in check["without_digest"]} == {"config.json", "model.safetensors"}


def test_a_random_state_whose_first_bytes_changed_is_no_file_without_checksums(cli, tmp_path):
    copy = Path(shutil.copytree(TP2, tmp_path / "copy"))
    path = next(copy.rglob("random/*.pt"))
    content = bytearray(path.read_bytes())
    content[2] ^= 4
    path.write_bytes(content)
    done = cli("inspect", copy, "--check", "--json")
    assert done.code == 3 and path.name in done.stderr


# --- inspect --check --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [ZERO1, ZERO3, DEEPSPEED / "universal-from-zero2-ws3", TP2], ids=lambda p: p.name)
def test_inspect_check_names_every_record_that_changed_in_a_foreign_checkpoint(case, cli, tmp_path):
    copy = Path(shutil.copytree(case, tmp_path / "copy"))
    root = copy / "checkpoint" if (copy / "checkpoint").is_dir() else copy
    before: Finished = cli("inspect", root, "--check", "--json")
    assert before.code == 0, before.stderr
    assert json.loads(before.stdout)["checked"] > 0
    path = next(path for path in sorted(root.rglob("*optim*.pt")) + sorted(root.rglob("exp_avg.pt")))
    record = max(read_archive_records(path), key=lambda record: record.nbytes)
    flip(path, record.offset + record.nbytes // 2)
    after = cli("inspect", root, "--check")
    assert after.code == 3 and record.name in after.stderr and path.name in after.stderr


def test_inspect_check_says_that_plain_safetensors_could_not_be_checked(hf, cli, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hf / name, tmp_path)
    done: Finished = cli("inspect", tmp_path, "--check", "--json")
    document = json.loads(done.stdout)
    assert (done.code, document["checked"]) == (0, 0)
    assert {Path(entry["path"]).name for entry in document["unchecked"]} == {"config.json", "model.safetensors"}
    assert "NOT CHECKED" in cli("inspect", tmp_path, "--check").stdout


# --- Sources that change ----------------------------------------------------------------------------------------------


def in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff")


def in_place_with_its_old_time(path: Path) -> None:
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


CHANGES = [in_place, in_place_with_its_old_time, replaced, appended, Path.unlink]


def moment(change: Callable[[], object], when: str) -> dict[str, Any]:
    """Keywords of ``convert`` that change the source once: after the first bytes were written, or before the rename."""
    done: list[bool] = []

    def once(*_: object) -> dict[str, bool]:
        if not done:
            done.append(True)
            change()
        return {"passed": True}

    return {"progress": lambda count: once() if count else None} if when == "writing" else {"verifier": once}


@pytest.mark.parametrize("when", ["writing", "verifying"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("form", ["deepspeed", "nanotron", "huggingface"])
def test_a_source_that_changes_meanwhile_is_refused(form, change, when, hf, tmp_path):
    original = {"deepspeed": ZERO1 / "checkpoint", "nanotron": TP2, "huggingface": hf}[form]
    source = Path(shutil.copytree(original, tmp_path / "source"))
    if form == "deepspeed":
        shutil.copy(ZERO1 / "config.json", source)
    pattern = {
        "deepspeed": "*/*optim_states.pt",
        "nanotron": "*/model/**/*.safetensors",
        "huggingface": "*.safetensors",
    }
    path = max(source.glob(pattern[form]), key=lambda path: path.name)
    with pytest.raises(SmolconvError) as raised:
        convert(source, tmp_path / "out", "hf", workers=1, **moment(lambda: change(path), when))
    assert raised.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    if when == "verifying":
        assert isinstance(raised.value, SourceChanged) and path.name in str(raised.value)


def test_a_config_that_changes_between_reading_and_writing_is_refused(hf, tmp_path):
    source = Path(shutil.copytree(hf, tmp_path / "source"))
    plan = plan_conversion(source, tmp_path / "out", ConvertOptions(to="nanotron"))
    (source / MANIFEST).unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(SourceChanged, match=r"config\.json"):
        run_conversion(plan)


def test_a_run_that_goes_on_and_points_to_a_newer_step_disturbs_nothing(tmp_path):
    source = Path(shutil.copytree(ZERO1 / "checkpoint", tmp_path / "source"))
    shutil.copy(ZERO1 / "config.json", source)
    tag = (source / "latest").read_text()

    def newer() -> None:
        shutil.copytree(source / tag, source / "global_step999")
        (source / "latest").write_text("global_step999")

    convert(source, tmp_path / "out", "hf", **moment(newer, "writing"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_resuming_compares_what_the_first_attempt_had_read(tmp_path, monkeypatch):
    """A record of which one half was written before a kill is compared as a whole after it."""
    monkeypatch.setattr(integrity, "_SMALL_BYTES", 16)
    source = Path(shutil.copytree(ZERO1, tmp_path / "source")) / "checkpoint"
    path = next(source.glob("*/*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    record = max(read_archive_records(path), key=lambda record: record.nbytes)
    flip(path, record.offset + record.nbytes // 2)
    monkeypatch.setattr("smolconv.conversion.SourceCheck.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("smolconv.storage.integrity.SourceCheck.compare", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "hf")
    monkeypatch.undo()
    with pytest.raises(DigestMismatch):
        convert(source, tmp_path / "out", "hf", resume=True)


def test_weights_and_manifest_written_by_others_do_not_matter_to_the_safetensors_library(hf, tmp_path):
    """The control: what is refused above is refused for its bytes, not for its form."""
    again = Path(shutil.copytree(hf, tmp_path / "again"))
    (again / MANIFEST).unlink()
    save_file(load_file(hf / "model.safetensors"), again / "model.safetensors", {"format": "pt"})
    convert(again, tmp_path / "out", "nanotron")
