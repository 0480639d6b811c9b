"""The real ``transformers.Trainer`` and the real ``accelerate``, with DeepSpeed on a CPU: they train, save and resume.

``train`` is the tests' side; this file is also the program that each rank runs, in a fork of a process that has imported
both. The ranks take the jobs one after another. All worlds see the same rows in every step, so losses can be compared.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from forked_worker import Fork, run_ranks

#: Rows of a step, in all worlds, and tokens of a row.
GLOBAL_ROWS, LENGTH = 6, 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, from random weights or resumed, up to ``steps`` steps in all."""

    program: str  #: trainer or accelerate
    folder: Path  #: where it saves: the Trainer's output folder, or accelerate's state
    steps: int  #: after which it stops
    config: Path  #: a transformers config.json
    stage: int | None  #: of ZeRO; None: without DeepSpeed
    save_every: int = 0  #: steps, of which accelerate's saves once; 0: saves nothing
    resume: Path | None = None
    schedule: str = "own"  #: whose it is: the program's own, or deepspeed's
    ds_config: Mapping[str, Any] = field(default_factory=dict)  #: of DeepSpeed, beside the stage


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What rank 0 has to say of one job."""

    losses: list[float]  #: of each step that was made here, means over the ranks
    lrs: list[float]  #: the first group's, used in each step
    step: int  #: at the end
    random: list[list[float]]  #: a number that torch draws before each step that was made here, by rank
    error: str  #: what the program raised when it should have resumed, or ""


def train(jobs: Sequence[Job], world_size: int, folder: Path, *, seconds: float = 240) -> list[Trained]:
    """Run the jobs with so many ranks. Raises ``AssertionError`` with the ranks' logs when one of them died."""
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs], default=str))
    code = f"import runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n"
    forks = [
        Fork(
            code=code, words=(__file__, str(folder)), log=folder / f"rank-{rank}.log",
            environment={
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for rank in range(world_size)
    ]  # fmt: skip
    codes = run_ranks(forks, seconds=seconds, on_cpu=True)
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-4000:] for rank in range(world_size))
    assert not any(codes.values()), f"{codes}\n{logs}"
    return [Trained(**found) for found in json.loads((folder / "results.json").read_text())]


# --- one rank ---------------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        import deepspeed
        import torch
        from torch.nn import functional

        torch.set_num_threads(1)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for a minute
        deepspeed.init_distributed(
            "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world,
            timeout=timedelta(minutes=4), verbose=False,
        )  # fmt: skip
        linear, found = functional.linear, []
        for job in json.loads((folder / "jobs.json").read_text()):
            started = time.perf_counter()
            run = _trainer if job["program"] == "trainer" else _accelerate
            found.append(run(job, world))
            functional.linear = linear  # ZeRO-3 leaves its own to all engines that follow
            _forget()
            print(job["program"], job["stage"], f"{time.perf_counter() - started:.1f} s", flush=True)
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(found))
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # gloo's threads may outlive an orderly end


def _forget() -> None:
    """So that the next job begins as a process of its own would."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    gc.collect()


def _model(config: str) -> Any:
    from deepspeed_worker import random_model

    return random_model(config)


def _ds_config(job: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    if job["stage"] is None:
        return None
    made: dict[str, Any] = {
        "zero_optimization": {"stage": job["stage"]}, "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }  # fmt: skip
    if job["schedule"] == "deepspeed":
        made["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
        }
        made["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2}}
    return {**made, **job["ds_config"]}


def _rows(vocabulary: int, steps: int) -> list[dict[str, list[int]]]:
    import numpy as np

    rows = np.random.default_rng(3).integers(0, vocabulary, (steps * GLOBAL_ROWS, LENGTH)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def _mean(value: float) -> float:
    import torch

    total = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def _drawn(world: int) -> list[float]:
    import torch

    own = torch.rand(())
    parts = [torch.zeros(()) for _ in range(world)]
    torch.distributed.all_gather(parts, own)
    return [float(part) for part in parts]


def _trainer(job: Mapping[str, Any], world: int) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config = json.loads(Path(job["config"]).read_text())
    found: dict[str, Any] = {"losses": [], "lrs": [], "step": 0, "random": [], "error": ""}

    class Recording(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            found["random"].append(_drawn(world))
            found["lrs"].append(self.optimizer.param_groups[0]["lr"])
            loss = super().training_step(model, inputs, num_items_in_batch)
            found["losses"].append(_mean(float(loss)))
            return loss

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = control.should_training_stop or state.global_step >= job["steps"]

    rows = GLOBAL_ROWS // world
    arguments = TrainingArguments(
        output_dir=job["folder"], max_steps=8, per_device_train_batch_size=rows, learning_rate=1e-3, weight_decay=0.1,
        adam_beta2=0.95, lr_scheduler_type="linear", warmup_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_steps=1, save_strategy="steps" if job["save_every"] else "no", save_steps=job["save_every"] or 500,
        deepspeed=_ds_config(job, rows), ddp_backend="gloo", seed=7, dataloader_pin_memory=False, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Recording(
        model=_model(job["config"]), args=arguments, train_dataset=_rows(config["vocab_size"], 8), callbacks=[Stop()]
    )
    try:
        trainer.train(resume_from_checkpoint=job["resume"])
    except (FileNotFoundError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        if not job["resume"]:
            raise
        found["error"] = f"{type(error).__name__}: {error}"
    found["step"] = trainer.state.global_step
    return found


def _accelerate(job: Mapping[str, Any], world: int) -> dict[str, Any]:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import (
        DataLoaderConfiguration,
        DeepSpeedPlugin,
        DummyOptim,
        DummyScheduler,
        InitProcessGroupKwargs,
    )

    config = json.loads(Path(job["config"]).read_text())
    rows = GLOBAL_ROWS // world
    # Otherwise the schedule makes a step for every process, and means another LR in another world.
    loading = DataLoaderConfiguration(split_batches=True)
    plugin = DeepSpeedPlugin(hf_ds_config=_ds_config(job, rows))
    accelerator = Accelerator(
        deepspeed_plugin=plugin, dataloader_config=loading, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
    )
    model = _model(job["config"])
    if job["schedule"] == "deepspeed":
        optimizer: Any = DummyOptim(model.parameters())
        scheduler: Any = DummyScheduler(optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    data = torch.tensor([row["input_ids"] for row in _rows(config["vocab_size"], 8)])
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    found: dict[str, Any] = {"losses": [], "lrs": [], "step": 0, "random": [], "error": ""}
    try:
        if job["resume"]:
            accelerator.load_state(job["resume"])
        done = model.global_steps
        for step in range(done, job["steps"]):
            own = data[step * GLOBAL_ROWS :][:GLOBAL_ROWS].chunk(world)[accelerator.process_index]
            found["random"].append(_drawn(world))
            found["lrs"].append(float(optimizer.param_groups[0]["lr"]))
            loss = model(input_ids=own, labels=own, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            found["losses"].append(_mean(float(loss)))
            if step + 1 == job["save_every"]:
                accelerator.save_state(job["folder"])
                (Path(job["folder"]) / "config.json").write_text(json.dumps(config))
        found["step"] = model.global_steps
    except (FileNotFoundError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        if not job["resume"]:
            raise
        found["error"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
