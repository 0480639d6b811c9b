"""Explains a folder of no known layout by its names: another program's checkpoint, or one that lacks a part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from smolconv.errors import SmolconvError, UnknownLayout, some_of
from smolconv.files import MOST_NAME_BYTES
from smolconv.layouts.huggingface.listing import ADAPTER, CONFIG, has_weights
from smolconv.layouts.listing import RUN_CHECKPOINTS, RUN_RECIPE, AnyPath, content
from smolconv.parsing import parse_json

#: Names that other programs give -> what such a folder is, and what to do; ``{name}`` is that name.
_OTHERS: Mapping[str, tuple[str, str]] = {
    r"\.metadata|.*\.distcp|pytorch_model_fsdp_\d+": (
        "a sharded checkpoint of torch.distributed (FSDP or DCP)",
        "Join it: accelerate merge-weights FOLDER_WITH_DISTCP OUT, and put the model's config.json into OUT. If "
        "torchtitan wrote it, use torchtitan's convert_to_hf.py instead: it has other names and another order of rows.",
    ),
    r"consolidated(\.\d+)?\.(pth|safetensors)": (
        "weights in the form of Meta's own code",
        "Use the same model in Hugging Face's form, which has other names and another order of rows.",
    ),
    r"latest_checkpointed_iteration\.txt|iter_\d{7}|mp_rank_\d+(_\d+)?|model_optim_rng\.pt": (
        "a checkpoint of Megatron-LM",
        "Export it to Hugging Face with Megatron's own tools (Megatron Bridge), then convert that folder.",
    ),
    r"weights(\.\d+)?\.(safetensors|npz)": (
        "weights of MLX",
        "Use the original Hugging Face model; the model card names it.",
    ),
    r".*\.gguf": ("a GGUF file", "Import the file from disk: smolconv import-gguf {name} OUT"),
}
#: Transformers' names for files saved with ``variant``: model.fp16.safetensors, or an index for shards.
_VARIANT = re.compile(
    r"(?P<indexed>model\.safetensors|pytorch_model\.bin)\.index\.(?P<of_index>\w+)\.json"
    r"|(?P<stem>model(?=\.\w+\.safetensors)|pytorch_model(?=\.\w+\.bin))\.(?P<variant>\w+)(?P<suffix>\.\w+)"
)
_BIN_SHARD = re.compile(r"pytorch_model-\d{5}-of-(\d{5})\.bin")
_TRAINER_STEP = re.compile(r"checkpoint-(\d{1,18})")


def what_is_there(folder: AnyPath) -> UnknownLayout | None:
    """An error that explains what a folder of no layout holds, and what to do; None if its names do not show it.

    Each message says what was found, what was expected, and how to get a readable folder.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    lines = next(filter(None, _answers(folder, names)), None)
    return None if lines is None else UnknownLayout("\n".join(lines))


def _answers(folder: AnyPath, names: list[str]) -> Iterator[tuple[str, str, str] | None]:
    yield _adapter(folder, names)
    yield _run(folder, names)
    yield _trainer(folder, names)
    yield _hub_cache(folder, names)
    for pattern, (what, remedy) in _OTHERS.items():
        if name := next((name for name in names if re.fullmatch(pattern, name)), None):
            yield (
                f"{folder} holds {what}: {name}.",
                "Expected a checkpoint of Hugging Face, nanotron or DeepSpeed.",
                remedy.replace("{name}", str(folder / name) if isinstance(folder, Path) else name),
            )
    yield _variant(folder, names)
    yield _bin_shards(folder, names)
    yield _dangling(folder, names)
    yield _no_config(folder)


def _adapter(folder: AnyPath, names: list[str]) -> tuple[str, str, str] | None:
    found = [name for name in names if name in ("adapter_model.safetensors", "adapter_model.bin", ADAPTER)]
    if not found:
        return None
    return (
        f"{folder} holds a PEFT adapter ({', '.join(found)}), not a complete model.",
        f"Expected all weights of the model; the adapter changes those of {_base_of(folder)}.",
        "Merge it first: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OUT).",
    )


