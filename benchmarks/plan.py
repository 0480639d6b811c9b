"""Hold the time of ``smolconv plan`` against published runs: results/plan.md.

    python benchmarks/plan.py     a second; no GPU

Nothing is measured here. The published figures are of other trainers: only what a GPU computes is the same, and what
they exchange is described in the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common import REPOSITORY, markdown_table, say

from smolconv.continual_pretraining.estimate import speed
from smolconv.continual_pretraining.estimate.hardware import H100
from smolconv.continual_pretraining.estimate.plan import divisions_that_fit
from smolconv.continual_pretraining.estimate.report import duration
from smolconv.continual_pretraining.recipe.files import load_recipe
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.models.spec import ModelSpec

RESULTS = REPOSITORY / "benchmarks" / "results" / "plan.md"
LIMIT = 0.25
NETWORK = 400e9 / 8  #: bytes/s of a GPU


def _spec(
    layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int, *, tied: bool = True, nope: int = 0
) -> ModelSpec:  # fmt: skip
    return ModelSpec(
        architecture="smollm3" if nope else "llama", hidden_size=hidden, intermediate_size=inner, num_layers=layers,
        num_heads=heads, num_kv_heads=kv, head_size=hidden // heads, vocab_size=vocabulary, max_positions=131072,
        rms_norm_eps=1e-6, rope_theta=5e4, rope_scaling=None, tied=tied, attention_bias=False, mlp_bias=False,
        use_rope=tuple(not nope or (i + 1) % nope > 0 for i in range(layers)), activation="silu",
    )  # fmt: skip


#: MPT's MLP has two matrices of 4 E rows; three of 8/3 E rows have as many elements.
MPT_3B = _spec(32, 2560, 6827, 20, 20, 50368)
MPT_1B = _spec(24, 2048, 5461, 16, 16, 50368)
LLAMA_8B = _spec(32, 4096, 14336, 32, 8, 128256, tied=False)
SMOLLM3 = _spec(36, 2048, 11008, 16, 4, 128256, nope=4)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run that others made, on H100s in bf16."""

    name: str
    spec: ModelSpec
    gpus: int
    sequence_length: int
    micro_batch: int
    tokens_per_second: float  #: of one GPU
    use: str
    zero_stage: int = 3  #: FSDP, whose exchange is hidden as ZeRO-3's
    recomputed: float = 0.0  #: of a forward pass

    def predicted(self) -> float:
        """tokens/s of one GPU."""
        off, on = (self._seconds(checkpointing=checkpointing) for checkpointing in (False, True))
        batch = self.micro_batch * self.gpus * 4
        return batch * self.sequence_length / (off + self.recomputed * (on - off)) / self.gpus

    def _seconds(self, *, checkpointing: bool) -> float:
        given = Recipe.model_validate(
            {
                "name": "published", "model": {"source": "-", "activation_checkpointing": checkpointing},
                "data": {
                    "sequence_length": self.sequence_length, "eos_token_id": 0,
                    "stages": [{"name": "only", "sources": [{"path": "-"}]}],
                },
                "schedule": {"train_steps": 1, "peak_lr": 1e-4, "warmup_steps": 0},
                "parallelism": {
                    "zero_stage": self.zero_stage, "micro_batch_sequences": self.micro_batch,
                    "global_batch_sequences": self.micro_batch * self.gpus * 4,
                },
            }
        )  # fmt: skip
        return speed.step_time(given, self.spec, self.gpus, H100, NETWORK).seconds


PUBLISHED = (
    Published(name="llm-foundry MPT-3B, 4k", spec=MPT_3B, gpus=8, sequence_length=4096, micro_batch=4,
              tokens_per_second=20_964, use="calibration"),
    Published(name="SmolLM3-3B, 4k", spec=SMOLLM3, gpus=384, sequence_length=4096, micro_batch=3,
              tokens_per_second=14_066, use="lower bound"),
    Published(name="llm-foundry MPT-3B, 8k", spec=MPT_3B, gpus=8, sequence_length=8192, micro_batch=2,
              tokens_per_second=16_578, use="prediction"),
    Published(name="llm-foundry MPT-3B, 32k", spec=MPT_3B, gpus=8, sequence_length=32768, micro_batch=1,
              tokens_per_second=5_873, use="prediction"),
    Published(name="llm-foundry MPT-3B, 64k", spec=MPT_3B, gpus=8, sequence_length=65536, micro_batch=1,
              tokens_per_second=3_262, use="prediction"),
    Published(name="llm-foundry MPT-1B, 4k", spec=MPT_1B, gpus=8, sequence_length=4096, micro_batch=8,
              tokens_per_second=38_535, use="prediction"),
    Published(name="torchtitan Llama-8B, 8k", spec=LLAMA_8B, gpus=8, sequence_length=8192, micro_batch=2,
              tokens_per_second=6_667, use="prediction", recomputed=0.5),
)  # fmt: skip


