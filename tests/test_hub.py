"""What is fetched from the Hub and pushed to it, with the real client against a fake server.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so it runs in processes of its own, whose environment is
set as a user would set it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path

import pytest
from fake_hub import FakeHub

from smolconv import errors
from smolconv.commands.inspect import inspect
from smolconv.errors import (
    BadCheckpoint,
    CorruptFile,
    MachineError,
    MissingFile,
    MissingShard,
    NotInstalled,
    SmolconvError,
    UnknownLayout,
    UsageError,
)
from smolconv.hub.address import HubSource, is_hub_uri, parse_hub_uri

TOKEN = "hf_fake"
NUMBERS = itertools.count()
HEADERS_LIMIT_BYTES = 64 * 1024  # what `inspect` may cost for a model of any size

CLIENT = """
import json, os, sys
from pathlib import Path
replies, sys.stdout = sys.stdout, sys.stderr
from smolconv.hub.download import open_source
from smolconv.hub.card import CardFacts
from smolconv.hub.push import push_folder
from smolconv.errors import SmolconvError
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if request["token"]:
        os.environ["HF_TOKEN"] = request["token"]
    try:
        if request["do"] == "fetch":
            reply = {"value": str(open_source(request["uri"], headers_only=request["headers_only"]))}
        else:
            folder = Path(request["folder"])
            facts = CardFacts(title="A model", verified="not at all")
            done = push_folder(folder, request["repo"], facts, message=request["message"], private=request["private"])
            reply = {"value": done.url}
    except SmolconvError as error:
        reply = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(reply), file=replies, flush=True)
"""


class Client:
    """smolconv.hub in another process, and its errors raised in this one."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(Path(errors.__file__).parents[1]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env={**clean, **settings, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate(timeout=10)

    def fetch(self, uri: str, *, headers_only: bool = False, token: str | None = None) -> Path:
        return Path(self._ask(do="fetch", uri=uri, headers_only=headers_only, token=token))

    def push(self, folder: Path, repo: str, *, message: str = "pushed", private: bool = False) -> str:
        return self._ask(do="push", folder=str(folder), repo=repo, message=message, private=private, token=TOKEN)

    def _ask(self, **request: object) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the client's process died of an error that is not ours; its traceback is on stderr"
        reply = json.loads(line)
        if "error" not in reply:
            return str(reply["value"])
        found, expected, remedy = reply["message"].splitlines()[-3:]
        assert found and expected and remedy, "a message says what was found, what was expected and what to do"
        kind = getattr(errors, reply["error"])
        assert issubclass(kind, SmolconvError)
        raise kind(reply["message"])


@pytest.fixture(scope="module")
def running_hub() -> Iterator[FakeHub]:
    with FakeHub(token=TOKEN, page_entries=5) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hub") / "hf_home"  # what is written above it is looked for in a folder of its own
    home.mkdir()
    return home


@pytest.fixture(scope="module")
def client(running_hub: FakeHub, home: Path) -> Iterator[Client]:
    with Client(running_hub.url, home) as client:
        yield client


@pytest.fixture
def hub(running_hub: FakeHub) -> FakeHub:
    running_hub.forget_exchanges()
    running_hub.failures.clear()
    running_hub.repositories.clear()
    running_hub.lfs_objects.clear()
    running_hub.answers_ranges = True
    running_hub.lies.clear()
    running_hub.listing = running_hub.info = None
    running_hub.in_circles = False
    return running_hub


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository's name for this test alone, since the client's cache outlives it."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:60]
    return f"lab/{words.strip('-')}-{next(NUMBERS)}"


def safetensors(tensor_bytes: int, *, tensors: int = 1, first_byte: int = 7) -> bytes:
    """A file as the format's description has it, written without the library."""
    step = tensor_bytes // tensors
    header = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "U8",
            "shape": [step],
            "data_offsets": [i * step, (i + 1) * step],
        }
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([first_byte]) + bytes(step * tensors - 1)


def header_of(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SMALL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    # The cache keeps equal contents once, so these differ.
    "generation_config.json": b'{"eos_token_id": 0}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"model_max_length": 8192}',
    "special_tokens_map.json": b'{"eos_token": "<|im_end|>"}',
    "chat_template.jinja": b"{{ messages }}",
}
UNWANTED_FILES = {
    "README.md": b"# A model",
    ".gitattributes": b"",
    "onnx/model.onnx": b"onnx",
    "model-Q4.gguf": b"gguf",
    "flax_model.msgpack": b"flax",
    "tf_model.h5": b"tf",
    "training_args.bin": b"pickle",
    "adapter_model.safetensors": safetensors(10),
}


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "repo", "subfolder", "revision"),
    [
        ("hf://HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", "", None),
        ("hf://a/b/", "a/b", "", None),
        ("hf://a/b/135M/step-1000", "a/b", "135M/step-1000", None),
        ("hf://a/b@main", "a/b", "", "main"),
        ("hf://a/b/c@refs/pr/3", "a/b", "c", "refs/pr/3"),
        ("hf://a/b@stage1-step-40000", "a/b", "", "stage1-step-40000"),
    ],
)
def test_an_address_names_a_repository_a_folder_and_a_revision(
    uri: str, repo: str, subfolder: str, revision: str | None
) -> None:
    source = parse_hub_uri(uri)
    assert source == HubSource(repo=repo, subfolder=subfolder, revision=revision)
    assert parse_hub_uri(str(source)) == source


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a/b",
        "hf:/a/b",
        "hf://",
        "hf://gpt2",
        "hf:///b",
        "hf://a/",
        "hf://a//b",
        "hf://a/b@",
        "hf://a/b@x@y",
        "hf://a/b@..",
        "hf://a/b@../../x",
        "hf://a/b@/x",
        "hf://a/b@x y",
        "hf://a/b//c",
        "hf://a/b/../c",
        "hf://a/b/.",
        "hf://a b/c",
        "hf://a/b--c",
        "hf://a/.b",
        "hf://a/b.git",
        "hf://datasets/a/b",
        "hf://models/a/b",
    ],
)
def test_a_malformed_address_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError):
        parse_hub_uri(uri)


