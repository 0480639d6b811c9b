"""Claims about nonsense in the place of every document and file that a reader opens: one error, short, with its path.

Each is put into a copy of a real checkpoint, in the place of each file that says something. Nothing waits, nothing fills
the memory, nothing is taken for left out, and no output is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from conftest import FIXTURES, convert, run_cli

from smolconv.errors import BadCheckpoint, CorruptFile, MachineError, MissingFile, SmolconvError, UsageError
from smolconv.files import MOST_NAME_BYTES, is_file_name, is_there, open_file, read_bytes, require_place
from smolconv.layouts.registry import read_checkpoint
from smolconv.parsing import parse_json, parse_yaml_mapping, require_small_yaml

TP2 = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp1-dp2-zero1"
SECONDS = 20  #: what hangs is stopped; a reader takes less than one


@contextmanager
def stopped() -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise AssertionError(f"still busy after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- What is put in a file's place ---


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its path may be longer than a socket's can be
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def ten_terabytes_of_holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 10 * 10**12)


def nothing(path: Path) -> None:
    path.touch()


def brackets(path: Path) -> None:
    path.write_text("[" * 3000)


def nested_objects(path: Path) -> None:
    path.write_text('{"a":' * 3000 + "1" + "}" * 3000)


def bytes_that_are_no_text(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)) * 40)


def many_letters(path: Path) -> None:
    path.write_text("x" * 100_000)


NO_FILES = (named_pipe, folder, link_to_itself, link_to_nothing, endless_device, unix_socket)
NO_CONTENT = (ten_terabytes_of_holes, nothing, brackets, nested_objects, bytes_that_are_no_text, many_letters)

#: Every file that says something about a checkpoint, by layout. Tokenizers and READMEs are copied, not read.
PLACES = {
    "nanotron": (
        "latest.txt", "3/model_config.json", "3/checkpoint_metadata.json",
        "3/model/model/final_layer_norm/pp_block/model_weight.safetensors",
        "3/optimizer/optimizer_pp-0-of-1_dp-1-of-2_tp-1-of-2_exp-0-of-1.pt",
        "3/lr_scheduler/lr_scheduler_pp-0-of-1_tp-0-of-2_exp-0-of-1.pt",
    ),
    "huggingface": (
        "config.json", "model.safetensors", "smolconv_manifest.json", "smolconv_state/state.json",
        "smolconv_state/exp_avg.safetensors.index.json", "smolconv_state/exp_avg-00001-of-00001.safetensors",
        "smolconv_state/source/model_config.json", "smolconv_state/source/checkpoint_metadata.json",
    ),
    "deepspeed": (
        "latest", "config.json", "smolconv_manifest.json", "smolconv_source/model_config.json",
        "smolconv_source/checkpoint_metadata.json", "global_step3/mp_rank_00_model_states.pt",
        "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint in all layouts, with Adam's state and the documents of the first."""
    made = tmp_path_factory.mktemp("sources")
    convert(TP2, made / "huggingface", "hf")
    convert(TP2, made / "deepspeed", "deepspeed", zero_stage=1, world_size=2)
    return {"nanotron": TP2, "huggingface": made / "huggingface", "deepspeed": made / "deepspeed"}


def in_place(source: Path, tmp_path: Path, place: str, put: Callable[[Path], None]) -> Path:
    broken = Path(shutil.copytree(source, tmp_path / "source"))
    assert (broken / place).is_file(), sorted(map(str, broken.rglob("*")))
    (broken / place).unlink()
    put(broken / place)
    return broken


def refusal(source: Path, target: Path) -> SmolconvError:
    """How its conversion ends, which leaves nothing."""
    with pytest.raises(SmolconvError) as caught, stopped():
        convert(source, target, "hf")
    assert not target.exists()
    assert not target.with_name(target.name + ".partial").exists()
    return caught.value


@pytest.mark.parametrize("put", NO_FILES, ids=lambda put: put.__name__)
@pytest.mark.parametrize(
    ("layout", "place"), [(layout, place) for layout, places in PLACES.items() for place in places]
)
def test_what_is_no_file_is_refused_in_the_place_of_any(
    sources: dict[str, Path], tmp_path: Path, layout: str, place: str, put: Callable[[Path], None]
) -> None:
    broken = in_place(sources[layout], tmp_path, place, put)
    error = refusal(broken, tmp_path / "out")
    assert isinstance(error, BadCheckpoint)
    # A folder among nanotron's is walked as another parameter's: what is missing is told by the parameter's name.
    assert place in str(error) or (put is folder and "1 missing (model.final_layer_norm" in str(error))
    assert len(str(error).splitlines()) <= 4
    assert len(str(error)) < 1500


