"""Claims about what people give ``save_checkpoint(client_state=...)``: objects of any class, none of which is ever built.

torch pickles them; Python's own unpickler would import, call and fill. Beside ``client_state``, they are refused as ever.
"""

from __future__ import annotations

import argparse
import datetime
import enum
import json
import os
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, Finished, Touch, convert
from deepspeed_folders import Case, case, edit, load, model_file, optimizer_file

from smolconv.conversion import ConvertOptions, plan_conversion
from smolconv.errors import CorruptFile, UnsafePickle
from smolconv.layouts.deepspeed.checkpoint_engine import CheckpointEngine
from smolconv.layouts.deepspeed.documents import MODEL_KEYS, PLAIN_KEYS, STAND_INS
from smolconv.layouts.deepspeed.reader import read_deepspeed
from smolconv.layouts.layout import ReadOptions
from smolconv.storage.torch_archive import unpickle
from smolconv.storage.torch_archive.archive import read_torch_archive
from smolconv.storage.torch_archive.harmless import native
from smolconv.storage.torch_archive.values import Opaque


class Mode(enum.Enum):
    TRAIN = "train"


class Filled(dict[str, int]):
    """A class of one's own with items, attributes and an argument."""

    def __init__(self, **items: int) -> None:
        super().__init__(items)
        self.mine = [self, items]


class Listed(list[int]):
    pass