def test_only_the_scheme_makes_an_address() -> None:
    assert is_hub_uri("hf://a/b")
    assert not is_hub_uri("a/b")
    assert not is_hub_uri("./hf:/a/b")


# What is downloaded ---------------------------------------------------------------------------------------------------


def test_safetensors_are_chosen_over_bin_and_nothing_else_is_downloaded(
    hub: FakeHub, client: Client, repo: str
) -> None:
    wanted = {**SMALL_FILES, "model.safetensors": safetensors(2_000)}
    hub.commit(repo, {**wanted, **UNWANTED_FILES, "pytorch_model.bin": b"pickle"})
    folder = client.fetch(f"hf://{repo}")
    assert contents(folder) == wanted
    assert hub.files_read(repo) == {path: len(content) for path, content in wanted.items()}


def test_bin_is_taken_where_there_is_no_safetensors_model(hub: FakeHub, client: Client, repo: str) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}).encode()
    wanted = {
        **SMALL_FILES,
        "pytorch_model.bin.index.json": index,
        "pytorch_model-1.bin": b"one",
        "pytorch_model-2.bin": b"two",
    }
    hub.commit(repo, {**wanted, **UNWANTED_FILES})
    assert contents(client.fetch(f"hf://{repo}")) == wanted


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_is_taken_without_the_index_beside_it(
    hub: FakeHub, client: Client, repo: str, single: str
) -> None:
    wanted = {**SMALL_FILES, single: safetensors(2_000)}
    index = json.dumps({"weight_map": {"a": f"one-{single}"}}).encode()
    hub.commit(repo, {**wanted, f"{single}.index.json": index, f"one-{single}": safetensors(9)})
    assert contents(client.fetch(f"hf://{repo}")) == wanted


def test_only_the_shards_that_the_index_names_are_downloaded(hub: FakeHub, client: Client, repo: str) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}).encode()
    wanted = {"config.json": b"{}", "model.safetensors.index.json": index, **dict.fromkeys(names, safetensors(9))}
    old = {"model-00001-of-00003.safetensors": safetensors(8), "pytorch_model.bin.index.json": index}
    hub.commit(repo, {**wanted, **old})
    assert contents(client.fetch(f"hf://{repo}")) == wanted


def test_a_shard_that_is_not_there_is_named(hub: FakeHub, client: Client, repo: str) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "../model-2.safetensors"}}).encode()
    hub.commit(repo, {"config.json": b"{}", "model.safetensors.index.json": index, "model-1.safetensors": b""})
    with pytest.raises(MissingShard, match=r"1 of the 2 shards .*: \.\./model-2\.safetensors"):
        client.fetch(f"hf://{repo}")
    assert hub.files_read(repo) == {"model.safetensors.index.json": len(index)}


