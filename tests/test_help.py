"""Claims about what people read and paste: help that fits, examples, tables in a pipe, failures for scripts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import FIXTURES, Finished, command, environment

import smolconv.commands.main  # noqa: F401  (the commands register themselves)
from smolconv.commands.app import app

HF = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf"
TP2 = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp1-dp2-zero1"
#: Other words for choices that are named: what people type, too.
ALIASES = {"huggingface", "ds", "fp32", "bf16", "fp16"}


def commands(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    group = group or typer.main.get_command(app)
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*words, name))
        else:
            yield (*words, name), found


ALL = list(commands())


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, ...], str]:
    """Each command's help on a terminal of 80 columns."""
    program = (
        "import sys\nfrom smolconv.commands.main import app\nfor words in sys.argv[1:]:\n"
        "    print('\\0', end='')\n    app([*words.split(), '--help'], standalone_mode=False)\n"
    )
    done = subprocess.run(
        [command()[0], "-c", program, *(" ".join(words) for words, _ in ALL)],
        capture_output=True, text=True, check=True, env=environment(COLUMNS="80"),
    )  # fmt: skip
    return dict(zip((words for words, _ in ALL), done.stdout.split("\0")[1:], strict=True))


@pytest.mark.parametrize(("words", "found"), ALL, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_help_fits_80_columns_and_names_every_option_choice_and_example(
    helps: dict[tuple[str, ...], str], words: tuple[str, ...], found: Any
) -> None:
    text = helps[words]
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for param in found.params:
        if param.param_type_name == "option":
            assert re.search(rf"{re.escape(param.opts[0])}\b", text), param.opts
        for choice in set(getattr(param.type, "choices", ())) - ALIASES:
            assert re.search(rf"\b{re.escape(choice)}\b", text), (param.opts, choice)
    examples = re.findall(r"^ +(smolconv .+)$", found.epilog or "", re.MULTILINE)
    assert examples
    for example in examples:
        assert re.search(rf"^ *{re.escape(example)} *$", text, re.MULTILINE), example


def test_a_table_in_a_pipe_is_whole(cli: Callable[..., Finished]) -> None:
    longest = "model.layers.0.post_attention_layernorm.weight"
    done = subprocess.run(
        command("inspect", HF, "--tensors"), capture_output=True, text=True, check=True, env=environment(COLUMNS="40")
    )
    lines = done.stdout.splitlines()
    assert any(line.split()[:1] == [longest] for line in lines)
    assert lines == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("word", "meant"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
)  # fmt: skip
def test_dtypes_may_be_said_as_people_say_them(
    cli: Callable[..., Finished], tmp_path: Path, word: str, meant: str
) -> None:
    done = cli("convert", HF, tmp_path / "out", "--to", "hf", "--dtype", word)
    assert done.code == 0, done
    found = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
    assert list(found["dtypes"]) == [meant]


def test_deepspeed_may_be_said_ds(cli: Callable[..., Finished], tmp_path: Path) -> None:
    assert cli("convert", HF, tmp_path / "out", "--to", "ds").code == 0
    assert json.loads(cli("inspect", tmp_path / "out", "--json").stdout)["layout"] == "deepspeed"


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (("inspect", "/nowhere"), 3, "MissingFile"),
        (("inspect", HF, "--no-such-option"), 2, "UsageError"),
        (("convert", HF, HF, "--to", "hf"), 2, "UsageError"),
        (("convert", HF, "out", "--to", "gguf"), 2, "UsageError"),
    ],
    ids=["missing", "option", "target", "layout"],
)
def test_with_json_a_failure_is_a_document(
    cli: Callable[..., Finished], tmp_path: Path, words: tuple[object, ...], code: int, name: str
) -> None:
    done = cli(*words, "--json", cwd=tmp_path)
    assert done.code == code
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    error = document["error"]
    assert set(error) == {"class", "exit_code", "message", "advice"}
    assert (error["class"], error["exit_code"]) == (name, code)
    assert error["message"]
    assert "\n" not in error["message"]
    plain = cli(*words, cwd=tmp_path)
    assert (plain.code, plain.stdout) == (code, "")


def test_what_moves_a_terminals_cursor_is_not_printed(cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("inspect", tmp_path / "a\x1b[2Jb")
    assert done.code == 3
    assert "\x1b" not in done.stderr
    assert r"a\x1b[2Jb" in done.stderr


def test_completion_of_the_shell_is_on() -> None:
    shown = subprocess.run(
        command("--show-completion", "bash"), capture_output=True, text=True, check=False,
        env=environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"),
    )  # fmt: skip
    assert "complete -o default" in shown.stdout