PATH = f"{type(Path()).__module__}.PosixPath"  # Python 3.13 keeps it in a module within pathlib
#: What people keep there -> how the class is named.
OBJECTS: dict[str, tuple[object, str]] = {
    "args": (argparse.Namespace(lr=0.1, device=torch.device("cpu"), out=Path("out")), "argparse.Namespace"),
    "best_loss": (np.float64(0.25), "a numpy scalar"),
    "text_of_numpy": (np.str_("a"), "multiarray.scalar"),
    "complex_of_numpy": (np.complex64(1), "multiarray.scalar"),
    "scores": (np.arange(6.0).reshape(2, 3), "multiarray._reconstruct"),
    "numpy_random": (np.random.RandomState(0).get_state(), "multiarray._reconstruct"),
    "device": (torch.device("cpu"), "torch.device"),
    "path": (Path("a"), PATH),
    "mode": (Mode.TRAIN, "test_client_state.Mode"),
    "when": (datetime.datetime(2026, 1, 2), "datetime.datetime"),
    "counted": (Counter([2, 2]), "a key is not text"),
    "counts": (defaultdict(int, a=1), "collections.defaultdict"),
    "filled": (Filled(a=1), "test_client_state.Filled"),
    "listed": (Listed([1, 2]), "test_client_state.Listed"),
    "bytes": (b"raw", "a bytes"),
    "more_bytes": (b"raw bytes", "_codecs.encode"),
    "frozen": (frozenset({1}), "frozenset"),
    "complex": (torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage"),
    "sparse": (torch.ones(2).to_sparse(), "_rebuild_sparse_tensor"),
    "in_a_key": ({Path("a"): 1}, "a key is not text"),
    "in_a_set": ({Path("a")}, PATH),
    "in_a_tuple_key": ({(1, Path("a")): 2}, "a key is not text"),
    "in_a_key_that_is_a_tensor": ({torch.ones(1): {"step": 1}}, "a key is not text"),  # a torch optimizer's state
    "in_a_key_of_tuples": ({(1, (2, 3)): 4}, "a key is not text"),
    "in_a_set_of_tuples": ({(1, (2, 3))}, "a set of something other than plain values"),
    "a_long_integer": (-(2**4000), "an integer of 501 bytes"),
    "a_file_name": (os.fsdecode(b"run-\xff"), "text that is not Unicode"),
    "in_an_ordered_dict": (OrderedDict(a=[{"b": Path("a")}]), PATH),
}
PLAIN: dict[str, Any] = {
    "epoch": 3,
    "random": random.Random(1).getstate()[1][:5],
    "note": "text",
    "nested": {"a": [1, None]},
}


def with_client_state(tmp_path: Path, state: dict[str, Any], name: str = "zero1-bf16-ws3-uneven") -> Case:
    copy = case(name).copied(tmp_path)
    for path in copy.tag.glob("*_model_states.pt"):
        edit(path, lambda document: document.update(state))
    return copy


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a checkpoint was executed"


@pytest.mark.parametrize("name", ["zero1-bf16-ws3-uneven", "zero3-bf16-ws3"])
@pytest.mark.parametrize("to", ["hf", "deepspeed"])
def test_weights_and_adam_convert_and_what_could_not_be_carried_is_named(name, to, canary, tmp_path):
    objects = {key: value for key, (value, _) in OBJECTS.items()}
    source = with_client_state(tmp_path, {**PLAIN, **objects, "evil": Touch(canary)}, name)
    plain = with_client_state(tmp_path / "plain", PLAIN, name)
    done = [convert(each.checkpoint, each.folder / "out", to, config=each.config) for each in (plain, source)]
    theirs, ours = ({path.relative_to(each.folder / "out"): path.read_bytes() for path in (each.folder / "out").rglob("*")
                     if path.is_file() and path.name not in ("smolconv_manifest.json", "README.md")} for each in (plain, source))  # fmt: skip
    assert ours == theirs  # nothing of the objects, and all of the rest
    (entry,) = [entry for entry in done[1].to_json()["left_out"] if entry.startswith("client_state")]
    assert not any("client_state" in entry for entry in done[0].to_json()["left_out"])
    assert "args (argparse.Namespace)" in entry and f"and {len(objects) + 1 - 5} more" in entry


@pytest.mark.parametrize("key", OBJECTS)
def test_each_object_is_opaque_and_left_out_by_its_class(key, tmp_path):
    value, known = OBJECTS[key]
    source = with_client_state(tmp_path, {**PLAIN, key: value})
    options = ConvertOptions(to="hf", config=source.config)
    plan = plan_conversion(source.checkpoint, tmp_path / "out", options)
    (entry,) = [entry for entry in plan.account.left_out if "client_state" in entry]
    assert entry.startswith(f"client_state: {key} (") and known in entry
    engine = plan.source.source.engine
    assert engine is not None
    assert engine.client_state == json.loads(json.dumps(PLAIN))


def test_inspect_names_them_and_ends_with_0(cli: Callable[..., Finished], canary: Path, tmp_path: Path) -> None:
    source = with_client_state(tmp_path, {"args": OBJECTS["args"][0], "evil": Touch(canary)})
    done = cli("inspect", source.checkpoint, "--config", source.config, "--json")
    assert done.code == 0, done.stderr
    (problem,) = [line for line in json.loads(done.stdout)["problems"] if "client_state" in line]
    assert "args (argparse.Namespace), evil (builtins.exec)" in problem


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpys_numbers_are_numbers(protocol, tmp_path):
    numbers = [np.float64(0.25), np.float32(0.1), np.float16(1.5), np.int64(-3), np.uint8(200), np.bool_(True)]
    numbers += [np.dtype(">f8").type(2.5), np.array([7], dtype=">i4")[0]]
    torch.save({"module": {}, "mine": numbers}, tmp_path / "a.pt", pickle_protocol=protocol)
    found: Any = read_torch_archive(tmp_path / "a.pt", allow=STAND_INS)
    expected = [0.25, 0.10000000149011612, 1.5, -3, 200, True, 2.5, 7]  # fp32's 0.1, exactly
    assert native(found) == {"module": {}, "mine": expected}
    assert [type(value) for value in native(found["mine"])] == [type(value) for value in expected]


def test_a_rate_that_numpy_computed_is_a_rate(tmp_path):
    """numpy's cosine in a LambdaLR leaves a numpy.float64 in the groups of every rank's file."""
    plain = case("zero1-bf16-ws3-uneven")
    schedule = {"last_epoch": 3, "_last_lr": [np.float64(0.25)], "base_lrs": (np.float32(0.5),)}
    source = with_client_state(tmp_path, {"lr_scheduler": schedule})

    def computed(document: dict[str, Any]) -> None:
        for group in document["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group.update(lr=np.float64(group["lr"]), eps=np.float64(group["eps"]))

    for path in source.tag.glob("*_optim_states.pt"):
        edit(path, computed)
    found, expected = (read_deepspeed(each.checkpoint, ReadOptions(config=each.config)) for each in (source, plain))
    assert found.optimizer and expected.optimizer and found.optimizer.groups == expected.optimizer.groups
    engine = found.source.engine
    assert engine and engine.left_out == ()
    assert engine.lr_scheduler == {"last_epoch": 3, "_last_lr": [0.25], "base_lrs": [0.5]}


def test_the_counter_of_a_schedule_and_the_random_state_of_deepspeeds_data_sampler_are_left_out(tmp_path):
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]).state_dict()
    assert isinstance(schedule["milestones"], Counter)
    sampler = {"consumed_samples": 8, "np_rng_state": np.random.RandomState(0).get_state()}  # as its state_dict() is
    source = with_client_state(tmp_path, {"lr_scheduler": schedule, "data_sampler": sampler})
    done = convert(source.checkpoint, tmp_path / "out", "hf", config=source.config)
    left_out = done.to_json()["left_out"]
    assert "the learning-rate scheduler's state (a key is not text)" in left_out
    assert "data_sampler (the state of DeepSpeed's data sampling)" in left_out