@pytest.mark.parametrize("index", [b"", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"\xff"])
def test_an_index_that_is_none_is_a_corrupt_file(hub: FakeHub, client: Client, repo: str, index: bytes) -> None:
    hub.commit(repo, {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(CorruptFile):
        client.fetch(f"hf://{repo}")


def test_the_optimizer_sidecar_and_the_manifest_come_along(hub: FakeHub, client: Client, repo: str) -> None:
    state = {f"smolconv_state/exp_avg-0000{i}-of-00007.safetensors": safetensors(20) for i in range(1, 8)}
    files = {
        "config.json": b"{}",
        "model.safetensors": safetensors(20),
        "smolconv_manifest.json": b"{}",
        "smolconv_state/source/config.yaml": b"a: 1",
        **state,
    }
    hub.commit(repo, files)
    assert contents(client.fetch(f"hf://{repo}")) == files


def test_a_revision_is_a_branch_or_a_commit(hub: FakeHub, client: Client, repo: str) -> None:
    def model(marker: int) -> dict[str, bytes]:
        return {"config.json": b"{}", "model.safetensors": safetensors(50, first_byte=marker)}

    first = hub.commit(repo, model(1))
    hub.commit(repo, model(2))
    hub.commit(repo, model(3), branch="refs/pr/3")
    assert contents(client.fetch(f"hf://{repo}@{first}")) == model(1)
    assert contents(client.fetch(f"hf://{repo}")) == model(2)
    assert contents(client.fetch(f"hf://{repo}@refs/pr/3")) == model(3)


def test_a_subfolder_is_taken_alone(hub: FakeHub, client: Client, repo: str) -> None:
    model = {**SMALL_FILES, "model.safetensors": safetensors(5)}
    hub.commit(repo, {**model, **{f"a/b/{path}": content for path, content in model.items()}})
    folder = client.fetch(f"hf://{repo}/a/b")
    assert contents(folder) == model
    assert all(path.startswith("a/b/") for path in hub.files_read(repo))


def nanotron_step(marker: int) -> dict[str, bytes]:
    return {
        "config.yaml": b"a: 1",
        "model_config.json": b"{}",
        "checkpoint_metadata.json": b"{}",
        "lr_scheduler/lr_scheduler_pp-0-of-1_tp-0-of-1.pt": b"lr",
        "model/model/token_position_embeddings/model_weight.safetensors": safetensors(30, first_byte=marker),
        "optimizer/optimizer_config.json": b"{}",
        "optimizer/optimizer_pp-0-of-1_tp-0-of-1.pt": b"adam",
        "random/tp-0-of-1_dp-0-of-1.pt": b"rng",
    }


def test_a_nanotron_run_is_its_newest_step(hub: FakeHub, client: Client, repo: str) -> None:
    steps = {f"{step}/{path}": content for step in (10, 20) for path, content in nanotron_step(step).items()}
    hub.commit(repo, {**steps, "latest.txt": b"20\n", "README.md": b"# Checkpoints"})
    expected = {path: content for path, content in steps.items() if path.startswith("20/")}
    assert contents(client.fetch(f"hf://{repo}")) == {**expected, "latest.txt": b"20\n"}


def test_inspect_fetches_the_step_that_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fetch(_: str, **options: object) -> Path:
        asked.append(options["step"])
        raise MissingFile("seen")

    monkeypatch.setattr("smolconv.hub.download.open_source", fetch)
    with pytest.raises(MissingFile, match="seen"):
        inspect("hf://owner/name", step=10)
    assert asked == [10]


def test_a_run_is_what_its_reader_opens(hub: FakeHub, client: Client, repo: str) -> None:
    step = {f"10/{path}": content for path, content in nanotron_step(1).items()}
    tokenizer = {"smolconv_assets/tokenizer.json": b'{"model": 1}'}
    hub.commit(repo, {**step, **tokenizer, "notes.txt": b""})  # the only step needs no latest.txt
    assert contents(client.fetch(f"hf://{repo}")) == {**step, **tokenizer}
    tag = {f"step-1/{path}": content for path, content in DEEPSPEED_TAG.items()}
    documents = {"smolconv_source/config.yaml": b"a: 2", "config.json": b'{"b": 2}', "latest": b"step-1"}
    hub.commit(repo, {**tag, **documents, "step-2/other": b""}, branch="deepspeed")
    assert contents(client.fetch(f"hf://{repo}@deepspeed")) == {**tag, **documents}
    model = {"config.json": b'{"c": 3}', "model.safetensors": safetensors(700), "latest": b"step-1"}
    hub.commit(repo, {**tag, **model}, branch="both")  # as on disk, what comes with training state is taken
    run = {name: content for name, content in model.items() if name != "model.safetensors"}
    assert contents(client.fetch(f"hf://{repo}@both")) == {**tag, **run}
    hub.commit(repo, model, branch="pushed-by-a-trainer")  # a latest without the folder that it names
    weights = {name: content for name, content in model.items() if name != "latest"}
    assert contents(client.fetch(f"hf://{repo}@pushed-by-a-trainer")) == weights


def test_a_nanotron_step_is_taken_whole(hub: FakeHub, client: Client, repo: str) -> None:
    step = nanotron_step(1)
    hub.commit(repo, {**step, **UNWANTED_FILES, "logs/events": b"log"})
    assert contents(client.fetch(f"hf://{repo}")) == step


DEEPSPEED_TAG = {
    "mp_rank_00_model_states.pt": b"model",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": b"adam",
    "zero/model.norm.weight/fp32.pt": b"norm",
}


def test_a_deepspeed_run_is_its_latest_tag_and_what_lies_beside_it(hub: FakeHub, client: Client, repo: str) -> None:
    tags = {f"run/step-{step}/{path}": content for step in (1, 2) for path, content in DEEPSPEED_TAG.items()}
    above = {"config.json": b"{}", "tokenizer.json": b"{}"}
    hub.commit(repo, {**tags, **above, "run/latest": b"step-2", "run/config.json": b'{"a": 1}', "notes.txt": b""})
    folder = client.fetch(f"hf://{repo}/run")
    expected = {path: content for path, content in tags.items() if path.startswith("run/step-2/")}
    assert contents(folder.parent) == {**expected, **above, "run/latest": b"step-2", "run/config.json": b'{"a": 1}'}


def test_a_deepspeed_tag_comes_with_the_config_beside_latest(hub: FakeHub, client: Client, repo: str) -> None:
    tag = {f"global_step5/{path}": content for path, content in DEEPSPEED_TAG.items()}
    hub.commit(repo, {**tag, "config.json": b"{}", "latest": b"global_step5", "global_step4/x.pt": b""})
    folder = client.fetch(f"hf://{repo}/global_step5")
    assert contents(folder) == DEEPSPEED_TAG
    assert contents(folder.parent) == {**tag, "config.json": b"{}"}


def test_a_latest_that_names_no_folder_is_an_error(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"latest.txt": b"../30", "10/model_config.json": b"{}"})
    with pytest.raises(CorruptFile, match=r"holds '\.\./30'; expected a step number"):
        client.fetch(f"hf://{repo}")


def test_a_repository_of_folders_says_which(hub: FakeHub, client: Client, repo: str) -> None:
    step = {f"135M/10/{path}": content for path, content in nanotron_step(1).items()}
    hub.commit(repo, {**step, "135M/latest.txt": b"10", "360M/config.json": b"{}", "docs/a.md": b""})
    with pytest.raises(MissingFile, match=r"to the address: 135M, 135M/10, 360M\."):
        client.fetch(f"hf://{repo}")
    with pytest.raises(MissingFile, match=r"hf://.*/1\.7B is not a folder"):
        client.fetch(f"hf://{repo}/1.7B")


def test_a_repository_of_branches_says_which(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"README.md": b""})
    hub.commit(repo, {"config.json": b"{}"}, branch="stage1-step-40000")
    with pytest.raises(MissingFile, match="after an '@': main, stage1-step-40000"):
        client.fetch(f"hf://{repo}")


