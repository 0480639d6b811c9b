"""One rank of real DeepSpeed training: loads a checkpoint, takes steps, and writes down what the engine holds.

``real_deepspeed`` is the tests' side and says what a job is; it runs this file as a program once per rank, in forks of a
process that has imported DeepSpeed. The ranks take the jobs one after another, each with an engine of its own. What is
written down is read from the flat partitions that Adam updates: DeepSpeed's own accessors fail for the second parameter
group of ZeRO-1/2, and after a universal load.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SLOTS = ("fp32", "exp_avg", "exp_avg_sq")


def random_model(config: str | Path) -> torch.nn.Module:
    """The model of a config.json, random, fp32, in training mode; eager attention sums in one order at every length."""
    fields = json.loads(Path(config).read_text())
    spec = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(spec, attn_implementation="eager").float().train()


def language_model_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every next token; ``tokens`` is [rows, length]."""
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def start_engine(job: Mapping[str, Any], world_size: int) -> tuple[Any, dict[int, str]]:
    """An engine, and the names of its parameters by id."""
    import deepspeed

    model = random_model(job["config"])
    if job["weights"]:
        missing, unexpected = model.load_state_dict(load_file(job["weights"]), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # which a tied model does not need
            raise ValueError(f"weights for another model: {missing} are missing, {unexpected} are not its own")
    parameters = dict(model.named_parameters())
    listed = [name for group in job["groups"] for name in group["names"]]
    for name in job["frozen"]:
        parameters[name].requires_grad_(False)
    if sorted([*listed, *job["frozen"]]) != sorted(parameters):
        raise ValueError(f"groups must name every parameter once; they differ in {set(listed) ^ set(parameters)}")
    groups = [
        {"params": [parameters[name] for name in group["names"]], **hyperparameters(group)} for group in job["groups"]
    ]
    schedule = None
    if job["lambda_lr"]:
        factors = job["lambda_lr"]

        def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, len(factors) - 1)])

    engine, *_ = deepspeed.initialize(
        model=wrapped(model, job["wrapper"]),
        model_parameters=groups,
        config=engine_config(job, world_size),
        lr_scheduler=schedule,
    )
    return engine, {id(parameter): name for name, parameter in parameters.items()}


def wrapped(model: torch.nn.Module, prefix: str) -> torch.nn.Module:
    """The model inside one module for each part of the prefix, as torch.compile (``_orig_mod.``) or a policy has it."""

    class Around(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            (inner,) = self.children()
            return inner(**inputs)

    for part in reversed(prefix.split(".")[:-1]):
        around = Around()
        around.add_module(part, model)
        model = around
    return model


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if key == "betas" else value for key, value in group.items() if key != "names"}