def published_rows() -> list[list[str]]:
    return [
        [
            each.name, str(each.gpus), f"{each.tokens_per_second:,.0f}", f"{each.predicted():,.0f}",
            f"{each.predicted() / each.tokens_per_second:.2f}", each.use,
        ]
        for each in PUBLISHED
    ]  # fmt: skip


def plan_rows(recipe: Recipe) -> list[list[str]]:
    rows = []
    for gpus in (8, 96, 384):
        found = divisions_that_fit(recipe, SMOLLM3, gpus, H100, network=NETWORK)
        if found.reason:
            rows.append([str(gpus), *["-"] * 8, found.reason])
        rows += [
            [
                str(gpus), str(each.zero_stage), each.offload, str(each.sequence_ranks),
                str(each.micro_batch_sequences), each.checkpointing,
                f"{each.gpu_bytes / 1e9:.1f}", f"{each.tokens_per_second:,.0f}", duration(each.days * 86_400),
                each.limit,
            ]
            for each in list(found.smaller_and_smaller())[:3]
        ]  # fmt: skip
    return rows


PLAN_TITLES = ("GPUs", "ZeRO", "offload", "sequence ranks", "micro-batch", "checkpointing", "GB a GPU",
               "tokens/s a GPU", "run", "limited by")  # fmt: skip
RECIPES = ("smollm3-3b-stable", "smollm3-3b-long-context-64k")


def page(rows: Sequence[Sequence[str]], plans: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    lines = [
        f"""# What `smolconv plan` predicts, beside published runs

Written by `python benchmarks/plan.py`. Nothing was measured here, and no GPU took part.

## tokens/s of one H100

One set of constants: {speed.PRODUCTS_SHARE:.0%} of the peak in matrix products beside their memory traffic,
{speed.ATTENTION_SHARE:.0%} in causal attention, {speed.MEMORY_SHARE:.0%} of the memory's bandwidth,
{speed.PASSES} passes over what a layer keeps. The first two were chosen for the first row. A prediction has to be
within {LIMIT:.0%} of what was published; a lower bound must not be above the prediction.
""",
        *markdown_table(["run", "GPUs", "published", "predicted", "predicted by published", "use"], rows),
        """
- llm-foundry: FSDP on 8 GPUs, no checkpointing. Its MLP of two matrices is taken as three with as many elements.
  Micro-batches are assumed; they change less than 3 %.
- torchtitan: FSDP, compiled, rows of 8,192, selective checkpointing, taken as half of a forward pass.
- SmolLM3: 11.2 T tokens in 24 days, downtime included, with tensor parallelism of 2, which smolconv has not. The
  prediction is of a GPU whose exchange with 383 others is hidden (as ZeRO-3's is with 4 micro-batches a step), so the
  published figure is a lower bound. `smolconv plan` itself counts what is not hidden: next table.

Outside of what is compared: GPUs other than H100, float32, models under 1 or over 8 billion parameters, more than 8
GPUs (the exchange between nodes rests on data sheets), offload, sequence ranks.

## Plans for SmolLM3-3B

`smolconv plan RECIPE --gpus 8,96,384 --gpu h100`: the fastest, and then what needs less memory; three rows at most.
""",
    ]
    for name, found in plans:
        lines += [f"`{name}`\n", *markdown_table(PLAN_TITLES, found), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    rows = published_rows()
    for row in rows:
        say(" ".join(row))
    RESULTS.write_text(page(rows, [(name, plan_rows(load_recipe(name))) for name in RECIPES]))


if __name__ == "__main__":
    main()