def test_a_model_in_another_form_says_what_was_found(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"config.json": b"{}", "model-Q4.gguf": b"gguf"})
    with pytest.raises(UnknownLayout, match=r"holds a GGUF file: model-Q4\.gguf"):
        client.fetch(f"hf://{repo}")
    hub.commit(repo, {"config.json": b"{}", "model.onnx": b"onnx"}, branch="onnx")
    with pytest.raises(MissingFile, match=r"found: model\.onnx"):
        client.fetch(f"hf://{repo}@onnx")
    hub.commit(repo, {"adapter_config.json": b'{"base_model_name_or_path": "o/m"}'}, branch="adapter")
    with pytest.raises(UnknownLayout, match=r"holds a PEFT adapter(.|\n)*those of 'o/m'"):
        client.fetch(f"hf://{repo}@adapter")


def test_a_run_of_ours_on_the_hub_is_its_folder_of_checkpoints(hub: FakeHub, client: Client, repo: str) -> None:
    tag = {f"run/checkpoints/step-1/{path}": content for path, content in DEEPSPEED_TAG.items()}
    hub.commit(repo, {**tag, "run/checkpoints/latest": b"step-1", "run/recipe.resolved.yaml": b"a: 1"})
    folder = client.fetch(f"hf://{repo}/run")
    assert contents(folder.parent.parent) == {**tag, "run/checkpoints/latest": b"step-1"}


def test_a_second_fetch_reads_no_file_again(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, {**SMALL_FILES, "model.safetensors": safetensors(100)})
    first = client.fetch(f"hf://{repo}")
    hub.forget_exchanges()
    assert client.fetch(f"hf://{repo}") == first
    assert {exchange.path.partition("?")[0].split("/")[1] for exchange in hub.exchanges} == {"api"}


# Headers without tensors ----------------------------------------------------------------------------------------------


def test_headers_of_a_large_model_cost_few_bytes(hub: FakeHub, client: Client, repo: str, home: Path) -> None:
    model = safetensors(20_000_000, tensors=272)
    sha = hub.commit(repo, {**SMALL_FILES, "model.safetensors": model})
    folder = client.fetch(f"hf://{repo}", headers_only=True)

    assert hub.sent_bytes() < HEADERS_LIMIT_BYTES
    assert folder == home / "smolconv-headers" / repo / sha
    stand_in = folder / "model.safetensors"
    assert stand_in.stat().st_size == len(model)
    assert stand_in.stat().st_blocks * 512 < HEADERS_LIMIT_BYTES
    assert stand_in.read_bytes() == header_of(model).ljust(len(model), b"\0")
    assert {name: content for name, content in contents(folder).items() if name in SMALL_FILES} == SMALL_FILES
    assert sorted(contents(folder)) == sorted([*SMALL_FILES, "model.safetensors"])