def engine_config(job: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    rows = job["micro_batch_rows"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": job["global_batch_rows"] // (rows * world_size),
        "gradient_clipping": job["clip"],
        "steps_per_print": 10**9,
        # torch_adam: DeepSpeed's own Adam would be compiled first, for minutes.
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": job["stage"]},
    }
    if job["dtype"] == "bf16":
        config["bf16"] = {"enabled": True}
    if job["bf16_optimizer"]:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if job["universal"]:
        config["checkpoint"] = {"load_universal": True}
    if job["scheduler"]:
        config["scheduler"] = job["scheduler"]
    return merged(config, job["ds_config"])


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` at any depth."""
    result = dict(base)
    for key, value in changes.items():
        below = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if below else value
    return result


def run(job: Mapping[str, Any], rank: int, world_size: int) -> None:
    """Load, step, save; rank 0 writes ``before/``, ``after/`` and ``result.json`` below the job's folder."""
    started, folder = time.perf_counter(), Path(job["folder"])
    engine, names = start_engine(job, world_size)
    result: dict[str, Any] = {
        "optimizer": type(engine.optimizer).__name__, "load_path": None, "client_state": None,
        "seconds": {"initialize": time.perf_counter() - started},
    }  # fmt: skip
    if job["checkpoint"]:
        result["load_path"], result["client_state"] = engine.load_checkpoint(job["checkpoint"], tag=job["tag"])
        if result["load_path"] is None:
            raise FileNotFoundError(f"DeepSpeed found nothing to load in {job['checkpoint']}, tag {job['tag']}")
    if job["universal"]:
        # Saving with it still on leaves model files out (DeepSpeed#7546).
        engine._config.load_universal_checkpoint = False
    write_snapshot(engine, names, job, folder / "before")
    if job["set_groups"]:
        set_groups(engine, job["groups"])
    result["seconds"]["load"] = time.perf_counter() - started - result["seconds"]["initialize"]
    result["losses"], result["grad_norms"] = take_steps(engine, job, rank, world_size)
    if job["batches"]:
        write_snapshot(engine, names, job, folder / "after")
    if job["save"]:
        engine.save_checkpoint(job["save"], tag=job["save_tag"], client_state=job["client_state"])
    result["seconds"]["all"] = time.perf_counter() - started
    if rank == 0:
        write_json(folder / "result.json", result)
    distributed.barrier()
    engine.destroy()


def set_groups(engine: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Repair what a universal load into ZeRO-3 does: group 0's hyperparameters and one step tensor for all sub-groups.

    Each sub-group's AdamW counts that tensor up, so with two of them Adam's step goes up by two at every step.
    """
    for group, wanted in zip(engine.optimizer.param_groups, groups):
        group.update(hyperparameters(wanted))
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def take_steps(
    engine: Any, job: Mapping[str, Any], rank: int, world_size: int
) -> tuple[list[float], list[float | None]]:
    """One optimizer step per batch. A rank's rows are consecutive; the loss is the mean over all micro-batches."""
    losses, grad_norms = [], []
    for batch in np.load(job["batches"]) if job["batches"] else ():
        rows = torch.from_numpy(batch).chunk(world_size)[rank]
        own = []
        for micro_batch in rows.split(job["micro_batch_rows"]):
            loss = language_model_loss(engine, micro_batch)
            engine.backward(loss)
            engine.step()
            own.append(loss.detach().double())
        total = torch.stack(own).mean()
        distributed.all_reduce(total)
        losses.append(total.item() / world_size)
        norm = engine.get_global_grad_norm()  # None in ZeRO-0 without bf16
        grad_norms.append(None if norm is None else float(norm))
    return losses, grad_norms


def write_snapshot(engine: Any, names: Mapping[int, str], job: Mapping[str, Any], folder: Path) -> None:
    """Everything a checkpoint has to bring back. All ranks call this; rank 0 writes."""
    slots: dict[str, dict[str, torch.Tensor]] = {slot: {} for slot in SLOTS}
    adam_steps: list[set[float | None]] = [set() for _ in job["groups"]]
    for group, step, pieces in whole_states(engine):
        adam_steps[group].add(step)
        for parameter, tensors in pieces:
            for slot, tensor in tensors.items():
                slots[slot][names[id(parameter)]] = tensor
    if any(len(steps) != 1 for steps in adam_steps):
        raise ValueError(f"the tensors of a group differ in Adam's step: {adam_steps}")
    weights = whole_weights(engine, names)
    if distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        for file, tensors in (*slots.items(), ("module", weights)):
            save_file(
                {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / f"{file}.safetensors"
            )
        scheduler = engine.lr_scheduler
        write_json(
            folder / "state.json",
            {
                "adam_steps": [steps.pop() for steps in adam_steps],
                "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups],
                "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
                "global_steps": engine.global_steps,
                "global_samples": engine.global_samples,
                "skipped_steps": engine.skipped_steps,
            },
        )


_Pieces = list[tuple[torch.Tensor, dict[str, torch.Tensor]]]


def whole_states(engine: Any) -> Iterator[tuple[int, float | None, _Pieces]]:
    """Group index, Adam step and whole tensors by parameter, in turn; a moment Adam has not made yet is left out."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3: every parameter is cut by itself
        for sub_group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            step, partitions = joined(flat, base.state.get(flat, {}))
            pieces, start = [], 0
            for parameter in optimizer.fp16_groups[sub_group]:
                stop = start + parameter.partition_numel()
                pieces.append((parameter, {
                    slot: torch.cat([part[start:stop] for part in parts])[: parameter.ds_numel].view(parameter.ds_shape)
                    for slot, parts in partitions.items()
                }))  # fmt: skip
                start = stop
            yield optimizer.sub_group_to_group_id[sub_group], step, pieces
    elif hasattr(optimizer, "fp32_groups"):  # ZeRO-0 with bf16
        for index, group in enumerate(optimizer.fp32_groups):
            for parameter, master in zip(optimizer.fp16_groups[index], group):
                yield index, *replicated(parameter, master, base.state.get(master, {}))
    elif base is optimizer:  # ZeRO-0
        for index, group in enumerate(base.param_groups):
            for parameter in group["params"]:
                yield index, *replicated(parameter, parameter, base.state.get(parameter, {}))
    else:
        for index, (flat, parameters, starts) in enumerate(flat_groups(optimizer)):
            step, partitions = joined(flat, base.state.get(flat, {}))
            whole = {slot: torch.cat(parts) for slot, parts in partitions.items()}
            yield index, step, [
                (p, {slot: tensor[start : start + p.numel()].view(p.shape) for slot, tensor in whole.items()})
                for p, start in zip(parameters, starts)
            ]  # fmt: skip


def flat_groups(optimizer: Any) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], list[int]]]:
    """ZeRO-1/2: this rank's slice of each group, the group's parameters in flat order, and where they start."""
    if hasattr(optimizer, "bf16_groups"):  # BF16_Optimizer
        for flat, parameters in zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups):
            sizes = [parameter.numel() for parameter in parameters]
            yield flat, parameters, [sum(sizes[:index]) for index in range(len(sizes))]
    else:
        yield from zip(
            optimizer.single_partition_of_fp32_groups, optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
        )  # fmt: skip


def joined(flat: torch.Tensor, state: Mapping[str, Any]) -> tuple[float | None, dict[str, list[torch.Tensor]]]:
    """Adam's step, and every rank's partition of the master and of the moments."""
    parts = {}
    for slot, own in (("fp32", flat), *((slot, state[slot]) for slot in SLOTS[1:] if slot in state)):
        if own.shape != flat.shape:
            raise ValueError(f"{slot} has {own.numel()} elements where the master has {flat.numel()}")
        parts[slot] = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts[slot], own.detach().contiguous())
    return step_of(state), parts


def replicated(parameter: torch.Tensor, master: torch.Tensor, state: Mapping[str, Any]) -> tuple[float | None, _Pieces]:
    tensors = {"fp32": master.detach(), **{slot: state[slot] for slot in SLOTS[1:] if slot in state}}
    return step_of(state), [(parameter, tensors)]


def step_of(state: Mapping[str, Any]) -> float | None:
    return float(state["step"]) if "step" in state else None


def whole_weights(engine: Any, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """What the forward pass computes with, in the dtype of the module."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {names[id(parameter)]: parameter.detach().clone() for parameter in engine.module.parameters()}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """As JSON; of a tensor its dtype and shape, of other strangers their repr."""

    def stranger(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {"dtype": str(value.dtype), "shape": list(value.shape)}
        return repr(value)

    path.write_text(json.dumps(document, indent=1, default=stranger))


def main(folder: Path) -> None:
    """Take every job of ``folder/jobs.json`` as the rank that the environment names."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    doing, linear = "starting DeepSpeed", functional.linear
    try:
        torch.set_num_threads(1)
        import deepspeed.ops

        # Otherwise it is compiled at init_distributed, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size,
            timeout=timedelta(minutes=10), verbose=False,
        )  # fmt: skip
        for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
            doing = (
                f"job {number}: ZeRO-{job['stage']} {job['dtype']}, checkpoint {job['checkpoint']}, tag {job['tag']}"
            )
            run(job, rank, world_size)
            functional.linear = linear  # ZeRO-3 leaves its own to all engines that follow
            gc.collect()  # an engine is full of cycles
    except BaseException:
        (folder / f"rank-{rank}.error").write_text(f"{doing}\n{traceback.format_exc()}")
        os._exit(1)
    # A rank that leaves closes its sockets, which a slower one would take for a failure.
    (folder / f"rank-{rank}.done").touch()
    while not all((folder / f"rank-{other}.done").exists() for other in range(world_size)):
        time.sleep(0.01)
    os._exit(0)  # gloo's threads may outlive an orderly end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
