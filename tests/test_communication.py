"""What ranks send each other: no more than they must where NCCL sums the gradients, and the same step as by all-reduce.

NCCL's configuration is trained with on gloo, which computes the same collectives; nothing here is said about GPUs.
Bytes are counted as ``benchmarks/communication.py`` says; what they are held against is computed here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
from forked_worker import Fork, run_ranks, work
from training import VOCABULARY, metrics, recipe_document, token_folder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import communication  # noqa: E402

#: Has a run take NCCL's configuration.
NCCL = """
import smolconv.continual_pretraining.run.trainer as trainer
made = trainer.engine_config
trainer.engine_config = lambda recipe, world_size, backend: made(recipe, world_size, "nccl")
"""
#: Leaves the last step's payload of rank 0 in sent.json, and the number of parameters.
COUNTED = f"""
import json, os, pathlib, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import communication
import smolconv.continual_pretraining.run.trainer as trainer
payload = communication.Payload()
payload.count()
update = trainer.Trainer._update
def counted(self, data):
    payload.taken()
    found = update(self, data)
    if self.ranks.first:
        count = sum(getattr(each, "ds_numel", each.numel()) for each in self.model.parameters())
        (self.run / "sent.json").write_text(json.dumps({{"parameters": count, "collectives": payload.taken()}}))
    return found
trainer.Trainer._update = counted
"""
UNPATCHED = "\nfrom smolconv.layouts.deepspeed import patches\npatches.scatter_gradients = lambda engine: None\n"
#: Relative, of losses and norms: sums are taken in another order.
NOISE = 1e-5
#: dtype, ZeRO stage, ranks, accumulation steps. The first ones in CI.
SAMPLED = [("bfloat16", 1, 2, 3), ("bfloat16", 2, 3, 2), ("float32", 1, 2, 2)]
MATRIX = [
    (dtype, stage, ranks, accumulation)
    for dtype in ("bfloat16", "float32") for stage in (1, 2, 3) for ranks in (2, 4) for accumulation in (1, 3)
    if (dtype, stage, ranks, accumulation) not in SAMPLED
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return hf_models.saved(hf_models.smollm3(vocab_size=VOCABULARY), tmp_path_factory.mktemp("source") / "source")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("data") / "tokens")


def trained(
    source: Path, tokens: Path, run: Path, case: tuple[str, int, int, int], before: str = "", **parallelism: Any
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Losses and norms before clipping of 4 steps, all but the first of which are clipped; and what was sent in the last."""
    dtype, stage, ranks, accumulation = case
    document = recipe_document(
        source, tokens, model={"dtype": dtype}, optimizer={"max_grad_norm": 0.3},
        parallelism={"zero_stage": stage, "global_batch_sequences": ranks * accumulation, **parallelism},
    )  # fmt: skip
    ended = work(document, run, ranks, before=COUNTED + before)
    assert ended.code == 0, ended.log[-6000:]
    return [(line["loss"], line["grad_norm"]) for line in metrics(run)], json.loads((run / "sent.json").read_text())


def of_the_least(sent: dict[str, Any], ranks: int, bytes_of_a_parameter: int) -> float:
    return communication.total(sent) / (bytes_of_a_parameter * sent["parameters"] * (ranks - 1) / ranks)


def check_scattered(source: Path, tokens: Path, folder: Path, case: tuple[str, int, int, int]) -> None:
    dtype, stage, ranks, accumulation = case
    summed, sent_before = trained(source, tokens, folder / "summed", case)
    scattered, sent = trained(source, tokens, folder / "scattered", case, NCCL)
    for found, expected in zip(scattered, summed, strict=True):
        assert found == pytest.approx(expected, rel=NOISE)
    assert summed[-1][1] > 0.3  # it was clipped
    weight = 2 if dtype == "bfloat16" else 4
    least = (4 if stage == 1 else 4 * accumulation) + weight
    # The loss, a signal, the norm: some hundred bytes beside a model of 0.2 MB.
    assert 0.99 < of_the_least(sent, ranks, least) < 1.1
    if stage < 3:
        assert of_the_least(sent_before, ranks, least) > 1.45