# --- and everywhere else they are refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(PLAIN_KEYS))
@pytest.mark.parametrize(
    "wrap", [lambda v: v, lambda v: {"a": [v]}, lambda v: OrderedDict(a=v)], ids=["it", "in", "as"]
)
def test_a_key_of_deepspeeds_own_holds_no_object(key, wrap, canary, tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {}, "global_steps": 3, "args": Touch(canary), key: wrap(Touch(canary))}, path)
    with pytest.raises(UnsafePickle, match=r"exec, which is not on the list.*Nothing was executed"):
        read_torch_archive(path, plain_keys=PLAIN_KEYS)


def hooked(canary: Path) -> torch.Tensor:
    """A tensor that an object hangs on, which the reader drops."""
    tensor = torch.ones(2)
    tensor.mine = Touch(canary)
    return tensor


@pytest.mark.parametrize(
    "document",
    [
        lambda canary: {"module": {"a": hooked(canary)}},
        lambda canary: [Touch(canary)],
        lambda canary: {Path("a"): 1},
        lambda canary: {"module": {("a", Path("b")): 1}},
        Touch,
    ],
    ids=["attribute of a weight", "list", "key", "key below", "nothing else"],
)
def test_nor_does_any_other_place(document, canary, tmp_path):
    torch.save(document(canary), tmp_path / "a.pt")
    with pytest.raises(UnsafePickle, match="which is not on the list"):
        read_torch_archive(tmp_path / "a.pt", plain_keys=MODEL_KEYS)


@pytest.mark.parametrize(
    "value",
    [-(2**4000), os.fsdecode(b"run-\xff"), {(1, (2, 3)): 4}, {(1, (2, 3))}],
    ids=["integer", "text", "key", "set"],
)
def test_nor_a_plain_value_that_only_a_client_state_may_have(value, tmp_path):
    torch.save({"module": {"a": value}}, tmp_path / "a.pt")
    with pytest.raises(UnsafePickle, match="which is not on the list"):
        read_torch_archive(tmp_path / "a.pt", plain_keys=MODEL_KEYS)
    with pytest.raises(CorruptFile):
        read_torch_archive(tmp_path / "a.pt")


def test_a_shared_object_is_refused_wherever_it_is_first_met(tmp_path):
    shared = [argparse.Namespace(a=1)]
    for document in ({"mine": shared, "module": {"a": shared}}, {"module": {"a": shared}, "mine": shared}):
        torch.save(document, tmp_path / "a.pt")
        with pytest.raises(UnsafePickle, match=r"argparse\.Namespace"):
            read_torch_archive(tmp_path / "a.pt", plain_keys={"module"})
    torch.save({"mine": shared, "yours": shared, "module": {}}, tmp_path / "a.pt")
    found = read_torch_archive(tmp_path / "a.pt", plain_keys={"module"})
    assert isinstance(found, dict) and isinstance(found["mine"][0], Opaque) and found["mine"][0] is found["yours"][0]


@pytest.mark.parametrize("where", ["optimizer file", "module"])
def test_convert_ends_with_3_for_an_object_elsewhere(where, canary, tmp_path):
    source = case("zero1-bf16-ws3-uneven").copied(tmp_path)
    if where == "module":
        edit(model_file(source.tag), lambda document: document["module"].update(a=Touch(canary)))
    else:
        edit(optimizer_file(source.tag, 1), lambda document: document.update(args=Touch(canary)))
    with pytest.raises(UnsafePickle) as caught:
        convert(source.checkpoint, tmp_path / "out", "hf", config=source.config)
    assert caught.value.exit_code == 3 and not (tmp_path / "out").exists()


def test_an_engine_loads_no_file_with_an_object_in_it(canary, tmp_path):
    source = with_client_state(tmp_path, {"args": argparse.Namespace(a=1)})
    assert load(model_file(source.tag))["args"].a == 1
    with pytest.raises(UnsafePickle, match=r"argparse\.Namespace"):
        CheckpointEngine(None).load(str(model_file(source.tag)))


def test_objects_upon_objects_are_bounded(tmp_path, monkeypatch):
    """Every call looks into its arguments for objects, and all of these calls have the same large one."""
    monkeypatch.setattr(unpickle, "_MAX_VALUES", 50_000)
    large = list(range(1000))
    hooks: OrderedDict[str, object] = OrderedDict(a=large)
    reduced = [_Rebuilt(hooks) for _ in range(300)]
    torch.save({"mine": [argparse.Namespace(), *reduced]}, tmp_path / "b.pt")
    with pytest.raises(CorruptFile, match="repeats its values so often"):
        read_torch_archive(tmp_path / "b.pt", plain_keys=())


class _Rebuilt:
    """A tensor whose hooks are not empty, as torch would rebuild it."""

    def __init__(self, hooks: object) -> None:
        self.hooks = hooks

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_parameter, (torch.ones(1), False, self.hooks)


def test_fixtures_hold_no_object() -> None:
    """The reader has nothing to forgive in what DeepSpeed alone wrote."""
    for path in sorted((FIXTURES / "deepspeed").rglob("*_model_states.pt")):
        assert read_torch_archive(path, allow=STAND_INS)