def test_the_safetensors_library_opens_the_stand_in(hub: FakeHub, client: Client, repo: str) -> None:
    library = pytest.importorskip("safetensors")
    pytest.importorskip("numpy")
    hub.commit(repo, {"config.json": b"{}", "model.safetensors": safetensors(300_000, tensors=3)})
    with library.safe_open(client.fetch(f"hf://{repo}", headers_only=True) / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    assert shapes == {f"model.layers.{i}.mlp.up_proj.weight": [100_000] for i in range(3)}


def test_a_long_header_is_read_to_its_end(hub: FakeHub, client: Client, repo: str) -> None:
    model = safetensors(3_000_000, tensors=3000)
    assert len(header_of(model)) > 200_000
    hub.commit(repo, {"config.json": b"{}", "model.safetensors": model})
    folder = client.fetch(f"hf://{repo}", headers_only=True)
    assert (folder / "model.safetensors").read_bytes() == header_of(model).ljust(len(model), b"\0")
    assert hub.files_read(repo)["model.safetensors"] == len(header_of(model))


def test_headers_are_read_once_and_whole_files_serve_as_they_are(hub: FakeHub, client: Client, repo: str) -> None:
    model = safetensors(200_000)
    hub.commit(repo, {"config.json": b"{}", "model.safetensors": model, "sub/config.json": b"{}"})
    hub.commit(repo, {"config.json": b"{}", "model.safetensors": model}, branch="fetched")

    client.fetch(f"hf://{repo}", headers_only=True)
    hub.forget_exchanges()
    client.fetch(f"hf://{repo}", headers_only=True)
    assert hub.files_read(repo) == {}

    whole = client.fetch(f"hf://{repo}@fetched")
    hub.forget_exchanges()
    linked = client.fetch(f"hf://{repo}@fetched", headers_only=True)
    assert hub.files_read(repo) == {}
    assert (linked / "model.safetensors").samefile(whole / "model.safetensors")


def test_headers_of_nanotron_come_without_tensors_but_pickles_whole(hub: FakeHub, client: Client, repo: str) -> None:
    step = nanotron_step(1)
    name = "model/model/token_position_embeddings/model_weight.safetensors"
    step[name] = safetensors(500_000)
    hub.commit(repo, {**{f"7/{path}": content for path, content in step.items()}, "latest.txt": b"7"})
    found = contents(client.fetch(f"hf://{repo}", headers_only=True))
    assert found.pop(f"7/{name}") == header_of(step[name]).ljust(len(step[name]), b"\0")
    assert found == {**{f"7/{path}": step[path] for path in step if path != name}, "latest.txt": b"7"}


@pytest.mark.parametrize("content", [b"", b"short", (2**40).to_bytes(8, "little") + bytes(100)])
def test_a_header_that_cannot_be_is_a_corrupt_file(hub: FakeHub, client: Client, repo: str, content: bytes) -> None:
    hub.commit(repo, {"config.json": b"{}", "model.safetensors": content})
    with pytest.raises(CorruptFile, match=r"model\.safetensors is \d+ bytes"):
        client.fetch(f"hf://{repo}", headers_only=True)


def test_a_server_without_ranges_and_a_short_outage_are_survived(hub: FakeHub, client: Client, repo: str) -> None:
    model = safetensors(100_000)
    hub.commit(repo, {"config.json": b"{}", "model.safetensors": model})
    hub.answers_ranges = False
    hub.fail("GET /lfs/", status=503, times=1)
    folder = client.fetch(f"hf://{repo}", headers_only=True)
    assert (folder / "model.safetensors").read_bytes() == header_of(model).ljust(len(model), b"\0")


# Failures -------------------------------------------------------------------------------------------------------------


MODEL = {"config.json": b"{}", "model.safetensors": safetensors(400_000)}


def test_what_is_not_on_the_hub_is_a_bad_checkpoint(hub: FakeHub, client: Client, repo: str) -> None:
    with pytest.raises(BadCheckpoint, match="no model repository"):
        client.fetch(f"hf://{repo}", token=TOKEN)
    hub.fail("GET /api/models", status=401, code="RepoNotFound", times=1)
    with pytest.raises(BadCheckpoint, match="no model repository"):
        client.fetch(f"hf://{repo}")
    hub.commit(repo, MODEL)
    hub.commit(repo, MODEL, branch="v2")
    with pytest.raises(BadCheckpoint, match=r"no such revision(.|\n)*branches: main, v2"):
        client.fetch(f"hf://{repo}@v3")
    hub.fail("HEAD .*safetensors", status=404, code="EntryNotFound")
    with pytest.raises(MissingFile):
        client.fetch(f"hf://{repo}")


def test_a_refusal_is_a_machine_error_that_names_the_login(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, MODEL)
    hub.repositories[repo].private = True
    with pytest.raises(MachineError, match="hf auth login"):
        client.fetch(f"hf://{repo}")
    assert contents(client.fetch(f"hf://{repo}", token=TOKEN)) == MODEL


@pytest.mark.parametrize("headers_only", [False, True])
def test_a_gated_repository_names_the_page_to_ask_on(
    hub: FakeHub, client: Client, repo: str, headers_only: bool
) -> None:
    hub.commit(repo, MODEL)
    hub.repositories[repo].gated = True
    with pytest.raises(MachineError, match=rf"Request access on {hub.url}/{repo}, then run `hf auth login`"):
        client.fetch(f"hf://{repo}", headers_only=headers_only)
    folder = client.fetch(f"hf://{repo}", headers_only=headers_only, token=TOKEN)
    assert sorted(contents(folder)) == sorted(MODEL)


@pytest.mark.parametrize(
    ("pattern", "status"),
    [("GET /api", 500), ("GET /api", 429), ("GET /api", None), ("HEAD .*safetensors", 403), ("GET /lfs", 501)],
)
def test_an_outage_is_a_machine_error(
    hub: FakeHub, client: Client, repo: str, pattern: str, status: int | None
) -> None:
    hub.commit(repo, MODEL)
    hub.fail(pattern, status=status)
    with pytest.raises(MachineError, match=f"HTTP {status}" if status else "connection to http://127.0.0.1"):
        client.fetch(f"hf://{repo}")


def test_an_outage_while_headers_are_read_is_a_machine_error(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, MODEL)
    hub.fail("GET /lfs/", after_bytes=1000)
    with pytest.raises(MachineError, match="connection"):
        client.fetch(f"hf://{repo}", headers_only=True)
    hub.failures.clear()
    stand_in = client.fetch(f"hf://{repo}", headers_only=True) / "model.safetensors"
    assert stand_in.stat().st_size == len(MODEL["model.safetensors"])
    assert sorted(contents(stand_in.parent)) == sorted(MODEL)


def test_a_dropped_download_is_taken_up_again(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, MODEL)
    hub.fail("GET /lfs/", after_bytes=150_000, times=1)
    with suppress(MachineError):  # 0.36 ends here; later clients try again by themselves
        client.fetch(f"hf://{repo}")
    assert contents(client.fetch(f"hf://{repo}")) == MODEL
    assert len([exchange for exchange in hub.exchanges if exchange.path.startswith("/lfs/")]) == 2


def other_bytes(content: bytes) -> bytes:
    """Of the same size, one bit another."""
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("path", sorted(MODEL))
def test_bytes_that_the_hub_does_not_list_are_asked_for_again_and_then_refused(
    path: str, hub: FakeHub, client: Client, repo: str, home: Path
) -> None:
    # Of its own content, so that the cache has no other copy of it.
    files = {**MODEL, path: repo.encode() + MODEL[path]}
    hub.commit(repo, files)
    wrong = other_bytes(files[path])
    hub.lies[path] = [wrong, wrong]
    with pytest.raises(CorruptFile, match=rf"{re.escape(path)}: the Hub sent other bytes than it lists"):
        client.fetch(f"hf://{repo}")
    assert not [p for p in (home / "hub").rglob("*") if p.is_file() and p.read_bytes() == wrong]
    hub.lies[path] = [wrong]  # once: a transfer may be damaged
    assert contents(client.fetch(f"hf://{repo}")) == files


@pytest.mark.parametrize("path", sorted(MODEL))
def test_a_file_that_was_changed_in_the_cache_is_downloaded_again(
    path: str, hub: FakeHub, client: Client, repo: str
) -> None:
    files = {**MODEL, path: repo.encode() + MODEL[path]}
    hub.commit(repo, files)
    folder = client.fetch(f"hf://{repo}")
    (folder / path).resolve().write_bytes(other_bytes(files[path]))
    assert contents(client.fetch(f"hf://{repo}")) == files


@pytest.mark.parametrize("path", sorted(MODEL))
def test_offline_a_file_that_was_changed_in_the_cache_is_refused(
    path: str, hub: FakeHub, client: Client, repo: str, home: Path
) -> None:
    files = {**MODEL, path: repo.encode() + MODEL[path]}
    hub.commit(repo, files)
    folder = client.fetch(f"hf://{repo}")
    with Client(hub.url, home, HF_HUB_OFFLINE="1") as offline:
        assert contents(offline.fetch(f"hf://{repo}")) == files
        (folder / path).resolve().write_bytes(other_bytes(files[path]))
        with pytest.raises(CorruptFile, match="not the one that was downloaded"):
            offline.fetch(f"hf://{repo}")


def test_a_header_does_not_come_from_a_file_that_was_changed_in_the_cache(
    hub: FakeHub, client: Client, repo: str
) -> None:
    model = safetensors(400_000, first_byte=9) + b""
    hub.commit(repo, {"config.json": repo.encode(), "model.safetensors": model})
    folder = client.fetch(f"hf://{repo}")
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(bytes(8) + model[8:])
    stand_in = client.fetch(f"hf://{repo}", headers_only=True) / "model.safetensors"
    assert stand_in.read_bytes()[: len(header_of(model))] == header_of(model)


def test_a_name_with_a_no_break_space_is_a_name(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, {**MODEL, "my\u00a0notes.md": b"x"})
    assert contents(client.fetch(f"hf://{repo}")) == MODEL


def test_storage_that_is_busy_for_a_moment_is_asked_again(hub: FakeHub, client: Client, repo: str) -> None:
    files = {**MODEL, "model.safetensors": safetensors(300_000, first_byte=11)}
    hub.commit(repo, files)
    hub.fail("GET /lfs/", status=503, times=1, retry_after="0")
    assert contents(client.fetch(f"hf://{repo}")) == files


def test_a_whole_cache_is_not_hashed_again_at_every_start(hub: FakeHub, client: Client, repo: str, home: Path) -> None:
    hub.commit(repo, MODEL)
    client.fetch(f"hf://{repo}")
    marks = {path: path.stat().st_mtime_ns for path in (home / "smolconv-checked").iterdir()}
    client.fetch(f"hf://{repo}")
    assert {path: path.stat().st_mtime_ns for path in (home / "smolconv-checked").iterdir()} == marks


def http_date(seconds: float) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("retry_after", [None, "0", "1", "in a date", "nonsense"])
@pytest.mark.parametrize("what", [r"GET /api/models/[^/]+/[^/]+$", "GET /api/models/.*/tree"])
def test_a_server_that_is_busy_for_a_moment_is_asked_again_when_it_says(
    what: str, status: int, retry_after: str | None, hub: FakeHub, client: Client, repo: str
) -> None:
    hub.commit(repo, MODEL)
    said = http_date(2) if retry_after == "in a date" else retry_after
    hub.fail(what, status=status, times=1, retry_after=said)
    before = time.time()
    assert contents(client.fetch(f"hf://{repo}")) == MODEL
    if retry_after in ("1", "in a date"):
        assert time.time() - before >= 1.0  # what it asked for; a date has whole seconds


def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, MODEL)
    hub.fail("GET /api", status=429, retry_after="3600")
    with pytest.raises(MachineError, match="HTTP 429"):
        client.fetch(f"hf://{repo}")


