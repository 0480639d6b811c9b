"""Claims about what torch.save wrote before version 1.6, and still does when it is told to. torch is the judge."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from deepspeed_folders import case, load, save
from safetensors.torch import load_file
from test_torch_archive import DTYPES, assert_same, random_tensor, training_state

from smolconv.conversion import ConversionPlan
from smolconv.errors import CorruptFile, SmolconvError, UnsafePickle
from smolconv.layouts.deepspeed.checkpoint_engine import CheckpointEngine
from smolconv.layouts.layout import ReadOptions
from smolconv.storage.torch_archive import legacy
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.verification.compare import AsStored, verify_conversion


def saved(obj: object, path: Path) -> Path:
    torch.save(obj, path, _use_new_zipfile_serialization=False)
    return path


def pickles(content: bytes) -> list[bytes]:
    """The five pickles, and what is behind them, as pickletools finds them."""
    stream = io.BytesIO(content)
    ends = [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    return [content[a:b] for a, b in zip(ends, [*ends[1:], len(content)], strict=True)]


@pytest.mark.parametrize("dtype", DTYPES[:10])  # torch itself cannot load later ones from this form
def test_a_tensor_of_any_dtype_is_found_where_torch_put_it(dtype, tmp_path):
    tensors = {str(shape): random_tensor(dtype, shape) for shape in [(), (0,), (5,), (3, 1, 4)]}
    path = saved({**tensors, "view": tensors["(3, 1, 4)"][1:, :, ::2]}, tmp_path / "a.pt")
    assert_same(read_torch_archive(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("first_bytes", [1 << 20, 64], ids=["read at once", "read in pieces"])
def test_a_training_state_is_read_as_torch_reads_it(first_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(legacy, "_FIRST_BYTES", first_bytes)
    path = saved(training_state(), tmp_path / "a.pt")
    assert_same(read_torch_archive(path), torch.load(path, weights_only=False))


def test_only_the_beginning_of_a_large_file_is_read(tmp_path, monkeypatch):
    path = saved({"a": torch.zeros(4 << 20), "b": torch.arange(3)}, tmp_path / "a.pt")
    asked: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: asked.append(count) or pread(fd, count, at))  # type: ignore[func-returns-value]
    read_torch_archive(path)
    assert sum(asked) < path.stat().st_size / 8


def test_a_whole_deepspeed_checkpoint_in_this_form_converts_to_the_same(tmp_path):
    source = case("zero1-bf16-ws3-uneven")
    old = source.copied(tmp_path)
    for path in old.tag.glob("*.pt"):
        save(load(path), path, saved)
        assert not path.read_bytes().startswith(b"PK")
    for each in (source, old):
        result = convert(each.checkpoint, tmp_path / f"hf-{each is old}", "hf", config=each.config)
        assert len(result.source_check["without_digest"]) == (5 if each is old else 1)  # with config.json
    for path in (tmp_path / "hf-False").rglob("*.safetensors"):
        theirs = (tmp_path / "hf-True" / path.relative_to(tmp_path / "hf-False")).read_bytes()
        assert theirs == path.read_bytes(), path.name
    engine = CheckpointEngine(None).load(str(next(old.tag.glob("mp_rank*"))))
    expected = load(next(source.tag.glob("mp_rank*")))["module"]
    assert all(torch.equal(engine["module"][name], tensor) for name, tensor in expected.items())


def test_zero_3_files_in_this_form_are_read(tmp_path):
    old = case("zero3-bf16-ws3").copied(tmp_path)
    for path in old.tag.glob("*.pt"):
        save(load(path), path, saved)
    convert(old.checkpoint, tmp_path / "hf", "hf", config=old.config, dtype="float32")
    weights = hf_weights(tmp_path / "hf")
    assert all(torch.equal(weights[name], tensor) for name, tensor in old.engine("fp32").items())


def test_pytorch_model_bin_in_this_form_is_read(tmp_path):
    hf = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf"
    weights = load_file(hf / "model.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((hf / "config.json").read_bytes())
    saved(OrderedDict(weights), tmp_path / "old" / "pytorch_model.bin")

    def verifier(plan: ConversionPlan, written: Path) -> dict[str, Any]:  # torch.load cannot map such a file
        source = AsStored(folder=tmp_path / "old", options=ReadOptions())
        return verify_conversion(plan.prepared, written, source=source).to_json()

    result = convert(tmp_path / "old", tmp_path / "new", "hf", verifier=verifier)
    assert result.verification is not None
    assert result.verification["passed"]
    found = hf_weights(tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


# --- what is refused --------------------------------------------------------------------------------------------------


class Touch:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.canary)!r}, 'w')",)


@pytest.mark.parametrize("place", range(1, 5), ids=["version", "machine", "object", "keys"])
def test_none_of_the_five_pickles_runs_anything(place, tmp_path):
    parts = pickles(saved({"a": torch.ones(2)}, tmp_path / "a.pt").read_bytes())
    parts[place] = pickle.dumps(Touch(tmp_path / "canary"), 2)
    (tmp_path / "evil.pt").write_bytes(b"".join(parts))
    with pytest.raises(UnsafePickle, match=r"evil\.pt: its pickle asks for builtins\.exec.*Nothing was executed"):
        read_torch_archive(tmp_path / "evil.pt")
    assert not (tmp_path / "canary").exists()
    with contextlib.suppress(Exception):  # the weapon is loaded
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


def changed(number: int, new: object) -> Any:
    def change(parts: list[bytes]) -> None:
        parts[number] = pickle.dumps(new, 2)

    return change


def counted(count: int) -> Any:
    def change(parts: list[bytes]) -> None:
        parts[5] = struct.pack("<q", count) + parts[5][8:]

    return change


DAMAGE = {
    "another version": (changed(1, 1000), "version 1000"),
    "big-endian": (changed(2, {"little_endian": False}), "not little-endian"),
    "no machine": (changed(2, [1]), "not little-endian"),
    "no keys": (changed(4, []), "lists 0 storages"),
    "keys of another": (changed(4, ["1"]), "are not the 1"),
    "a key twice": (lambda parts: changed(4, pickle.loads(parts[4]) * 2)(parts), "lists 2 storages"),
    "keys that are none": (changed(4, {"a": 1}), "does not list its storages"),
    "keys of another kind": (changed(4, [1]), "does not list its storages"),
    "a storage that is longer": (counted(1 << 40), "ends within storage"),
    "a storage of less than nothing": (counted(-1), "ends within storage"),
    "a storage that is shorter than its tensor": (lambda parts: (counted(1)(parts), parts.__setitem__(5, parts[5][:12])), "but its record has"),
    "bytes behind it": (lambda parts: parts.append(b"more"), "4 bytes after"),
    "the last byte lost": (lambda parts: parts.__setitem__(5, parts[5][:-1]), "ends within storage"),
    "no storages": (lambda parts: parts.pop(), "ends within storage"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_contradicts_itself_is_refused(name, tmp_path):
    change, said = DAMAGE[name]
    parts = pickles(saved({"a": torch.arange(4.0)}, tmp_path / "a.pt").read_bytes())
    assert b"".join(parts) == (tmp_path / "a.pt").read_bytes()
    change(parts)
    (tmp_path / "b.pt").write_bytes(b"".join(parts))
    with pytest.raises(CorruptFile, match=said) as caught:
        read_torch_archive(tmp_path / "b.pt")
    assert len(str(caught.value).splitlines()) == 3


def test_storages_of_one_key_have_elements_of_one_size(tmp_path):
    parts = pickles(saved([torch.arange(4.0), torch.arange(4.0).half()], tmp_path / "a.pt").read_bytes())
    first, second = pickle.loads(parts[4])
    assert len(first) == len(second)
    parts[3] = parts[3].replace(second.encode(), first.encode())
    parts[4] = pickle.dumps([first], 2)
    (tmp_path / "b.pt").write_bytes(b"".join(parts))
    with pytest.raises(CorruptFile, match="are not the 1"):
        read_torch_archive(tmp_path / "b.pt")


def test_a_file_cut_short_or_changed_anywhere_raises_only_our_errors(tmp_path):
    whole = saved(training_state(), tmp_path / "a.pt").read_bytes()
    path, dice = tmp_path / "b.pt", random.Random(0)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile):
            read_torch_archive(path)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] ^= dice.randint(1, 255)
        path.write_bytes(damaged)
        with contextlib.suppress(SmolconvError):
            read_torch_archive(path, plain_keys=dice.choice([None, ("module",)]))
