"""The published recipes on the numbers of GPUs that they are for, as a user would ask: dry runs with a source of SmolLM3-3B's size.

The source is a config and safetensors' header; its 6 GB of weights are a hole in a file, which takes no room on disk.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import forked_cli
import numpy as np
import pytest
from conftest import Finished
from test_estimate import N_SMOLLM3, SMOLLM3

from smolconv.continual_pretraining.recipe.files import load_recipe
from smolconv.models.huggingface import parameter_shapes, spec_to_hf

LONG, SHORT = "smollm3-3b-long-context-64k", "smollm3-3b-stable"
#: Published: 576 sequences of 4096, as many tokens as 36 of 65,536.
TOKENS_PER_STEP = 2_359_296
#: A Hugging Face folder has no Adam and no place in the data.
ANEW = [word for part in ("optimizer", "learning_rate", "data") for word in ("--set", f"start.{part}=false")]


def sparse_checkpoint(folder: Path, **changes: Any) -> None:
    spec = replace(SMOLLM3, **changes)
    header, end = {}, 0
    for name, shape in parameter_shapes(spec).items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec_to_hf(spec, {}, "bfloat16")))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def long_documents(folder: Path) -> Path:
    """Three of 30,000 tokens, in the 4 bytes that the vocabulary needs; each ends in the recipes' EOS."""
    tokens = np.random.default_rng(0).integers(1, 128_000, (3, 30_000))
    tokens[:, -1] = 128_001
    folder.mkdir()
    tokens.astype("<u4").tofile(folder / "00000_unshuffled.ds")
    np.arange(30_000, 90_001, 30_000).astype("<u8").tofile(folder / "00000_unshuffled.ds.index")
    (folder / "00000_unshuffled.ds.metadata").write_text("tests/random|4\n90000\n90 KT")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with what the recipes name: two sources, and all folders of tokens, which are one."""
    top = tmp_path_factory.mktemp("topologies")
    sparse_checkpoint(top / LONG, rope_theta=2e6, max_positions=32768)  # the end of the 32k stage
    sparse_checkpoint(top / SHORT, rope_theta=5e4, max_positions=4096)
    assert (top / LONG / "model.safetensors").stat().st_blocks * 512 < 1e6
    tokens = long_documents(top / "tokens")
    for name in (LONG, SHORT):
        for source in {source.path for stage in load_recipe(name).data.stages for source in stage.sources}:
            (top / source).parent.mkdir(exist_ok=True)
            if not (top / source).exists():
                (top / source).symlink_to(tokens)
    (top / "programs").mkdir()
    for name in ("sbatch", "srun"):
        (top / "programs" / name).symlink_to("/bin/false")
    return top


def dry_run(place: Path, name: str, nodes: int, *words: str, disk_free_bytes: int = 10**15) -> Finished:
    """On a cluster's login node: this machine may have no Slurm, and less room than the 43 GB that a checkpoint takes."""
    given = (
        "continue-train", name, "--dry-run", "--json", "--launcher", "slurm", "--nnodes", str(nodes),
        "--nproc-per-node", "8", "--set", f"model.source={name}", *(ANEW if name == SHORT else ()), *words,
    )  # fmt: skip
    return Finished(
        *forked_cli.run(given, place, torch=False, disk_free_bytes=disk_free_bytes, programs=place / "programs")
    )


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches"), [(LONG, 8, 36), (LONG, 96, 3), (LONG, 144, 2), (SHORT, 384, 1)]
)
def test_the_published_recipes_say_what_they_would_take(place, name, ranks, micro_batches):
    code, stdout, stderr = dry_run(place, name, ranks // 8)
    assert code == 0, stderr
    plan = json.loads(stdout)
    told, engine = plan["estimate"], plan["deepspeed"]
    assert plan["problems"] == []
    assert (plan["world_size"], told["parameters"], told["tokens_per_step"]) == (ranks, N_SMOLLM3, TOKENS_PER_STEP)
    shared = 8 if name == LONG else 2
    assert told["accumulation_steps"] == engine["gradient_accumulation_steps"] == micro_batches
    assert told["sequence_ranks"] == shared
    assert ranks // shared * micro_batches * told["sequence_length"] * (1 if name == LONG else 3) == TOKENS_PER_STEP
    # bf16 weights and fp32 masters and moments; of the latter a rank has its share.
    assert told["disk"]["checkpoint_bytes"] == 14 * N_SMOLLM3
    parts = {part["name"]: part["bytes"] for part in told["memory"]}
    assert parts["fp32 masters"] + parts["Adam's moments"] == pytest.approx(12 * N_SMOLLM3 / ranks, rel=1e-6)
    assert 2 * N_SMOLLM3 + 6 * N_SMOLLM3 < told["gpu_bytes"] < 80e9
    # NCCL's: every gradient is summed on the rank that keeps it.
    assert engine["zero_optimization"]["reduce_scatter"] is True
    assert f"#SBATCH --nodes={ranks // 8}\n" in plan["launch"]["script"]


def test_a_long_row_that_a_rank_has_alone_is_tiled(place):
    """36 ranks without groups, 65,536 tokens each: 8192 at once pass the MLP."""
    code, stdout, stderr = dry_run(place, LONG, 9, "--nproc-per-node", "4", "--set", "parallelism.sequence_ranks=1")
    assert code == 0, stderr
    parts = {part["name"]: part["bytes"] for part in json.loads(stdout)["estimate"]["memory"]}
    assert parts["a tile of the MLP"] == 8192 * 2 * (4 + 2) * SMOLLM3.intermediate_size


def test_a_division_that_fails_proposes_the_nearest_that_work(place):
    """384 ranks without groups cannot share 192 micro-batches; pairs can, at the same loss."""
    code, _, stderr = dry_run(place, SHORT, 48, "--set", "parallelism.sequence_ranks=1")
    assert code == 2 and "which 384 ranks cannot divide evenly" in stderr, stderr
    lines = [line.strip() for line in stderr.splitlines()]
    proposed = [f"parallelism.sequence_ranks={size}" for size in (2, 4, 8)]
    first = lines.index(proposed[0])
    assert lines[first : first + 4] == [*proposed, "192, 96 or 64 ranks"]


def test_a_disk_without_room_for_a_checkpoint_is_refused(place):
    code, _, stderr = dry_run(place, SHORT, 48, disk_free_bytes=43 * 10**9)
    assert code == 4 and "has 43.00 GB free, and the run needs 43.05 GB" in stderr, stderr