def entry(**changes: object) -> dict[str, object]:
    return {"type": "file", "oid": "0" * 40, "size": 2, "path": "extra.json", **changes}


LISTINGS: dict[str, Callable[[list[dict[str, object]]], object]] = {
    "a path above": lambda page: [*page, entry(path="../../evil.json")],
    "a path above within": lambda page: [*page, entry(path="a/../../evil.json")],
    "an absolute path": lambda page: [*page, entry(path="/etc/evil.json")],
    "a backslash": lambda page: [*page, entry(path="a\\evil.json")],
    "a NUL": lambda page: [*page, entry(path="evil\0.json")],
    "an empty name": lambda page: [*page, entry(path="")],
    "no path": lambda page: [*page, {"type": "file", "oid": "0" * 40, "size": 2}],
    "a number for a path": lambda page: [*page, entry(path=3)],
    "a name twice": lambda page: [*page, *page],
    "a name twice, otherwise": lambda page: [*page, entry(path="config.json")],
    "a negative size": lambda page: [*page, entry(size=-1)],
    "a fraction for a size": lambda page: [*page, entry(size=1.5)],
    "text for a size": lambda page: [*page, entry(size="2")],
    "true for a size": lambda page: [*page, entry(size=True)],
    "no size": lambda page: [*page, {"type": "file", "oid": "0" * 40, "path": "extra.json"}],
    "a digest that is none": lambda page: [*page, entry(oid="../../x")],
    "no digest": lambda page: [*page, {"type": "file", "size": 2, "path": "extra.json"}],
    "an LFS digest that is none": lambda page: [*page, entry(lfs={"oid": "x", "size": 2, "pointerSize": 1})],
    "an LFS size that is another": lambda page: [*page, entry(lfs={"oid": "0" * 64, "size": 3, "pointerSize": 1})],
    "LFS is a list": lambda page: [*page, entry(lfs=[1])],
    "a folder above": lambda page: [*page, entry(type="directory", path="..")],
    "an object": lambda page: {"files": page},
    "a number": lambda page: 3,
    "text": lambda page: "files",
    "null": lambda page: None,
    "a list of numbers": lambda page: [1, 2],
    "a list of lists": lambda page: [[entry()]],
}


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_that_is_none_is_a_corrupt_file_and_writes_nothing(
    name: str, headers_only: bool, hub: FakeHub, client: Client, repo: str, home: Path
) -> None:
    hub.commit(repo, MODEL)
    hub.listing = LISTINGS[name]
    with pytest.raises(CorruptFile, match=r"listing of hf://"):
        client.fetch(f"hf://{repo}", headers_only=headers_only)
    assert not list(home.parent.rglob("*evil*"))


