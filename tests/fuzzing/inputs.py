"""What is damaged: real inputs of every reader, each with the commands that read it.

The commands run in the folder that holds the damaged input under ``IN``, the whole one under ``ORIGINAL`` and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from conftest import FIXTURES, convert

NANOTRON, DEEPSPEED = FIXTURES / "nanotron", FIXTURES / "deepspeed"
#: Names in the working folder of a command.
INPUT, ORIGINAL, OUTPUT = "in", "original", "out"

Command = tuple[str, ...]
TO_HF: Command = ("convert", INPUT, OUTPUT, "--to", "hf", "--json")
TO_NANOTRON: Command = ("convert", INPUT, OUTPUT, "--to", "nanotron", "--tp", "1", "--json")
TO_DEEPSPEED: Command = (
    "convert",
    INPUT,
    OUTPUT,
    "--to",
    "deepspeed",
    "--zero-stage",
    "1",
    "--world-size",
    "2",
    "--json",
)
TO_UNIVERSAL: Command = ("convert", INPUT, OUTPUT, "--to", "deepspeed", "--json")
INSPECT: Command = ("inspect", INPUT, "--json")
CHECK: Command = ("inspect", INPUT, "--check", "--json")
DIFF: Command = ("diff", INPUT, ORIGINAL, "--json")
#: Needs torch, and so a slower server: drawn rarely.
VERIFY: Command = ("verify", INPUT, ORIGINAL, "--tensors-only", "--json")
CHECKED_CONVERSION: Command = (*TO_HF, "--verify")
CARD = "smolconv_proof.json"
CHECK_PROOF: Command = ("verify", ORIGINAL, ORIGINAL, "--check-proof", f"{INPUT}/{CARD}", "--json")


def dry(command: Command) -> Command:
    return (*command, "--dry-run")


_CHECKPOINT = (
    INSPECT, TO_HF, TO_DEEPSPEED, TO_NANOTRON, CHECK, dry(TO_HF), dry(TO_DEEPSPEED), dry(TO_NANOTRON), DIFF, TO_UNIVERSAL,
)  # fmt: skip
#: Of a source whose parameter groups nanotron cannot hold together.
_GROUPED = tuple((*command, "--no-optimizer") if "nanotron" in command else command for command in _CHECKPOINT)


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One whole input; ``make`` writes it below the folder that it is given."""

    name: str
    kind: str  #: what the campaign counts by
    make: Callable[[Path], object]
    commands: tuple[Command, ...] = _CHECKPOINT
    #: Every byte that a conversion uses has a digest which was recorded when it was written.
    sealed: bool = False


def _copied(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)


def _deepspeed(case: str, folder: Path) -> None:
    shutil.copytree(DEEPSPEED / case / "checkpoint", folder)
    shutil.copy(DEEPSPEED / case / "config.json", folder)


def _sharded(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    _copied(NANOTRON / "smollm2-tiny/expected_hf", folder)
    weights = load_file(folder / "model.safetensors")
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(weights)[i::2] for i in range(2)}
    for file, names in shards.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def _torch_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    _copied(NANOTRON / "smollm2-tiny/expected_hf", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _converted(source: Path | Callable[[Path], object], to: str, folder: Path, **options: object) -> None:
    if callable(source):
        made = folder.with_name(folder.name + "-source")
        source(made)
        convert(made, folder, to, **options)
        shutil.rmtree(made)
    else:
        convert(source, folder, to, **options)


def _with_card(folder: Path) -> None:
    """Of a comparison without logits, which is exact on every machine. Both sides are called as in ``CHECK_PROOF``."""
    import smolconv

    source = NANOTRON / "smollm2-tiny/expected_hf"
    _copied(source, folder)
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / ORIGINAL).symlink_to(source)
        smolconv.verify(Path(made) / ORIGINAL, Path(made) / ORIGINAL, logits=False, proof=folder / CARD)


def _gguf(folder: Path) -> None:
    from test_gguf import write_tiny

    folder.mkdir()
    write_tiny(folder / "tiny.gguf")