@pytest.mark.parametrize("put", NO_CONTENT, ids=lambda put: put.__name__)
@pytest.mark.parametrize(
    ("layout", "place"), [(layout, place) for layout, places in PLACES.items() for place in places]
)
def test_nonsense_is_refused_in_the_place_of_any_file(
    sources: dict[str, Path], tmp_path: Path, layout: str, place: str, put: Callable[[Path], None]
) -> None:
    broken = in_place(sources[layout], tmp_path, place, put)
    error = refusal(broken, tmp_path / "out")
    assert isinstance(error, BadCheckpoint)
    assert place in str(error)
    assert len(str(error).splitlines()) <= 5
    assert len(str(error)) < 1500


# --- Values of documents ---

VALUES = {
    "half a character": '"\\ud800"',
    "an infinite number": "1e999",
    "no number": "NaN",
    "5,000 digits": "7" * 5000,
    "brackets": "[" * 3000 + "]" * 3000,
}
JSON_PLACES = [(layout, place) for layout, places in PLACES.items() for place in places if place.endswith(".json")]


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize(("layout", "place"), JSON_PLACES)
def test_a_value_that_no_document_of_ours_holds_is_refused_wherever_it_stands(
    sources: dict[str, Path], tmp_path: Path, layout: str, place: str, value: str
) -> None:
    document = json.loads((sources[layout] / place).read_text())
    text = json.dumps({**document, "something else": 0}).replace('"something else": 0', f'"else": {VALUES[value]}')
    broken = in_place(sources[layout], tmp_path, place, lambda path: void(path.write_text(text)))
    error = refusal(broken, tmp_path / "out")
    assert isinstance(error, CorruptFile)
    assert place in str(error)
    assert len(str(error)) < 1500


def void(_: object) -> None:
    pass


FOLDERS = {"nanotron": ("3/model", "3/optimizer", "3/lr_scheduler"), "huggingface": ("smolconv_state",),
           "deepspeed": ("smolconv_source",)}  # fmt: skip


@pytest.mark.parametrize("put", [named_pipe, nothing, link_to_nothing], ids=lambda put: put.__name__)
@pytest.mark.parametrize(("layout", "place"), [(layout, place) for layout, all_ in FOLDERS.items() for place in all_])
def test_what_is_no_folder_is_refused_in_the_place_of_one(
    sources: dict[str, Path], tmp_path: Path, layout: str, place: str, put: Callable[[Path], None]
) -> None:
    broken = Path(shutil.copytree(sources[layout], tmp_path / "source"))
    (broken / "smolconv_manifest.json").unlink(missing_ok=True)
    shutil.rmtree(broken / place)
    put(broken / place)
    error = refusal(broken, tmp_path / "out")
    assert isinstance(error, BadCheckpoint)
    assert place in str(error)


def test_the_sources_are_read_as_they_are(sources: dict[str, Path]) -> None:
    """The negative control: what is refused above is refused for what was put into it."""
    for source in sources.values():
        assert read_checkpoint(source).has_optimizer


# --- JSON ---


@pytest.mark.parametrize("levels", [64, 65, 900, 100_000])
def test_json_has_at_most_64_levels(levels: int) -> None:
    document = (b"[" * levels) + (b"]" * levels)
    if levels == 64:
        assert str(parse_json(document)).count("[") == 64
        return
    with pytest.raises(ValueError, match="more than 64 deep"):
        parse_json(document)


def test_numbers_and_text_of_json_can_be_written_again() -> None:
    assert parse_json(b'[1e300, "\\ud83d\\ude00", 18446744073709551615]') == [1e300, "\U0001f600", 2**64 - 1]
    for document in (b"1e999", b"-Infinity", b"NaN", b'{"\\udc00": 1}', b'"\\ud800x"', b"1" * 41):
        with pytest.raises(ValueError, match=r".+"):
            parse_json(document)


# --- YAML ---


def billion_laughs(levels: int) -> str:
    return "a0: &a0 [lol, lol]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels)
    )


def test_aliases_count_as_often_as_they_are_used() -> None:
    small = billion_laughs(4)
    assert parse_yaml_mapping(small, "x") == yaml.safe_load(small)
    for levels in (9, 200):
        with pytest.raises(CorruptFile, match="values, including those of aliases"):
            parse_yaml_mapping(billion_laughs(levels), "x")


@pytest.mark.parametrize("document", ["a: &a [*a]", "a: &a {b: {c: *a}}", "? &a [*a]\n: 1"])
def test_an_alias_of_itself_is_refused(document: str) -> None:
    with pytest.raises(CorruptFile, match=r"\*a is inside its own anchor"):
        parse_yaml_mapping(document, "x")