def test_a_listing_that_goes_in_circles_ends(hub: FakeHub, client: Client, repo: str) -> None:
    hub.commit(repo, MODEL)
    hub.in_circles = True
    with pytest.raises(CorruptFile, match="twice"):
        client.fetch(f"hf://{repo}")


@pytest.mark.parametrize(
    "said",
    [
        lambda info: {**info, "sha": "../../../evil"}, lambda info: {**info, "sha": 3}, lambda info: [info],
        lambda info: "no", lambda info: None, lambda info: {**info, "siblings": 3}, lambda info: 7,
    ],
)  # fmt: skip
def test_a_repository_that_is_none_is_a_bad_checkpoint(
    said: Callable[[dict[str, object]], object], hub: FakeHub, client: Client, repo: str, home: Path
) -> None:
    hub.commit(repo, MODEL)
    hub.info = said
    with pytest.raises(BadCheckpoint):
        client.fetch(f"hf://{repo}", headers_only=True)
    assert not list(home.parent.rglob("*evil*"))


def test_no_server_is_a_machine_error(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9", tmp_path) as client:
        with pytest.raises(MachineError, match=r"connection to http://127\.0\.0\.1:9 failed"):
            client.fetch("hf://a/b")
        with pytest.raises(MachineError, match=r"connection to http://127\.0\.0\.1:9 failed"):
            client.push(tmp_path, "a/b")


def test_a_cache_that_cannot_be_written_is_a_machine_error(hub: FakeHub, repo: str, tmp_path: Path) -> None:
    hub.commit(repo, MODEL)
    (tmp_path / "file").touch()
    with (
        Client(hub.url, tmp_path / "file" / "home") as client,
        pytest.raises(MachineError, match="set HF_HOME"),
    ):
        client.fetch(f"hf://{repo}")


def test_offline_the_cache_answers_or_says_what_it_lacks(hub: FakeHub, repo: str, tmp_path: Path) -> None:
    names = ["model-1.safetensors", "model-2.safetensors"]
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))}).encode()
    model = {"config.json": b"{}", "model.safetensors.index.json": index, **dict.fromkeys(names, safetensors(99_000))}
    sha = hub.commit(repo, model)
    hub.commit(repo, MODEL, branch="headers")
    with Client(hub.url, tmp_path) as online:
        folder = online.fetch(f"hf://{repo}")
        headers = online.fetch(f"hf://{repo}@headers", headers_only=True)

    hub.forget_exchanges()
    with Client(hub.url, tmp_path, HF_HUB_OFFLINE="1") as offline:
        assert offline.fetch(f"hf://{repo}") == offline.fetch(f"hf://{repo}@{sha}") == folder
        assert offline.fetch(f"hf://{repo}", headers_only=True) == folder
        assert offline.fetch(f"hf://{repo}@headers", headers_only=True) == headers
        with pytest.raises(MachineError, match=r"no weights(.|\n)*unset it and run again"):
            offline.fetch(f"hf://{repo}@headers")
        (folder / names[1]).unlink()
        with pytest.raises(MachineError, match=r"model-2\.safetensors(.|\n)*unset it and run again"):
            offline.fetch(f"hf://{repo}")
        with pytest.raises(MachineError, match="not in the cache"):
            offline.fetch("hf://lab/never-fetched")
        with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
            offline.push(folder, "lab/new")
    assert hub.exchanges == []


