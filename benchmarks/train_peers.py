"""One side of benchmarks/train.py, in a process of its own: it trains a few steps and writes how long each took.

Every side reads the same token file in the same order, and makes one optimizer step of ``--accumulate`` micro-batches
of one row. It ends itself after the steps that it times: nothing is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOKENS_FILE = "00000_unshuffled.ds"
#: After a step that takes longer than this, warm-up is over: what only a first step does takes less than a second.
_SLOW_SECONDS = 4.0
LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, (0.9, 0.95), 0.1, 1.0
#: Tokens of a document in the packed rows.
DOCUMENT_TOKENS = 128


class Enough(Exception):
    """All steps are timed."""


class Clock:
    """Takes the time of every step, and raises ``Enough`` after the last one.

    Warm-up steps come first, fewer when a step is slow; ``limit`` seconds of timed steps are enough.
    """

    def __init__(self, warmup: int, steps: int, limit: float, result: Path) -> None:
        self._warmup, self._steps, self._limit, self._result = warmup, steps, limit, result
        self._seconds: list[float] = []
        self._processor: list[float] = []
        self._losses: list[float] = []
        self._last: tuple[float, float] | None = None

    def start(self) -> None:
        """The first step begins."""
        self._last = (time.perf_counter(), time.process_time())

    def tick(self, loss: float) -> None:
        """A step has ended, and the next one begins."""
        now = (time.perf_counter(), time.process_time())
        if self._last is None:
            raise RuntimeError("the clock was not started")
        seconds, processor = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        self._losses.append(loss)
        if self._warmup > 0:
            self._warmup = 0 if seconds > _SLOW_SECONDS else self._warmup - 1
            return
        self._seconds.append(seconds)
        self._processor.append(processor)
        if len(self._seconds) >= self._steps or sum(self._seconds) >= self._limit:
            found = {"seconds": self._seconds, "processor_seconds": self._processor, "losses": self._losses}
            self._result.write_text(json.dumps(found))
            raise Enough


def rows(folder: Path, length: int) -> Iterator[Any]:
    """int64 [1, length], windows of length + 1 tokens one after the other, again and again."""
    import torch

    tokens = np.fromfile(folder / TOKENS_FILE, dtype="<u2")
    while True:
        for start in range(0, len(tokens) - length, length + 1):
            yield torch.from_numpy(tokens[start : start + length].astype(np.int64))[None]


# --- sides ------------------------------------------------------------------------------------------------------------


def smolconv(given: argparse.Namespace, clock: Clock) -> None:
    """The worker that ``continue-train`` starts, whole: data, metrics, agreement of ranks; one rank."""
    from smolconv.continual_pretraining.recipe.files import RECIPE, dump_recipe
    from smolconv.continual_pretraining.recipe.schema import Recipe
    from smolconv.continual_pretraining.run import trainer, worker
    from smolconv.continual_pretraining.watch.metrics import StepRecord, Watch

    document = {
        "name": "benchmark", "output": str(given.work),
        "model": {"source": str(given.model), "dtype": given.dtype},
        "start": {"gate": False},  # one forward pass of the source, before the steps that are timed
        "data": {
            "sequence_length": given.length, "eos_token_id": 0,
            "stages": [{"name": "benchmark", "sources": [{"path": str(given.tokens)}]}],
        },
        "schedule": {"train_steps": 1000, "peak_lr": LEARNING_RATE},
        "optimizer": {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM},
        "parallelism": {
            "zero_stage": given.stage, "micro_batch_sequences": 1, "global_batch_sequences": given.accumulate,
            "threads": given.threads,
        },
    }  # fmt: skip
    (given.work / RECIPE).write_text(dump_recipe(Recipe.model_validate(document)))
    _alone()
    record_step, check_start = Watch.step, trainer.Trainer.check_start

    def timed_step(self: Watch, record: StepRecord) -> None:
        record_step(self, record)
        clock.tick(record.loss)

    def timed_start(self: trainer.Trainer) -> None:
        check_start(self)
        clock.start()

    Watch.step, trainer.Trainer.check_start = timed_step, timed_start  # type: ignore[method-assign]
    worker.run_rank(given.work, "never")


def plain(given: argparse.Namespace, clock: Clock) -> None:
    """A loop as one writes it for one process: weights, gradients and Adam's moments in ``--dtype``."""
    import torch

    model = _model(given)
    optimizer = _adamw(list(model.parameters()))
    source = rows(given.tokens, given.length)
    clock.start()
    while True:
        total = 0.0
        for _ in range(given.accumulate):
            ids = next(source)
            loss = model(input_ids=ids, labels=ids).loss / given.accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(total)