def _recipe(folder: Path) -> None:
    import yaml
    from training import recipe_document, token_folder

    folder.mkdir()
    _copied(NANOTRON / "smollm2-tiny/expected_hf", folder / "source")
    token_folder(folder / "tokens")
    document = recipe_document(Path(INPUT) / "source", Path(INPUT) / "tokens", output="run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))


def _shipped(name: str, folder: Path) -> None:
    from smolconv.continual_pretraining.recipe.files import shipped_recipes

    folder.mkdir()
    _copied(NANOTRON / "smollm3-tiny/expected_hf", folder / "source")
    shutil.copy(shipped_recipes()[name], folder / "recipe.yaml")


def _nanotron_yaml(name: str, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(FIXTURES / "recipes" / name, folder / "config.yaml")


def _run(folder: Path) -> None:
    from test_metrics import recipe, record, watch

    for first in (1, 41):
        with watch(folder, recipe(60, logging={"every_steps": 1_000_000}), first_step=first) as watched:
            for step in range(first, 61):
                loss = 3.2 - step / 80 + 1.5 * (step == 30)
                if step == 30:
                    watched.event(step, f"loss spike: {loss:.4f}, kept", kind="spike")
                watched.step(record(step, loss=loss, stage="stable" if step < 40 else "decay"))
                if step % 20 == 0:
                    watched.evaluation(step, {"held-out": loss + 0.1})


_ZERO1 = "zero1-bf16-ws3-uneven"
_RUN, _SAVED = f"{INPUT}/run", f"{INPUT}/run/checkpoints"
_RECIPE = f"{INPUT}/recipe.yaml"
_CONTINUE: Command = ("continue-train", _RECIPE, "--dry-run", "--json")
#: A shipped recipe, cut down to a tiny model.
_CONTINUE_SHIPPED: Command = (
    *_CONTINUE, "--nproc-per-node", "8", "--set", f"model.source={INPUT}/source", "--set", "data.sequence_length=64", "--set", "data.eos_token_id=0",
)  # fmt: skip
_FROM_NANOTRON: Command = ("recipe", "from-nanotron", f"{INPUT}/config.yaml", f"{OUTPUT}.yaml", "--eos", "0", "--json")
_IMPORT: Command = ("import-gguf", f"{INPUT}/tiny.gguf", OUTPUT, "--json")
_DATA: Command = ("data", "inspect", INPUT, "--json")

SEEDS = {
    seed.name: seed
    for seed in (
        *(
            Seed(name=f"nanotron-{model}-{topology}", kind="nanotron", make=partial(_copied, NANOTRON / model / topology))
            for model, topology in (
                ("smollm2-tiny", "tp1-pp2-dp1-zero0"), ("smollm2-tiny", "tp2-pp1-dp2-zero1"),
                ("smollm3-tiny-bf16", "tp2-pp1-dp1-zero0"),
            )
        ),
        *(
            Seed(name=f"hf-{model}", kind="huggingface", make=partial(_copied, NANOTRON / model / "expected_hf"))
            for model in ("smollm2-tiny", "smollm3-tiny")
        ),
        Seed(name="hf-sharded", kind="huggingface", make=_sharded, commands=(*_CHECKPOINT, VERIFY)),
        Seed(name="hf-torch", kind="huggingface", make=_torch_weights, commands=(*_CHECKPOINT, VERIFY)),
        *(
            Seed(
                name=f"deepspeed-{case}", kind="deepspeed", make=partial(_deepspeed, case),
                commands=_GROUPED if "-ws3" in case else _CHECKPOINT,
            )
            for case in (
                _ZERO1, "zero2-fp32-ws3", "zero2-roundrobin-ws2", "zero3-bf16-subgroups-ws3-uneven", "zero0-bf16",
                "zero1-frozen-ws2", "autotp2-zero1-bf16", "universal-from-zero2-ws3",
            )
        ),
        Seed(
            name="ours-hf", kind="written by smolconv", sealed=True,
            make=partial(_converted, NANOTRON / "smollm2-tiny/tp1-pp2-dp1-zero0", "hf"),
            commands=(*_CHECKPOINT, VERIFY, CHECKED_CONVERSION),
        ),
        Seed(
            name="ours-deepspeed", kind="written by smolconv", sealed=True,
            make=partial(_converted, NANOTRON / "smollm2-tiny/tp1-pp2-dp1-zero0", "deepspeed", zero_stage=1, world_size=2),
        ),
        Seed(
            name="ours-nanotron", kind="written by smolconv", sealed=True,
            make=partial(_converted, partial(_deepspeed, "zero2-roundrobin-ws2"), "nanotron"),
        ),
        Seed(
            name="ours-universal", kind="written by smolconv", sealed=True,
            make=partial(_converted, partial(_deepspeed, "zero2-fp32-ws3"), "deepspeed", universal=True), commands=_GROUPED,
        ),
        Seed(name="card", kind="card of proof", make=_with_card, commands=(INSPECT, CHECK_PROOF)),
        Seed(name="gguf", kind="gguf", make=_gguf, commands=(_IMPORT, dry(_IMPORT))),
        *(
            Seed(
                name=f"tokens-{case}", kind="token files", make=partial(_copied, FIXTURES / "datatrove" / case),
                commands=(_DATA, (*_DATA, "--eos", "0"), _DATA[:-1]),
            )
            for case in ("plain_2byte", "loss_2byte", "merged_2byte", "shuffled_4byte", "split_2byte")
        ),
        Seed(
            name="recipe", kind="recipe", make=_recipe,
            commands=(_CONTINUE, _CONTINUE[:-1], ("recipe", "show", _RECIPE), ("recipe", "init", _RECIPE, f"{OUTPUT}.yaml")),
        ),
        *(
            Seed(name=f"recipe-{name}", kind="recipe", make=partial(_shipped, name), commands=(_CONTINUE_SHIPPED,))
            for name in ("smollm3-3b-long-context-32k", "finemath-cpt")
        ),
        *(
            Seed(name=f"yaml-{name}", kind="nanotron YAML", make=partial(_nanotron_yaml, f"{name}.yaml"), commands=(_FROM_NANOTRON,))
            for name in ("smollm2-continued", "smollm3-three-stages")
        ),
        Seed(
            name="finished-run", kind="training run", make=partial(_copied, FIXTURES / "run"),
            commands=(
                _CONTINUE, (*_CONTINUE, "--resume", f"{_RUN}/checkpoints/step-2"),
                ("inspect", _SAVED, "--json"), ("inspect", _SAVED, "--check", "--json"), ("plot", _RUN, "-o", f"{OUTPUT}.svg"),
                ("convert", _SAVED, OUTPUT, "--to", "hf", "--json"), ("convert", _SAVED, OUTPUT, "--to", "deepspeed", "--json"),
            ),
        ),
        Seed(name="run", kind="training run", make=_run, commands=(("plot", INPUT, "-o", f"{OUTPUT}.svg"), ("plot", INPUT, ORIGINAL, "-o", f"{OUTPUT}.html"))),
    )
}  # fmt: skip

#: How often a kind is drawn: by how much of smolconv reads it.
WEIGHTS = {
    "nanotron": 4, "huggingface": 4, "deepspeed": 7, "written by smolconv": 5, "gguf": 2, "token files": 2, "recipe": 2,
    "nanotron YAML": 2, "training run": 4, "card of proof": 1,
}  # fmt: skip


class Workshop:
    """A folder in memory, if there is one, with every seed that was asked for, and the case that is worked on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "seeds").mkdir(parents=True, exist_ok=True)

    @cache  # noqa: B019  (a workshop lives as long as its process)
    def seed(self, name: str) -> Path:
        """The whole input. Nobody writes there."""
        made = self.folder / "seeds" / name
        SEEDS[name].make(made)
        return made

    def case(self, name: str) -> Path:
        """The working folder of a command, with a copy of the seed to be damaged: its files are links to the whole one's."""
        case = self.folder / "case"
        remove(case)
        case.mkdir()
        whole = self.seed(name)
        linked(whole, case / INPUT)
        (case / ORIGINAL).symlink_to(whole)
        return case


def linked(source: Path, target: Path) -> None:
    """A copy of a folder whose files are hard links. Who changes one must replace it."""
    shutil.copytree(source, target, copy_function=os.link)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def memory_folder() -> str | None:
    """Where nothing waits for a disk, for ``tempfile``."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