@pytest.mark.parametrize("case", SAMPLED)
def test_scattered_gradients_make_the_same_steps_and_are_sent_once(case, source, tokens, tmp_path):
    check_scattered(source, tokens, tmp_path, case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", MATRIX)
def test_scattered_gradients_make_the_same_steps_in_every_division(case, source, tokens, tmp_path):
    check_scattered(source, tokens, tmp_path, case)


def test_without_our_patch_deepspeed_rounds_gradients_and_sends_them_twice(source, tokens, tmp_path):
    """ZeRO-2 divides by 3 in bf16; ZeRO-1 in bf16 does not scatter."""
    exact, _ = trained(source, tokens, tmp_path / "exact", ("bfloat16", 2, 3, 1))
    rounded, _ = trained(source, tokens, tmp_path / "rounded", ("bfloat16", 2, 3, 1), NCCL + UNPATCHED)
    assert rounded[0][1] != pytest.approx(exact[0][1], rel=NOISE)
    _, sent = trained(source, tokens, tmp_path / "whole", ("bfloat16", 1, 2, 1), NCCL + UNPATCHED)
    assert of_the_least(sent, 2, 4 + 2) > 1.6


def test_reduce_dtype_halves_the_gradients_bytes_and_rounds(source, tokens, tmp_path):
    case = ("bfloat16", 1, 2, 2)
    exact, _ = trained(source, tokens, tmp_path / "exact", case, NCCL)
    rounded, sent = trained(source, tokens, tmp_path / "rounded", case, NCCL, reduce_dtype="bfloat16")
    assert 0.99 < of_the_least(sent, 2, 2 + 2) < 1.1
    assert rounded[0][1] != exact[0][1]
    for found, expected in zip(rounded, exact, strict=True):
        assert found == pytest.approx(expected, rel=0.01)


def test_eight_ranks_send_the_least_too(tmp_path):
    """Without the ranks: the engine alone, in a process group that sends nothing."""
    cases = [(stage, ranks, accumulation) for stage in (1, 2) for ranks, accumulation in ((2, 1), (8, 1), (8, 4))]
    code = (
        f"import json, os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport communication\n"
        "stage, ranks, accumulation = map(int, sys.argv[2:])\n"
        "case = communication.Case(zero_stage=stage, world_size=ranks, accumulation=accumulation)\n"
        "found = communication.measure(case, communication.TINY)\n"
        "Path(sys.argv[1]).write_text(json.dumps(found))\nos._exit(0)\n"
    )
    forks = [
        Fork(code=code, words=("measure", str(tmp_path / f"{i}.json"), *map(str, case)), environment={}, log=tmp_path / f"{i}.log")
        for i, case in enumerate(cases)
    ]  # fmt: skip
    for i, ended in run_ranks(forks, on_cpu=True).items():
        assert ended == 0, forks[i].log.read_text()[-3000:]
    for i, (stage, ranks, accumulation) in enumerate(cases):
        sent = json.loads((tmp_path / f"{i}.json").read_text())
        assert 0.99 < of_the_least(sent, ranks, (4 if stage == 1 else 4 * accumulation) + 2) < 1.1


def test_what_ranks_of_a_row_send_is_what_heads_against_tokens_need(tmp_path):
    """SmolLM3-3B at 64k, by hand: queries, as many keys and values as ranks at least, and attention's output, in bf16."""
    sizes = (2, 8)
    code = (
        f"import json, os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport communication\n"
        "Path(sys.argv[1]).write_text(json.dumps(communication.measure_shared(int(sys.argv[2]))))\nos._exit(0)\n"
    )
    forks = [
        Fork(code=code, words=("measure", str(tmp_path / f"{size}.json"), str(size)), environment={}, log=tmp_path / f"{size}.log")
        for size in sizes
    ]  # fmt: skip
    for i, ended in run_ranks(forks, on_cpu=True).items():
        assert ended == 0, forks[i].log.read_text()[-3000:]
    for size in sizes:
        found = json.loads((tmp_path / f"{size}.json").read_text())
        heads = 16 + 2 * max(4, size) + 16
        once = 36 * 65536 // size * heads * 128 * 2 * (size - 1) / size
        # Backward as forward; checkpointing repeats the forward pass.
        assert communication.sent_at_64k(found, size, "kept") == pytest.approx(2 * once)
        assert communication.sent_at_64k(found, size, "checkpointed") == pytest.approx(3 * once)


def test_a_collective_is_counted_as_a_ring_sends_it():
    """4 ranks, 100 float32: worked out by hand."""
    expected = {
        "all_reduce": 600, "reduce": 300, "broadcast": 300, "all_gather_into_tensor": 1200, "all_gather": 1200,
        "reduce_scatter_tensor": 1200, "reduce_scatter": 1200, "all_to_all_single": 300,
    }  # fmt: skip
    # Of gathers and scatters the tensor is a rank's share: 400 of 1600 bytes.
    assert {name: 400 * times(4) for name, (_, _, times) in communication.SENT.items()} == expected
