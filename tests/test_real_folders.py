"""Claims about folders as people really bring them: which is read, what is said of the others, and what to do.

Every folder is made of real checkpoints and of the names and documents that the program in question writes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, convert, hf_weights
from safetensors.torch import load_file, save_file

from smolconv.continual_pretraining.tokens.files import TokenFolder
from smolconv.conversion import ConvertOptions, plan_conversion
from smolconv.errors import (
    BadCheckpoint,
    CorruptFile,
    MissingFile,
    NameMismatch,
    UnknownLayout,
    UnsupportedModel,
    UsageError,
)
from smolconv.files import is_lfs_pointer, read_bytes
from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.storage.atomic import OutputFolder
from smolconv.storage.output import write_files

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


# --- Folders of no layout ---


def touch(folder: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def adapter(folder: Path) -> None:
    """As PeftModel.save_pretrained writes it."""
    touch(folder, "adapter_model.safetensors", "README.md", "tokenizer.json")
    config = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M", "peft_type": "LORA", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def trainer(folder: Path) -> None:
    """As Trainer writes it with save_total_limit=3, before save_model."""
    for step in (500, 1000, 1500):
        shutil.copytree(HF, folder / f"checkpoint-{step}")
        touch(folder, f"checkpoint-{step}/optimizer.pt", f"checkpoint-{step}/trainer_state.json")


def config_and(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        touch(folder, *names)
        shutil.copy(HF / "config.json", folder)

    return make


def snapshot(folder: Path) -> None:
    """As the Hub's cache holds it when its folder blobs is gone."""
    for name in ("LICENSE", "model.fp8.bin"):
        (folder / name).symlink_to(f"../../blobs/{name}")


def hub_cache(folder: Path) -> None:
    """The repository's folder in the Hub's cache, with two revisions."""
    for revision in ("1" * 40, "2" * 40):
        shutil.copytree(HF, folder / "models--a--b-c/snapshots" / revision)
    touch(folder, "models--a--b-c/refs/main", content=b"2" * 40)
    touch(folder, "models--a--b-c/blobs/0")


def zero_to_fp32(folder: Path) -> None:
    """After ``zero_to_fp32.py . pytorch_model.bin`` of DeepSpeed 0.15.3 and later."""
    config_and("pytorch_model.bin/pytorch_model.bin")(folder)


