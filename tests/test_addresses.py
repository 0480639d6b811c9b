"""Addresses of storage that smolconv does not open: refused by every command, before one becomes a local path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES, run_cli

import smolconv
from smolconv.errors import UsageError

HF = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf"
ELSEWHERE = [
    ("s3://bucket/run", "mount it"), ("gs://bucket/run", "mount it"), ("https://huggingface.co/lab/smol/tree/main", "hf://lab/smol"),
    ("file:///data/run", "/data/run"), ("https://example.org/model.safetensors", "Copy it to a local disk"),
]  # fmt: skip


@pytest.mark.parametrize(("address", "advice"), ELSEWHERE, ids=[each[0] for each in ELSEWHERE])
@pytest.mark.parametrize(
    "words",
    [["inspect", "@"], ["convert", "@", "out", "--to", "hf"], ["convert", str(HF), "@", "--to", "hf"], ["runs", "@"],
     ["verify", str(HF), "@"], ["tokenize", "@", "tokens", "--tokenizer", str(HF)], ["publish", "@", "a/b"]],
    ids=["inspect", "source", "target", "runs", "verify", "tokenize", "publish"],
)  # fmt: skip
def test_an_address_of_other_storage_is_refused_by_every_command(
    tmp_path: Path, words: list[str], address: str, advice: str
) -> None:
    done = run_cli(*(address if word == "@" else word for word in words), cwd=tmp_path)
    assert done.code == 2, done.stderr
    assert (
        address.partition("://")[0] + "://" in done.stderr and "is not an address that smolconv can open" in done.stderr
    )
    assert advice in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: smolconv.inspect("s3://bucket/run"), lambda: smolconv.inspect(Path("s3://bucket/run")),
        lambda: smolconv.convert(HF, "s3://bucket/run", to="hf"), lambda: smolconv.verify(HF, "hf:/lab/smol"),
    ],
)  # fmt: skip
def test_so_it_is_from_python(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="local path or hf://owner/name was expected"):
        call()


def test_a_recipe_does_not_write_to_one(tmp_path: Path) -> None:
    done = run_cli("recipe", "init", "try-out", "r.yaml", cwd=tmp_path)
    assert done.code == 0, done.stderr
    done = run_cli("recipe", "validate", "r.yaml", "--set", "output=s3://bucket/run", cwd=tmp_path)
    assert done.code == 2 and "s3://bucket/run is not an address that smolconv can open" in done.stderr


@pytest.mark.parametrize(
    "words", [["inspect", "@"], ["convert", str(HF), "@", "--to", "hf"], ["plot", "@"], ["runs", "@"]]
)
def test_a_name_that_no_file_system_has_room_for_is_a_mistake_of_the_words(tmp_path: Path, words: list[str]) -> None:
    done = run_cli(*("a" * 300 if word == "@" else word for word in words), cwd=tmp_path)
    assert done.code in (2, 3) and "aaa" in done.stderr and "Errno" not in done.stderr, done.stderr