@pytest.mark.parametrize("document", ["a: " + "[" * 3000, "a: " + "{b: " * 3000, "a: " + "[" * 1_000_000])
def test_yaml_has_at_most_64_levels(document: str) -> None:
    with stopped(), pytest.raises(CorruptFile, match="more than 64 deep"):
        parse_yaml_mapping(document, "x")
    with pytest.raises(ValueError, match="more than 64 deep"):
        require_small_yaml(document)


@pytest.mark.parametrize(
    "value",
    ["2024-99-99", "2024-12-24", "!!binary aGFsbG8=", "!!set {a, b}", ".inf", ".nan", "7" * 4000, "!!python/none x"],
)
def test_yaml_holds_what_json_holds(value: str) -> None:
    assert parse_yaml_mapping("a: [1, 2.5, text, null, true, {b: c}]", "x")
    with pytest.raises(CorruptFile, match="x is not valid YAML"):
        parse_yaml_mapping(f"a: {value}", "x")


def test_a_training_config_with_a_bomb_is_refused_before_it_is_written_again(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TP2, tmp_path / "source"))
    (source / "3/config.yaml").write_text(billion_laughs(30))
    with stopped(), pytest.raises(CorruptFile, match="those of aliases"):
        convert(source, tmp_path / "out", "nanotron")


# --- Files ---


@pytest.mark.parametrize("put", NO_FILES, ids=lambda put: put.__name__)
def test_only_regular_files_are_opened(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "x")
    for read in (open_file, read_bytes, is_there):
        with stopped(), pytest.raises((CorruptFile, MissingFile), match=str(tmp_path / "x")):
            read(tmp_path / "x")


def test_a_file_is_opened_through_links_and_a_missing_one_is_no_error_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"abc"
    assert is_there(tmp_path / "link")
    assert not is_there(tmp_path / "other")
    assert not is_there(tmp_path / "file" / "below")
    with pytest.raises(MissingFile, match="is not there"):
        read_bytes(tmp_path / "other")
    with pytest.raises(MissingFile, match="too long for a file"):
        read_bytes(tmp_path / ("x" * 300))


def test_a_document_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "x", 100) == b"x" * 100
    with pytest.raises(CorruptFile, match="has 100 bytes; expected at most 99"):
        read_bytes(tmp_path / "x", 99)


def test_a_file_without_a_size_is_read_to_its_end_and_no_further() -> None:
    with suppress(FileNotFoundError):  # there is none but on Linux
        assert read_bytes(Path("/proc/self/status")).startswith(b"Name:")
        with pytest.raises(CorruptFile, match="at most 10"):
            read_bytes(Path("/proc/self/status"), 10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "x").touch(mode=0)
    with pytest.raises(MachineError, match="cannot be read"):
        read_bytes(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "fine"),
    [("step-3", True), ("ü" * 127, True), ("", False), (".", False), ("..", False), ("a/b", False), ("/etc", False),
     ("a\0b", False), ("x" * 255, True), ("x" * 256, False), ("ü" * 128, False), ("\ud800", False)],
)  # fmt: skip
def test_names_of_files_lead_nowhere_else(name: str, fine: bool) -> None:
    assert is_file_name(name) is fine


@pytest.mark.parametrize(
    "place", ["pipe", "folder", "link to a device", "/dev/null", "/dev/stdout", "/dev/../dev/null", "no/x"]
)
def test_an_output_replaces_at_most_a_file(place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link to a device").symlink_to("/dev/null")
    with pytest.raises(UsageError, match=r"--proof .* (is no regular file|does not exist)"):
        require_place("--proof", tmp_path / place)
    for fine in ("new", "old", "link"):
        (tmp_path / "old").touch()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("old")
        require_place("--proof", tmp_path / fine)


def test_a_pointer_of_100000_letters_is_told_in_few(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("x" * 100_000)
    with pytest.raises(CorruptFile) as caught:
        read_checkpoint(tmp_path)
    assert str(MOST_NAME_BYTES) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_shape_of_20000_numbers_is_told_in_a_few_lines_that_a_terminal_shows(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    convert(TP2, source, "hf", optimizer=False)
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [*header["model.norm.weight"]["shape"], *[1] * 20_000]
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])
    (source / "smolconv_manifest.json").unlink()
    done = run_cli("inspect", str(source), "--json")
    assert done.code == 3
    assert "model.norm.weight is [48, 1, 1" in done.stderr and "letters)" in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 1100 and len(done.stdout) < 2500