def _base_of(folder: AnyPath) -> str:
    with suppress(SmolconvError, OSError, ValueError, LookupError, TypeError):
        base = parse_json(content(folder / ADAPTER))["base_model_name_or_path"]
        if isinstance(base, str) and base:
            return f"{base!r:.120}"
    return "its base model"


def _run(folder: AnyPath, names: list[str]) -> tuple[str, str, str] | None:
    if RUN_RECIPE not in names:
        return None
    return (
        f"{folder} is a run of smolconv continue-train without a checkpoint yet.",
        f"Expected {RUN_CHECKPOINTS}/latest and the step that it names.",
        "Wait for its first save, or name the checkpoint that it started from.",
    )


def _trainer(folder: AnyPath, names: list[str]) -> tuple[str, str, str] | None:
    steps = {int(match[1]): match[0] for name in names if (match := _TRAINER_STEP.fullmatch(name))}
    newest = [steps[step] for step in sorted(steps, reverse=True) if (folder / steps[step]).is_dir()]
    if not newest:
        return None
    return (
        f"{folder} is the output folder of a Trainer; its checkpoints are folders in it: {some_of(newest, 5)}.",
        "Expected the folder of one checkpoint.",
        f"Name it, such as the newest: {folder / newest[0]}",
    )


def _hub_cache(folder: AnyPath, names: list[str]) -> tuple[str, str, str] | None:
    if not {"snapshots", "refs"} <= set(names):
        return None
    snapshots = folder / "snapshots"
    found = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    main = folder / "refs" / "main"
    current = content(main, MOST_NAME_BYTES).decode(errors="replace").strip() if main.is_file() else ""
    kind, *parts = folder.name.split("--")
    address = f"hf://{'/'.join(parts)}" if kind == "models" and len(parts) == 2 else "hf://owner/name"
    folder_of_one = [current] if current in found else found[:1]
    return (
        f"{folder} is a repository in the Hub's cache; its checkpoints are the folders in snapshots ({len(found)}).",
        "Expected the folder of one checkpoint, or an address.",
        f"Name {' or '.join([*(str(snapshots / name) for name in folder_of_one), address])}",
    )


def _variant(folder: AnyPath, names: list[str]) -> tuple[str, str, str] | None:
    match = next((match for name in names if (match := _VARIANT.fullmatch(name))), None)
    if match is None:
        return None
    plain = f"{match['indexed']}.index.json" if match["indexed"] else match["stem"] + match["suffix"]
    return (
        f"{folder} holds the weights as a variant only: {match[0]} ({match['of_index'] or match['variant']}).",
        f"Expected {plain}.",
        f"Give them that name, in a copy of the folder on disk: ln -s {match[0]} {plain}",
    )


def _bin_shards(folder: AnyPath, names: list[str]) -> tuple[str, str, str] | None:
    found = [match for name in names if (match := _BIN_SHARD.fullmatch(name))]
    if not found:
        return None
    index = "pytorch_model.bin.index.json"
    return (
        f"{folder} holds {len(found)} of {int(found[0][1])} shards ({found[0][0]}, ...), but no {index}.",
        "Expected the index, which lists the tensors of each shard.",
        f"Copy {index} from where the shards came from.",
    )


def _dangling(folder: AnyPath, names: list[str]) -> tuple[str, str, str] | None:
    links = [path for name in names if isinstance(path := folder / name, Path) and path.is_symlink()]
    gone = [path for path in links if not path.exists()]
    if not gone:
        return None
    return (
        f"{folder}: {len(gone)} of its files are dangling links, such as {gone[0].name} -> {gone[0].readlink()}.",
        "Expected the files themselves. A snapshot in the Hub's cache holds links into its folder blobs.",
        "Download it again, or copy the folder with the linked files: cp -rL",
    )


def _no_config(folder: AnyPath) -> tuple[str, str, str] | None:
    if not has_weights(folder):
        return None
    return (
        f"{folder} holds weights with Hugging Face's names, but no {CONFIG}.",
        f"Expected {CONFIG} in the same folder, which describes the model.",
        "Copy it there from where the weights came from, or name it with --config PATH.",
    )
