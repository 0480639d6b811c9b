"""Claims about folders as people really bring them: which is read, what is said of the others, and what to do.

Every folder is made of real checkpoints and of the names and documents that the program in question writes.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from conftest import FIXTURES

from smolconv.errors import CorruptFile
from smolconv.files import is_lfs_pointer, read_bytes
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint

TINY = FIXTURES / "nanotron" / "smollm2-tiny"
RUN = TINY / "tp1-pp1-dp1-zero0"
HF = TINY / "expected_hf"
DEEPSPEED = FIXTURES / "deepspeed" / "smollm2-tiny-bf16-zero1-ws2"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face folder of one safetensors file, without Adam's state."""
    return Path(shutil.copytree(HF, tmp_path / "hf"))


@pytest.fixture
def nanotron(tmp_path: Path) -> Path:
    """A nanotron run folder, with Adam's state after 3 steps."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


# --- Git LFS ---


def leave_pointer(path: Path) -> Path:
    """Put in a file's place what git checks out where Git LFS is not installed (git-lfs/docs/spec.md)."""
    content = path.read_bytes()
    oid = hashlib.sha256(content).hexdigest()
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n")
    return path


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        (HF, "model.safetensors"),
        (HF, "config.json"),
        (RUN, "3/model/**/*.safetensors"),
        (RUN, "3/optimizer/*.pt"),
        (RUN, "3/model_config.json"),
        (RUN, "latest.txt"),
        (DEEPSPEED / "checkpoint", "*/*_optim_states.pt"),
        (DEEPSPEED / "checkpoint", "latest"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_pointer_of_git_lfs_in_the_place_of_any_file_is_said_to_be_one(source, pattern, tmp_path):
    folder = shutil.copytree(source, tmp_path / "clone")
    pointer = leave_pointer(sorted(folder.glob(pattern))[0])
    options = ReadOptions(config=HF / "config.json" if source.name == "checkpoint" else None)
    with pytest.raises(CorruptFile, match="is a pointer left by Git LFS, not the file itself") as caught:
        read_checkpoint(folder, options)
    assert str(pointer) in str(caught.value)
    assert "git lfs pull" in str(caught.value)


def test_a_pointer_in_the_place_of_a_gguf_file_is_said_to_be_one(tmp_path):
    pytest.importorskip("gguf")
    from smolconv.layouts.gguf.reader import read_gguf

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CorruptFile, match="is a pointer left by Git LFS"):
        read_gguf(leave_pointer(tmp_path / "model.gguf"))


def test_a_pointer_is_told_from_the_file_and_from_a_text_about_pointers(tmp_path):
    shutil.copy(HF / "config.json", tmp_path)
    long_text = tmp_path / "notes.txt"
    long_text.write_text("version https://git-lfs.github.com/spec/v1 is how pointers begin. " + "x" * 1024)
    assert not is_lfs_pointer(tmp_path / "config.json")
    assert not is_lfs_pointer(long_text)
    assert not is_lfs_pointer(tmp_path / "nowhere")
    assert not is_lfs_pointer(tmp_path)
    assert read_bytes(long_text) == long_text.read_bytes()
    assert is_lfs_pointer(leave_pointer(tmp_path / "config.json"))
