"""Measure ``smolconv verify`` at real shapes: time and memory beside transformers' own two forwards of the same model.

    python benchmarks/verify.py                 SmolLM3-3B's shapes, 2,048 tokens, fp32
    python benchmarks/verify.py --size 135m     a quick look; printed only

The checkpoints are made here, of random weights: a Hugging Face folder and its nanotron twin (TP 2). transformers' side
is two processes, one after the other, each of which loads the folder in fp32 and runs one forward on as many tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import REPOSITORY, Run, machine_lines, markdown_table, remove, run, say, warm

SMOLCONV = str(Path(sys.executable).with_name("smolconv"))
_FORWARD = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.randint(0, model.config.vocab_size, (1, int(sys.argv[2])))
with torch.inference_mode():
    print(model(input_ids=tokens, use_cache=False).logits.std())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("135m", "360m", "1.7b", "3b"), default="3b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--work", type=Path, default=None, help="where to make a folder to work in")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "verify.md")
    given = parser.parse_args()
    machine = machine_lines(("smolconv", "torch", "transformers"))
    with tempfile.TemporaryDirectory(prefix="smolconv-verify-", dir=given.work) as scratch:
        hf, nanotron = Path(scratch, "hf"), Path(scratch, "nanotron")
        script = Path(__file__).with_name("random_checkpoint.py")
        for target, options in ((hf, []), (nanotron, ["--layout", "nanotron", "--tp", "2"])):
            say(f"making {target}")
            run([sys.executable, str(script), given.size, str(target), *options])
        theirs = []
        for turn in (1, 2):
            say(f"transformers, forward {turn}")
            warm(hf)
            theirs.append(run([sys.executable, "-c", _FORWARD, str(hf), str(given.length)]))
            say(f"  {theirs[-1].seconds:.1f} s")
        say("smolconv verify")
        warm(hf)
        warm(nanotron)
        ours = run([SMOLCONV, "verify", str(nanotron), str(hf), "--length", str(given.length), "--json"])
        say(f"  {ours.seconds:.1f} s")
        remove(hf)
    text = "\n".join(rendered(given.size, given.length, machine, ours, theirs)) + "\n"
    print(text)
    if given.size == "3b":
        given.output.write_text(text)
    return 0


def rendered(size: str, length: int, machine: list[str], ours: Run, theirs: list[Run]) -> list[str]:
    seconds = sum(each.seconds for each in theirs)
    peak = max(each.peak_rss_bytes for each in theirs)
    rows = [
        [
            "smolconv verify, nanotron tp2 against HF: spec, tensors, two forwards and the noise floor",
            f"{ours.seconds:.0f} s", f"{ours.peak_rss_bytes / 1e9:.2f} GB",
        ],
        ["transformers, two forwards in two processes", f"{seconds:.0f} s", f"{peak / 1e9:.2f} GB"],
    ]  # fmt: skip
    return [
        f"# verify at the shapes of {size.upper()}, fp32, {length:,} positions", "",
        *(f"- {line}" for line in machine), "",
        *markdown_table(["what", "time", "peak memory"], rows), "",
        f"verify takes {ours.seconds / seconds:.2f} x the two forwards. It runs A twice, for the noise floor, and "
        "reads every tensor once more to compare it.",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