def test_without_the_client_the_way_to_install_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('broken')")
    path = os.pathsep.join([str(tmp_path), str(Path(errors.__file__).parents[1])])
    with Client("", tmp_path, PYTHONPATH=path) as client, pytest.raises(NotInstalled, match="pip install"):
        client.fetch("hf://a/b")


def test_the_client_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, smolconv.hub.download as hub, smolconv.hub.push; hub.parse_hub_uri('hf://a/b'); "
        "print('huggingface_hub' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(errors.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# Pushing --------------------------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_what_is_pushed_comes_back_bit_by_bit(hub: FakeHub, client: Client, repo: str, tmp_path: Path) -> None:
    checkpoint = {
        **SMALL_FILES,
        "model.safetensors": safetensors(2_000_000),
        "smolconv_state/exp_avg-00001-of-00001.safetensors": safetensors(3_000),
        "smolconv_state/state.json": b"{}",
        "smolconv_manifest.json": b"{}",
    }
    left_behind = {"smolconv.lock": b"", "smolconv_state/x.lock": b"", "journal.jsonl": b"", "convert.journal": b""}
    write(tmp_path, {**checkpoint, **left_behind, "README.md": b"---\nlicense: mit\n---\n# A model\n"})
    url = client.push(tmp_path, repo, message="SmolLM2 at step 1000")

    sha = hub.repositories[repo].branches["main"]
    assert url == f"{hub.url}/{repo}/commit/{sha}"
    assert hub.repositories[repo].messages[sha] == "SmolLM2 at step 1000"
    assert not hub.repositories[repo].private
    assert not left_behind.keys() & hub.repositories[repo].commits[sha].keys()
    assert "README.md" in hub.repositories[repo].commits[sha]
    assert contents(client.fetch(f"hf://{repo}")) == checkpoint


def test_a_second_push_goes_to_the_same_repository(hub: FakeHub, client: Client, repo: str, tmp_path: Path) -> None:
    client.push(write(tmp_path, {"config.json": b"{}", "old.json": b"{}"}), repo)
    (tmp_path / "old.json").unlink()
    client.push(write(tmp_path, MODEL), repo)
    assert contents(client.fetch(f"hf://{repo}")) == MODEL


def test_a_private_push_never_goes_to_a_public_repository(
    hub: FakeHub, client: Client, repo: str, tmp_path: Path
) -> None:
    write(tmp_path, MODEL)
    client.push(tmp_path, repo, private=True)
    assert hub.repositories[repo].private
    sha = hub.commit(f"{repo}-public", {})
    with pytest.raises(UsageError, match="is public, so nothing was uploaded"):
        client.push(tmp_path, f"{repo}-public", private=True)
    assert hub.repositories[f"{repo}-public"].branches["main"] == sha


def test_a_push_that_cannot_be_leaves_one_clear_error(hub: FakeHub, client: Client, repo: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        client.push(tmp_path / "nothing", repo)
    with pytest.raises(UsageError, match="not the name of a repository"):
        client.push(tmp_path, "no-owner")
    write(tmp_path, MODEL)
    hub.fail("POST /api/repos/create", status=401)
    with pytest.raises(MachineError, match="hf auth login"):
        client.push(tmp_path, repo)
    hub.failures.clear()
    hub.fail("PUT /upload", status=403)
    with pytest.raises(MachineError, match="hf auth login"):
        client.push(tmp_path, repo)
