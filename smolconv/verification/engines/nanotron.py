"""The real nanotron on one GPU: load a step folder at TP 1, run a forward pass, write the logits. Started by start.py.

Written from nanotron's examples/llama/convert_weights.py and its conversion tests. It needs nanotron and CUDA kernels,
and has not run yet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(work: Path) -> None:
    """Read ``job.json``, ``tokens.npy`` and ``positions.npy`` below ``work``; write ``logits.npy`` [T, V] in fp32."""
    import nanotron
    import numpy as np
    import torch
    from nanotron.config import (
        LlamaConfig,
        OneForwardOneBackwardPipelineEngine,
        ParallelismArgs,
        Qwen2Config,
        TensorParallelLinearMode,
    )
    from nanotron.models.llama import LlamaForTraining
    from nanotron.models.qwen import Qwen2ForTraining
    from nanotron.trainer import mark_tied_parameters

    folder = Path(json.loads((work / "job.json").read_text())["step_folder"])
    raw = json.loads((folder / "model_config.json").read_text())
    qwen2 = bool(raw.get("is_qwen2_config"))
    config = (Qwen2Config if qwen2 else LlamaConfig)(**raw)
    parallel = ParallelismArgs(
        dp=1, pp=1, tp=1, pp_engine=OneForwardOneBackwardPipelineEngine(),
        tp_mode=TensorParallelLinearMode.REDUCE_SCATTER, tp_linear_async_communication=True,
    )  # fmt: skip
    context = nanotron.parallel.ParallelContext(data_parallel_size=1, pipeline_parallel_size=1, tensor_parallel_size=1)
    model_class = Qwen2ForTraining if qwen2 else LlamaForTraining
    model = nanotron.models.build_model(
        model_builder=lambda: model_class(
            config=config, parallel_context=context, parallel_config=parallel, random_states=None
        ),
        parallel_context=context,
        dtype=torch.bfloat16,  # the widest dtype of flash attention
        device=torch.device("cuda"),
    )
    mark_tied_parameters(model=model, parallel_context=context)
    nanotron.serialize.load_weights(model=model, parallel_context=context, root_folder=folder)
    tokens, positions = (
        torch.from_numpy(np.load(work / f"{name}.npy", allow_pickle=False)).cuda() for name in ("tokens", "positions")
    )
    with torch.no_grad():
        if qwen2:
            logits = model.model(tokens, positions.int()).view(*tokens.shape, -1)
        else:  # Llama's forward takes a mask of ones and returns [T, B, V]
            logits = model.model(tokens, torch.ones_like(tokens)).permute(1, 0, 2)
    np.save(work / "logits.npy", logits[0].float().cpu().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
