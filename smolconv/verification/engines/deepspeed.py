"""One rank of the real DeepSpeed: load a checkpoint, run a forward pass, write the logits. Started by start.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(work: Path) -> None:
    """Read ``job.json``, ``tokens.npy`` and ``positions.npy`` below ``work``; write ``logits.npy`` [T, V] in fp32."""
    job = json.loads((work / "job.json").read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The rendezvous is a file, so that concurrent verifications cannot use the same port.
    os.environ["MASTER_PORT"] = "0"
    import numpy as np
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{work / 'meeting'}", rank=rank, world_size=world)
    import deepspeed
    import transformers

    from smolconv.layouts.deepspeed.patches import replace_checkpoint_engine, without_shared_memory_operations

    without_shared_memory_operations()
    deepspeed.init_distributed("gloo")
    raw = {**job["config"], "pad_token_id": None}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    parameters = dict(model.named_parameters())
    for name in job["frozen"]:
        parameters[name].requires_grad_(False)
    groups = [{"params": [parameters[name] for name in names]} for names in job["groups"]]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=_ds_config(job))
    replace_checkpoint_engine(engine)
    path, _ = engine.load_checkpoint(job["load_dir"], tag=job["tag"])
    if path is None:
        raise SystemExit(f"DeepSpeed found nothing to load in {job['load_dir']}, tag {job['tag']}")
    engine.eval()
    tokens, positions = (
        torch.from_numpy(np.load(work / f"{name}.npy", allow_pickle=False)) for name in ("tokens", "positions")
    )
    with torch.no_grad():
        logits = engine(input_ids=tokens, position_ids=positions, use_cache=False).logits
    if rank == 0:
        np.save(work / "logits.npy", logits[0].float().numpy())
    torch.distributed.barrier()


def _ds_config(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": job["zero_stage"]},
        "bf16": {"enabled": job["bf16"]},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
