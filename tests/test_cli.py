"""The console script as scripts and people meet it: imports, help, JSON, common options, the Hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, command, environment, files_below, run_cli
from fake_hub import FakeHub
from safetensors.numpy import save_file

from smolconv.models.huggingface import parameter_shapes, spec_from_hf

TINY = FIXTURES / "nanotron/smollm2-tiny/tp2-pp1-dp2-zero1"
COMMANDS = ("inspect", "diff", "convert", "verify", "import-gguf", "tokenize", "plan", "plot", "doctor")


def modules_after(*words: object) -> set[str]:
    """Top-level modules that a run of the console script has imported."""
    code = (
        "import sys, atexit, json\n"
        "atexit.register(lambda: print('MODULES', json.dumps(sorted(m.split('.')[0] for m in sys.modules)), file=sys.stderr))\n"
        f"sys.argv = {['smolconv', *map(str, words)]!r}\nfrom smolconv.commands.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    return set(json.loads(done.stderr.rpartition("MODULES ")[2]))


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"], ["inspect", TINY], ["--version"]])
def test_help_and_inspect_import_neither_torch_nor_transformers(words: list[object]) -> None:
    assert not modules_after(*words) & {"torch", "transformers", "safetensors", "huggingface_hub"}


@pytest.mark.parametrize("words", [["--help"], ["inspect", TINY.parent / "expected_hf"]])
def test_what_moves_no_element_imports_no_numpy(words: list[object]) -> None:
    assert "numpy" not in modules_after(*words)


def test_converting_weights_and_adam_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    assert not modules_after("convert", TINY, tmp_path / "hf", "--to", "hf") & {"torch", "transformers"}
    assert not modules_after("convert", tmp_path / "hf", tmp_path / "nt", "--to", "nanotron") & {
        "torch",
        "transformers",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_shows_examples(command: str) -> None:
    done = run_cli(command, "--help")
    assert done.code == 0
    assert f"smolconv {command}" in done.stdout
    assert "Examples" in done.stdout
    for line in done.stdout.splitlines():
        if match := re.match(r"[│ ]+\*? *(--[\w-]+)[\s\w<>=/.,:-]*(.*)", line.rstrip("│ ")):
            assert len(line.split()) > 2, f"{match[1]} is not explained"


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (("convert", "a", "b", "--to"), "'hf', 'huggingface', 'nanotron', 'deepspeed', 'ds'"),
        (
            ("convert", "a", "b", "--to", "hf", "--dtype"),
            "'keep', 'float32', 'bfloat16', 'float16', 'fp32', 'bf16', 'fp16'",
        ),
        (("convert", "a", "b", "--to", "hf", "--digest"), "'xxh3', 'sha256', 'none'"),
        (("verify", "a", "b", "--engine"), "'ours', 'transformers', 'deepspeed', 'nanotron'"),
        (("verify", "a", "b", "--compute"), "'float32', 'bfloat16', 'fp32', 'bf16'"),
        (("import-gguf", "a", "b", "--dtype"), "'float32', 'bfloat16', 'float16', 'fp32', 'bf16', 'fp16'"),
        (("tokenize", "a", "b", "--tokenizer", "c", "--executor"), "'local', 'slurm'"),
    ],
)
def test_a_word_that_is_no_choice_is_a_usage_error_that_lists_the_choices(words: tuple[str, ...], choices: str) -> None:
    done = run_cli(*words, "fly")
    assert (done.code, done.stdout) == (2, "")
    assert f"'{words[-1]}': 'fly' is not one of {choices}." in done.stderr


def test_json_is_one_document_on_stdout_and_logs_go_to_stderr(tmp_path: Path) -> None:
    done = run_cli("convert", TINY, tmp_path / "hf", "--to", "hf", "--json")
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert {"source", "target", "files", "tensors", "bytes_read", "bytes_written", "seconds", "peak_rss_bytes"} <= set(
        document
    )
    assert document["warnings"]
    assert "warning" in done.stderr


def test_inspect_json_holds_what_scripts_rely_on() -> None:
    document = json.loads(run_cli("inspect", TINY, "--json", "--tensors").stdout)
    assert document["layout"] == "nanotron"
    assert document["architecture"] == "llama"
    assert document["topology"] == {
        "tp": 2, "pp": 1, "dp": 2, "zero_stage": 1, "world_size": None, "universal": False,
    }  # fmt: skip
    assert document["has_optimizer"] and document["tied"] and document["progress"]["step"] == 3
    assert {"spec", "parameters", "bytes", "dtypes", "files", "problems"} <= set(document)
    assert "model.layers.0.self_attn.q_proj.weight" in {tensor["name"] for tensor in document["tensors"]}


@pytest.mark.parametrize(
    ("ending", "words", "code"),
    [
        (">&-", ["inspect", TINY], 0),
        (">&-", ["inspect", TINY, "--json"], 0),
        (">&- 2>&-", ["inspect", TINY / "missing", "--json"], 3),
        (">/dev/full", ["inspect", TINY, "--json"], 4),
        (">/dev/full", ["inspect", TINY / "missing", "--json"], 3),
        ("2>/dev/full", ["convert", TINY, "--to", "hf"], 0),
        ("2>&1 | true", ["inspect", TINY / "missing"], 3),
        ("2>&1 | true", ["inspect", TINY, "--unknown"], 2),
        ("| true", ["inspect", TINY], 0),
        ("| true", ["convert", "--help"], 0),
        ("| true", ["diff", TINY, TINY.parents[1] / "smollm3-tiny/expected_hf"], 1),
    ],
    ids=["closed", "closed json", "both closed", "full json", "full error", "full log", "error in a pipe",
         "usage in a pipe", "pipe", "help in a pipe", "differs"],
)  # fmt: skip
def test_an_output_that_nobody_reads_does_not_change_the_exit_code(
    ending: str, words: list[object], code: int, tmp_path: Path
) -> None:
    words = [*words[:2], tmp_path / "out", *words[2:]] if words[0] == "convert" and "--to" in words else words
    line = f"{shlex.join(command(*words))} {ending}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "bug" not in done.stderr


def test_an_error_goes_to_no_other_stream_where_stderr_is_closed() -> None:
    line = f"{shlex.join(command('inspect', TINY / 'missing', '--json'))} 2>&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment())
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_terminal_encoding_can_show_every_name_and_no_name_controls_it(encoding: str, tmp_path: Path) -> None:
    name = b"\xc3\xbc \x1b[31m \xe2\x80\xae \xff"  # an umlaut, an escape sequence, a mark that reverses text, no UTF-8
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    shutil.copytree(TINY.parent / "expected_hf", folder)
    (folder / "model.safetensors").rename(folder / "gone")
    told = subprocess.run(
        command("inspect", folder, "--json"), capture_output=True, check=False,
        env=environment(PYTHONIOENCODING=encoding),
    )  # fmt: skip
    assert told.returncode == 3
    assert not set(told.stdout + told.stderr) & {0x1B, 0xFF}
    assert "\u202e" not in (told.stdout + told.stderr).decode(encoding)
    (folder / "gone").rename(folder / "model.safetensors")
    told = subprocess.run(
        command("inspect", folder, "--json"), capture_output=True, check=True,
        env=environment(PYTHONIOENCODING=encoding),
    )  # fmt: skip
    assert json.loads(told.stdout)["path"] == str(folder)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_common_options_may_stand_anywhere(tmp_path: Path, place: int) -> None:
    words: list[object] = ["convert", TINY, tmp_path / "hf", "--to", "hf"]
    words.insert((0, 1, 5)[place], "-q")
    done = run_cli(*words)
    assert (done.code, done.stderr) == (0, "")


def test_a_dry_run_names_every_file_and_writes_nothing(tmp_path: Path) -> None:
    planned = json.loads(
        run_cli("convert", TINY, tmp_path / "nt", "--to", "nanotron", "--tp", 2, "--dry-run", "--json").stdout
    )
    assert list(tmp_path.iterdir()) == []
    run_cli("convert", TINY, tmp_path / "nt", "--to", "nanotron", "--tp", 2)
    written = {path: len(data) for path, data in files_below(tmp_path / "nt").items()}
    written.pop("smolconv_manifest.json")
    assert {file["path"]: file["bytes"] for file in planned["files"]} == written


def test_diff_ends_with_1_when_specs_differ(tmp_path: Path) -> None:
    done = run_cli("diff", TINY, FIXTURES / "nanotron/smollm3-tiny/tp2-pp1-dp2-zero1")
    assert done.code == 1
    assert "hidden_size: 48 in A, 64 in B" in done.stdout
    assert run_cli("diff", TINY, FIXTURES / "nanotron/smollm2-tiny/tp1-pp2-dp1-zero0").code == 0


def test_a_bug_of_ours_ends_with_70_and_a_traceback_only_on_request() -> None:
    broken = "import smolconv.layouts.registry as r\nr.detect_layout = lambda *given: 1 / 0"
    done = run_cli("inspect", TINY, before=broken)
    assert done.code == 70
    assert "Traceback" not in done.stderr and "bug of smolconv" in done.stderr
    assert "Traceback" in run_cli("inspect", TINY, "--debug", before=broken).stderr


def test_a_library_that_ends_the_process_does_not_choose_its_exit_code() -> None:
    broken = "import sys, smolconv.layouts.registry as r\nr.detect_layout = lambda *given: sys.exit(1)"
    done = run_cli("inspect", TINY, before=broken)
    assert done.code == 70
    assert "unexpected exit of a library, 1" in done.stderr


def test_what_is_not_installed_is_named_with_its_exit_code(tmp_path: Path) -> None:
    hidden = "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)"
    done = run_cli("convert", TINY, tmp_path / "hf", "--to", "hf", "--verify", before=hidden)
    assert done.code == 5
    assert "pip install" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the Hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_environment(tmp_path: Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_fake"}


def test_a_dry_run_of_a_hub_repository_downloads_headers_only(tmp_path: Path, hub_environment: dict[str, str]) -> None:
    config = {"model_type": "llama", "vocab_size": 60_000, "hidden_size": 64, "intermediate_size": 64,
              "num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": True}  # fmt: skip
    shapes = parameter_shapes(spec_from_hf(config))
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with FakeHub() as hub:
        hub.commit("team/model", files_below(tmp_path))
        env = {**hub_environment, "HF_ENDPOINT": hub.url}
        done = run_cli("convert", "hf://team/model", tmp_path / "nt", "--to", "nanotron", "--dry-run", env=env)
        assert done.code == 0, done.stderr
        assert hub.sent_bytes() < 200_000 < (tmp_path / "model.safetensors").stat().st_size


def test_without_the_optimizer_its_files_stay_on_the_hub(tmp_path: Path, hub_environment: dict[str, str]) -> None:
    folder = FIXTURES / "nanotron/smollm2-tiny/tp1-pp2-dp1-zero0"
    with FakeHub() as hub:
        hub.commit("team/run", files_below(folder))
        env = {**hub_environment, "HF_ENDPOINT": hub.url}
        done = run_cli("convert", "hf://team/run", tmp_path / "hf", "--to", "hf", "--no-optimizer", env=env)
        assert done.code == 0, done.stderr
        assert not any("optimizer/" in path for path in hub.files_read("team/run"))
    same = run_cli("verify", tmp_path / "hf", folder, "--tensors-only")
    assert same.code == 0, same.stdout


def test_a_verified_conversion_is_pushed_and_can_be_fetched_again(
    tmp_path: Path, hub_environment: dict[str, str]
) -> None:
    with FakeHub() as hub:
        env = {**hub_environment, "HF_ENDPOINT": hub.url}
        done = run_cli("convert", TINY, tmp_path / "hf", "--to", "hf", "--push", "team/tiny", "--json", env=env)
        assert done.code == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["verification"]["passed"]
        assert "team/tiny" in result["pushed"]
        again = run_cli("convert", "hf://team/tiny", tmp_path / "nt", "--to", "nanotron", "--tp", 2, env=env)
        assert again.code == 0, again.stderr
    assert run_cli("verify", tmp_path / "nt", TINY, "--tensors-only", "--optimizer").code == 0