def not_gathered(folder: Path) -> None:
    """As save_pretrained writes it under ZeRO-3: tensors of shape (0,)."""
    config_and()(folder)
    empty = {name: torch.empty(0) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    save_file(empty, folder / "model.safetensors", {"format": "pt"})


def training_file(folder: Path) -> None:
    config_and()(folder)
    torch.save({"epoch": 3, "state_dict": load_file(HF / "model.safetensors")}, folder / "pytorch_model.bin")


KINDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "adapter": (adapter, ("a PEFT adapter", "'HuggingFaceTB/SmolLM2-135M'", "merge_and_unload()")),
    "trainer": (trainer, ("checkpoint-1500, checkpoint-1000, checkpoint-500", "/checkpoint-1500")),
    "fsdp": (
        config_and("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"),
        ("FSDP or DCP", "pytorch_model_fsdp_0", "accelerate merge-weights"),
    ),
    "dcp": (
        lambda folder: touch(folder, ".metadata", "__0_0.distcp"),
        ("FSDP or DCP", "accelerate merge-weights", "torchtitan's convert_to_hf.py"),
    ),
    "meta": (
        lambda folder: touch(folder, "consolidated.00.pth", "params.json", "tokenizer.model"),
        ("Meta's own code: consolidated.00.pth", "Hugging Face's form"),
    ),
    "hub cache": (hub_cache, ("snapshots", f"/models--a--b-c/snapshots/{'2' * 40} or hf://a/b-c")),
    "zero_to_fp32": (zero_to_fp32, ("pytorch_model.bin is a folder", "zero_to_fp32", "--config", "/config.json")),
    "no elements": (not_gathered, ("has no elements (2 of 2 tensors)", "ZeRO-3", "global_stepN")),
    "training file": (training_file, ("one level down, in 'state_dict'", "torch.load(FILE", "['state_dict']")),
    "megatron": (
        lambda folder: touch(folder, "latest_checkpointed_iteration.txt", "iter_0001000/mp_rank_00/model_optim_rng.pt"),
        ("Megatron-LM", "Export it to Hugging Face"),
    ),
    "megatron iteration": (lambda folder: touch(folder, "mp_rank_00_001/model_optim_rng.pt"), ("Megatron-LM",)),
    "mlx": (config_and("weights.00.safetensors"), ("weights of MLX: weights.00.safetensors", "Hugging Face model")),
    "gguf": (config_and("smollm2-q8.gguf"), ("a GGUF file", "smolconv import-gguf", "/folder/smollm2-q8.gguf OUT")),
    "variant": (
        config_and("model.fp16.safetensors"),
        ("model.fp16.safetensors (fp16)", "ln -s model.fp16.safetensors model.safetensors"),
    ),
    "variant in shards": (
        config_and("model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"),
        ("ln -s model.safetensors.index.fp16.json model.safetensors.index.json",),
    ),
    "bin shards": (
        config_and("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        ("2 of 2 shards", "Copy pytorch_model.bin.index.json"),
    ),
    "links": (snapshot, ("2 of its files are dangling links", "../../blobs/LICENSE", "cp -rL")),
    "no config": (
        lambda folder: shutil.copy(HF / "model.safetensors", folder),
        ("no config.json", "--config PATH"),
    ),
    "run": (lambda folder: touch(folder, "recipe.resolved.yaml", "events.jsonl"), ("without a checkpoint yet",)),
    "config alone": (config_and(), ("has a config.json but no weights", "model.safetensors")),
    "folder of models": (
        lambda folder: [shutil.copytree(HF, folder / name) for name in ("a", "b")],
        ("folders in it are: a, b", "Name it, such as"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_read_is_told_apart_with_its_remedy(kind, tmp_path):
    make, words = KINDS[kind]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    folder = next(folder.glob("models--*"), folder)
    with pytest.raises(BadCheckpoint) as caught:
        read_checkpoint(folder)
    found, expected, remedy = str(caught.value).splitlines()
    assert len(found.replace(str(folder), "")) <= 120 and expected and remedy
    for word in words:
        assert word in str(caught.value)


def test_the_folder_that_zero_to_fp32_wrote_is_no_weights_of_the_one_around_it(tmp_path):
    """DeepSpeed 0.15.3 and later: ``zero_to_fp32.py . pytorch_model.bin`` makes a folder of that name."""
    run = Path(shutil.copytree(DEEPSPEED, tmp_path / "run")) / "checkpoint"
    shutil.copy(run.parent / "config.json", run)
    (run / "pytorch_model.bin").mkdir()
    weights = load_file(DEEPSPEED / "expected" / "fp32.safetensors")
    torch.save(weights, run / "pytorch_model.bin" / "pytorch_model.bin")
    assert read_checkpoint(run).layout == "deepspeed"
    alone = read_checkpoint(run / "pytorch_model.bin", ReadOptions(config=run / "config.json"))
    assert alone.layout == "huggingface" and alone.parameters.keys() == weights.keys()


def litter(folder: Path) -> None:
    """What macOS leaves beside every file that it copies to another file system, and NFS for a deleted open file."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64))
        path.with_name(".nfs000000000b1c2d3e00000001").write_bytes(b"x")


def test_hidden_files_of_the_system_are_no_files_of_a_checkpoint(nanotron, tmp_path):
    convert(RUN, tmp_path / "clean", "hf")
    litter(nanotron)
    convert(nanotron, tmp_path / "littered", "hf")
    found, expected = (hf_weights(tmp_path / name) for name in ("littered", "clean"))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    weight = next(path for path in (nanotron / "3/model").rglob("model_weight*"))
    shutil.copy(weight, weight.with_name("copy_of_weight.safetensors"))
    with pytest.raises(NameMismatch, match=r"copy_of_weight\.safetensors is not a file that nanotron writes"):
        read_checkpoint(nanotron)


def test_hidden_files_of_the_system_are_no_tokens(tmp_path):
    clean = FIXTURES / "datatrove" / "plain_2byte"
    folder = Path(shutil.copytree(clean, tmp_path / "tokens"))
    litter(folder)
    assert [file.path.name for file in TokenFolder.open(folder, 127).files] == ["00000_unshuffled.ds"]


def test_an_empty_file_beside_whole_shards_is_the_one_to_remove(hf):
    """As save_pretrained leaves it after another save under ZeRO-3; transformers prefers the single file."""
    whole = (hf / "model.safetensors").rename(hf / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(whole), whole.name)}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.empty(0)}, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(NameMismatch, match=r"index\.json lists other files of weights: remove model\.safetensors"):
        read_checkpoint(hf)
    (hf / "model.safetensors").unlink()
    assert read_checkpoint(hf).parameters.keys() == index["weight_map"].keys()


def test_a_whole_model_is_read_whatever_else_lies_beside_it(hf):
    touch(
        hf, "model.fp16.safetensors", "smollm2.gguf", "checkpoint-500/optimizer.pt", "pytorch_model-00001-of-00002.bin"
    )
    checkpoint = read_checkpoint(hf)
    assert checkpoint.layout == "huggingface"
    assert checkpoint.warnings == ()


def test_an_adapter_beside_a_whole_model_is_named(hf):
    shutil.copy(hf / "config.json", hf / "adapter_config.json")
    assert any("adapter" in warning and "merge" in warning for warning in read_checkpoint(hf).warnings)


def test_a_dangling_link_in_the_place_of_weights_or_config_is_said(hf):
    for name in ("model.safetensors", "config.json"):
        (hf / name).unlink()
        (hf / name).symlink_to(f"../../blobs/{name}")
        with pytest.raises(MissingFile, match=f"{name} is a dangling link(.|\\n)*blobs"):
            read_checkpoint(hf)


def test_weights_without_a_config_are_read_with_the_one_that_is_named(hf, tmp_path, cli):
    config = (hf / "config.json").rename(tmp_path / "config-elsewhere.json")
    done = cli("convert", hf, tmp_path / "out", "--to", "hf", "--config", config, "--verify")
    assert done.code == 0, done.stderr
    assert hf_weights(tmp_path / "out").keys() == hf_weights(HF).keys()
    assert cli("inspect", hf, "--config", config, "--check").code == 0
    assert cli("verify", hf, HF, "--config", config).code == 0
    assert cli("inspect", hf).code == 3


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization", {"group_size": 64, "bits": 4}, "4 bits"),  # mlx_lm.convert -q
    ],
)
def test_a_quantised_model_is_said_to_be_one(hf, field, value, shown):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UnsupportedModel, match=rf"the model is quantised \({shown}\)(.|\n)*Use the model"):
        read_checkpoint(hf)
    (hf / "config.json").write_text(json.dumps({**config, field: None}))
    assert read_checkpoint(hf).layout == "huggingface"


# --- Our own runs ---


@pytest.fixture
def own_run(tmp_path: Path) -> Path:
    """A run's folder as continue-train leaves it: the recipe, events, and steps that DeepSpeed saved."""
    run = tmp_path / "own-run"
    for step in (2, 3):
        shutil.copytree(DEEPSPEED / "checkpoint" / "global_step3", run / "checkpoints" / f"step-{step}")
        shutil.copy(DEEPSPEED / "config.json", run / "checkpoints" / f"step-{step}")
    (run / "checkpoints/latest").write_text("step-3")
    return touch(run, "recipe.resolved.yaml", "events.jsonl")


def test_a_run_of_ours_is_the_checkpoint_that_its_latest_names(own_run, tmp_path, cli):
    done = cli("inspect", own_run, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(own_run / "checkpoints")
    assert json.loads(cli("inspect", own_run, "--step", 2, "--json").stdout)["layout"] == "deepspeed"
    assert cli("verify", own_run, own_run / "checkpoints/step-3", "--tensors-only").code == 0
    assert cli("convert", own_run, tmp_path / "out", "--to", "hf").code == 0
    assert read_checkpoint(own_run).optimizer == read_checkpoint(own_run / "checkpoints/step-3").optimizer
    (own_run / "checkpoints/latest").write_text("step-9")
    assert "step-9" in cli("inspect", own_run).stderr


def test_a_folder_named_checkpoints_alone_makes_no_run_of_ours(own_run):
    (own_run / "recipe.resolved.yaml").unlink()
    with pytest.raises(UnknownLayout, match="folders in it are: checkpoints"):
        read_checkpoint(own_run)


# --- Several layouts in one folder ---


def test_of_a_nanotron_run_with_a_models_files_the_run_is_read_and_the_choice_said(nanotron, hf, tmp_path, cli):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hf / name, nanotron)
    checkpoint = read_checkpoint(nanotron)
    assert (checkpoint.layout, checkpoint.has_optimizer) == ("nanotron", True)
    assert "Hugging Face" in checkpoint.warnings[0] and "--from hf" in checkpoint.warnings[0]
    chosen = read_checkpoint(nanotron, ReadOptions(layout="hf"))
    assert (chosen.layout, chosen.has_optimizer, chosen.warnings) == ("huggingface", False, ())
    for word, layout in (("hf", "huggingface"), ("nanotron", "nanotron")):
        done = cli("convert", nanotron, tmp_path / f"out-{word}", "--from", word, "--to", "hf", "--json")
        assert json.loads(done.stdout)["source"]["layout"] == layout
    done = cli("verify", nanotron, nanotron, "--from", "hf", "--from-b", "nanotron", "--tensors-only")
    assert done.code == 0, done.stderr  # both are one model
    assert cli("diff", nanotron, nanotron, "--from", "hf", "--from-b", "nanotron").code == 1  # Adam's state
    assert cli("diff", nanotron, nanotron, "--from", "hf", "--from-b", "hf").code == 0


def test_of_a_model_with_a_deepspeed_run_beside_it_the_run_is_read(tmp_path):
    hf = tmp_path / "checkpoint-3"  # as a Trainer with DeepSpeed makes it
    convert(DEEPSPEED / "checkpoint", hf, "hf", config=DEEPSPEED / "config.json", optimizer=False)
    shutil.copytree(DEEPSPEED / "checkpoint", hf, dirs_exist_ok=True)
    assert read_checkpoint(hf).layout == "deepspeed"
    shutil.rmtree(hf / "global_step3")  # a Trainer uploads latest without the folder that it names
    assert read_checkpoint(hf).layout == "huggingface"
    assert read_checkpoint(hf).warnings == ()


def test_a_run_that_cannot_be_read_says_that_the_model_beside_it_can(nanotron, hf):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hf / name, nanotron)
    (nanotron / "latest.txt").write_text("9")
    with pytest.raises(MissingFile, match=r"step 9 is not there(.|\n)*--from hf reads the Hugging Face files"):
        read_checkpoint(nanotron)


def test_a_model_with_our_sidecar_is_read_before_a_run_beside_it(nanotron, tmp_path):
    convert(RUN, tmp_path / "with-state", "hf")
    shutil.copytree(tmp_path / "with-state", nanotron, dirs_exist_ok=True)
    assert read_checkpoint(nanotron).layout == "huggingface"


def test_from_names_a_layout_that_is_there(hf):
    with pytest.raises(UsageError, match=r"--from nanotron: .* holds no nanotron checkpoint"):
        read_checkpoint(hf, ReadOptions(layout="nanotron"))
    with pytest.raises(UsageError, match="--from onnx: expected one of hf, nanotron, deepspeed"):
        read_checkpoint(hf, ReadOptions(layout="onnx"))


# --- Words in another order, and what a conversion says before it begins ---


def test_a_source_and_a_target_that_changed_places_are_recognised(hf, tmp_path, cli):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "new", tmp_path / "empty"):
        done = cli("convert", source, hf, "--to", "nanotron")
        assert done.code == 2
        assert f"Did you mean smolconv convert {hf} {source}?" in done.stderr
    done = cli("convert", tmp_path / "new", "hf://HuggingFaceTB/SmolLM2-135M", "--to", "nanotron")
    assert done.code == 2
    assert f"smolconv convert hf://HuggingFaceTB/SmolLM2-135M {tmp_path / 'new'}?" in done.stderr
    done = cli("convert", hf, "hf://me/mine", "--to", "hf")
    assert done.code == 2
    assert "--push owner/name" in done.stderr
    done = cli("convert", tmp_path / "new", tmp_path / "other", "--to", "nanotron")  # neither is there
    assert done.code == 3
    assert "Did you mean" not in done.stderr


def test_how_large_adams_state_is_stands_beside_how_to_leave_it_out(nanotron, tmp_path, cli):
    convert(RUN, tmp_path / "expected", "hf")
    sidecar = sum(path.stat().st_size for path in (tmp_path / "expected/smolconv_state").glob("*.safetensors"))
    line = f"{sidecar / 1000:.2f} kB of"
    for words in (("--dry-run",), ()):
        done = cli("convert", nanotron, tmp_path / "out", "--to", "hf", *words)
        assert line in done.stderr and "--no-optimizer leaves it out" in done.stderr
        assert line not in done.stdout
    for number, words in enumerate((("--no-optimizer",), ("--optimizer",), ("-q",))):
        done = cli("convert", nanotron, tmp_path / f"out-{number}", "--to", "hf", *words)
        assert "leaves it out" not in done.stderr
    assert "leaves it out" not in cli("convert", HF, tmp_path / "out-hf", "--to", "hf").stderr


def test_an_interrupted_conversion_that_is_begun_anew_is_told_of_resume(nanotron, tmp_path, cli):
    target = tmp_path / "out"

    def interrupt() -> None:
        """Keep a partial folder as a kill leaves it, with one file finished."""
        plan = plan_conversion(str(nanotron), target, ConvertOptions(to="nanotron", tp=2))
        with OutputFolder(target, plan.digest, resume=False, overwrite=False, loses=lambda _: None) as folder:
            write_files(plan.output.files[:1], folder.partial, folder, workers=1)

    interrupt()
    done = cli("convert", tmp_path / "out.partial", tmp_path / "other", "--to", "nanotron")
    assert (done.code, "is incomplete" in done.stderr, "--resume" in done.stderr) == (3, True, True)
    said = "an earlier attempt at this conversion has finished 1 file; --resume continues"
    words = ("convert", nanotron, target, "--to", "nanotron")
    assert said in cli(*words, "--tp", 2, "--dry-run").stderr
    assert said not in cli(*words, "--tp", 2, "--dry-run", "--resume").stderr
    assert said not in cli(*words, "--tp", 1, "--dry-run").stderr  # another conversion
    assert said in cli(*words, "--tp", 2).stderr
    assert said not in cli(*words, "--tp", 2, "--overwrite").stderr