def plain_masters(given: argparse.Namespace, clock: Clock) -> None:
    """The same with a bfloat16 model and fp32 master weights: gradients are summed, clipped and applied in fp32."""
    import torch

    model = _model(given)
    weights = list(model.parameters())
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = _adamw(masters)
    source = rows(given.tokens, given.length)
    clock.start()
    while True:
        total = 0.0
        for index in range(given.accumulate):
            ids = next(source)
            loss = model(input_ids=ids, labels=ids).loss / given.accumulate
            loss.backward()
            total += loss.item()
            for weight, master in zip(weights, masters):
                if index:
                    master.grad += weight.grad
                else:
                    master.grad = weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        clock.tick(total)


def trainer(given: argparse.Namespace, clock: Clock) -> None:
    """Hugging Face's Trainer: weights in fp32, and bf16 autocast unless ``--dtype`` is float32. Its own optimizer."""
    _hugging_face(given, clock, deepspeed=None)


def trainer_deepspeed(given: argparse.Namespace, clock: Clock) -> None:
    """Trainer with a DeepSpeed configuration as its documentation has it; torch's Adam, since others are compiled."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the start otherwise, for a minute
    bf16 = given.dtype == "bfloat16"
    configuration = {
        "bf16": {"enabled": bf16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "zero_optimization": {"stage": given.stage},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip
    _alone()
    _hugging_face(given, clock, deepspeed=configuration)


def _hugging_face(given: argparse.Namespace, clock: Clock, deepspeed: dict[str, Any] | None) -> None:
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(Dataset):
        def __init__(self) -> None:
            self.rows = rows(given.tokens, given.length)

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = next(self.rows)[0]  # whatever the index: Trainer shuffles
            return {"input_ids": row, "labels": row}

    class Timed(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                clock.tick(float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=str(given.work), max_steps=1000, per_device_train_batch_size=1,
        gradient_accumulation_steps=given.accumulate, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=MAX_GRAD_NORM, lr_scheduler_type="constant",
        bf16=given.dtype == "bfloat16", use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, deepspeed=deepspeed, ddp_backend="gloo" if deepspeed else None,
    )  # fmt: skip
    model = _model(given, dtype="float32")
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Timed()]).train()


# --- attention --------------------------------------------------------------------------------------------------------


def packed_smolconv(given: argparse.Namespace, clock: Clock) -> None:
    """Forward and backward of our model on a packed row, with its loss."""
    import torch

    from smolconv.continual_pretraining.engine.model import build_model
    from smolconv.continual_pretraining.recipe.schema import Model

    config = json.loads((given.model / "config.json").read_text())
    model = build_model(config, Model(source="benchmark", dtype=given.dtype), "cpu")
    model.load_state_dict(_model(given).state_dict())
    source = rows(given.tokens, given.length)
    places = torch.arange(given.length)[None] % DOCUMENT_TOKENS
    clock.start()
    while True:
        ids = next(source)
        labels = ids.roll(-1, 1).masked_fill(places == DOCUMENT_TOKENS - 1, -100)
        loss_sum, targets = model(input_ids=ids, positions=places, labels=labels)
        loss = loss_sum / targets
        loss.backward()
        model.zero_grad()
        clock.tick(loss.item())


def packed_transformers(given: argparse.Namespace, clock: Clock) -> None:
    """The same of transformers' own, which finds the documents in the positions and builds a dense mask of them."""
    import torch

    model = _model(given)
    source = rows(given.tokens, given.length)
    places = torch.arange(given.length)[None] % DOCUMENT_TOKENS
    clock.start()
    while True:
        ids = next(source)
        labels = ids.masked_fill(places == 0, -100)  # shifted by the model: the first token has no predecessor
        loss = model(input_ids=ids, position_ids=places, labels=labels, use_cache=False).loss
        loss.backward()
        model.zero_grad()
        clock.tick(loss.item())


# --- shared -----------------------------------------------------------------------------------------------------------


def _model(given: argparse.Namespace, dtype: str | None = None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=getattr(torch, dtype or given.dtype), attn_implementation="sdpa"
    )
    model.config.use_cache = False
    return model.train()


def _adamw(parameters: list[Any]) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def _alone() -> None:
    """What a launcher tells the only rank of a run."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")


SIDES = {
    each.__name__: each
    for each in (smolconv, plain, plain_masters, trainer, trainer_deepspeed, packed_smolconv, packed_transformers)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--tokens", type=Path, required=True, help=f"a folder with {TOKENS_FILE}")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--result", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--limit", type=float, default=60, help="seconds of timed steps after which they are enough")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    try:
        SIDES[given.side](given, Clock(given.warmup, given.steps, given.limit, given.result))
    except Enough:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads of gloo and of data readers may outlive an orderly end
    sys.exit("the side ended before its steps were timed")


if __name__ == "__main__":
    main()
