"""Files that are copied with weights: facts about the tokenizer without loading it, and names of code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolconv.checkpoint import Checkpoint
from smolconv.errors import CorruptFile, MissingFile, SmolconvError, first_line, some_of
from smolconv.files import read_bytes
from smolconv.layouts.listing import ASSET_NAMES, TEMPLATES, assets_in, newest_step
from smolconv.parsing import MOST_TOKENIZER_BYTES, parse_json_object, parse_yaml_mapping, read_json

#: Sets of files from which transformers can load a tokenizer.
_SETS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_EXPECTED = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
_CONFIG = "tokenizer_config.json"
#: Files that are no tokenizer without others.
_PARTS = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", _CONFIG)
#: Copied files that do not belong to the tokenizer.
_GENERATION = "generation_config.json"
_OTHERS = ("README.md", "LICENSE", _GENERATION)
#: A field of generation_config.json that changes whenever transformers saves it.
_WRITTEN_BY = "transformers_version"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Facts about a checkpoint's tokenizer, without loading it."""

    problems: tuple[str, ...]  #: files that cannot be used, one sentence each
    complete: bool  #: whether all files of a tokenizer are there
    largest_id: int | None  #: the largest id that it can produce, if its files show it

    @property
    def usable(self) -> bool:
        return self.complete and not self.problems


def is_tokenizer(names: set[str]) -> bool:
    """Whether files with these names form a complete tokenizer."""
    return any(names.issuperset(needed) for needed in _SETS)


def tokenizer_of(assets: Mapping[str, Path], made: Mapping[str, bytes], looked_for: Iterable[Path]) -> TokenizerFiles:
    """Inspect the tokenizer among copied files; ``made`` are files that smolconv generated.

    A dangling link among ``looked_for`` is a problem, unless another file has its name.
    """
    nowhere = [path for path in looked_for if path.is_symlink() and not path.exists()]
    problems = [f"{path} is a dangling link" for path in nowhere if path.name not in {**assets, **made}]
    largest: list[int] = []
    for name in dict.fromkeys(name for names in _SETS for name in names):
        if name in assets:
            try:
                largest += list(_ids(name, assets[name]))
            except SmolconvError as error:
                problems.append(first_line(error).removesuffix("."))
    complete = is_tokenizer({*assets, *made})
    return TokenizerFiles(problems=tuple(problems), complete=complete, largest_id=max(largest, default=None))


def tokenizer_warnings(checkpoint: Checkpoint, *, needed: bool) -> tuple[bool, list[str]]:
    """Whether the checkpoint has a loadable tokenizer, with warnings.

    With ``needed``, also warn if there is none, and name the one of a nanotron run.
    """
    tokenizer = tokenizer_of(checkpoint.assets, checkpoint.documents, _of_tokenizer(checkpoint.root))
    warnings = []
    if tokenizer.problems or (needed and not tokenizer.complete):
        found = f"no usable tokenizer: {'; '.join(tokenizer.problems)}" if tokenizer.problems else "no tokenizer"
        parts = [name for name in _PARTS if name in checkpoint.assets and not tokenizer.problems]
        only = f" ({some_of(parts)} alone is not enough)" if parts else ""
        warnings.append(
            f"the source has {found}{only}; give one with --tokenizer, or copy it next to config.json later."
            f"{_named_by_nanotron(checkpoint)}"
        )
    if tokenizer.largest_id is not None and tokenizer.largest_id >= checkpoint.spec.vocab_size:
        warnings.append(
            f"the tokenizer gives ids up to {tokenizer.largest_id}, but the embedding has "
            f"{checkpoint.spec.vocab_size} rows: the model fails on larger ids. Check whose tokenizer it is."
        )
    return tokenizer.usable, warnings


def given_tokenizer(path: Path) -> dict[str, Path]:
    """The files of the tokenizer that ``--tokenizer`` names: a folder, a run's folder, or its single file.

    Raises ``MissingFile`` and ``CorruptFile`` if it cannot be loaded.
    """
    path = newest_step(path)
    if os.path.isdir(path):  # False for a name that is too long
        found = {name: file for name, file in assets_in(path).items() if _is_of_tokenizer(name)}
        tokenizer = tokenizer_of(found, {}, _of_tokenizer(path))
    else:
        found = {path.name: path} if os.path.isfile(path) else {}
        tokenizer = tokenizer_of(found, {}, [path])
    if tokenizer.problems:
        raise CorruptFile(
            f"--tokenizer {path}: {'; '.join(tokenizer.problems)}.\n"
            f"Expected {_EXPECTED}, complete.\nCopy it again from the source, or name another folder."
        )
    if not tokenizer.complete:
        raise MissingFile(
            f"--tokenizer {path}: no {_EXPECTED} is there.\n"
            f"Expected a local folder with a tokenizer, or its single file; {_CONFIG} alone is not enough.\n"
            "Check the path. To download a tokenizer from the Hub: hf download OWNER/NAME --local-dir FOLDER"
        )
    return found


def differences_beside_weights(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Files, token ids and progress with which equal weights are used otherwise, where both have them; for people."""
    names = [name for name in a.assets if name in b.assets and (_is_of_tokenizer(name) or name == _GENERATION)]
    files = [name for name in names if not _same_content(a.assets[name], b.assets[name])]
    found = [f"{some_of(files)} of A and B differ, which is no difference of the models."] if files else []
    if a.progress is not None and b.progress is not None and a.progress.step != b.progress.step:
        found.append(f"A is of step {a.progress.step}, B of step {b.progress.step}, which verify does not judge.")
    left, right = a.source.model_config, b.source.model_config
    return found + [
        f"{name} is {left[name]} in A's config and {right[name]} in B's, which is no difference of the models."
        for name in ("bos_token_id", "eos_token_id")
        if name in left and name in right and left[name] != right[name]
    ]


def _same_content(a: Path, b: Path) -> bool:
    """Whether two documents are equal, however their JSON is written, but for the version that wrote them.

    True also if one cannot be read, which is no difference.
    """
    try:
        one, other = (read_bytes(path, MOST_TOKENIZER_BYTES) for path in (a, b))
    except SmolconvError:
        return True
    if one != other and a.name.endswith(".json"):
        with suppress(SmolconvError):
            left, right = (parse_json_object(data, path) for data, path in ((one, a), (other, b)))
            return {**left, _WRITTEN_BY: None} == {**right, _WRITTEN_BY: None}
    return one == other


def without_own_code(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without references to code in its folder (``auto_map``): ``.py`` files are not carried.

    Code in another repository on the Hub (``owner/name--module.Class``) stays named.
    """
    source, documents, warnings = checkpoint.source, dict(checkpoint.documents), list(checkpoint.warnings)
    assets = dict(checkpoint.assets)
    config, names = _without_local_code(source.hf_config or {})
    if names:
        source = replace(source, hf_config=config)
        warnings.append(
            f"config.json names custom code ({some_of(names)}), which is not carried: auto_map was left out. The "
            f"model is read, written and verified as transformers' own {checkpoint.spec.architecture}."
        )
    if _CONFIG in assets:
        with suppress(SmolconvError):  # an error is reported when the tokenizer is loaded
            config, names = _without_local_code(read_json(assets[_CONFIG]))
            if names:
                documents[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
                del assets[_CONFIG]
                warnings.append(
                    f"{_CONFIG} names custom code ({some_of(names)}), which is not carried: auto_map was left out. "
                    "Copy the .py file and the field if the tokenizer needs them."
                )
    return replace(checkpoint, source=source, assets=assets, documents=documents, warnings=tuple(warnings))


def _without_local_code(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config with the rest of its auto_map, and the removed classes, whose code was in the folder."""
    known = config.get("auto_map")
    names, kept = list[str](), dict[str, Any]()
    for key, value in known.items() if isinstance(known, dict) else ():
        local = [name for name in (value if isinstance(value, list) else [value])
                 if isinstance(name, str) and "--" not in name]  # fmt: skip
        names += local
        if not local:
            kept[key] = value
    rest = {name: value for name, value in config.items() if name != "auto_map"}
    return {**rest, **({"auto_map": kept} if kept else {})}, list(dict.fromkeys(names))


def _is_of_tokenizer(name: str) -> bool:
    return name.startswith(f"{TEMPLATES}/") or (name in ASSET_NAMES and name not in _OTHERS)


def _of_tokenizer(folder: Path) -> list[Path]:
    return [folder / name for name in filter(_is_of_tokenizer, ASSET_NAMES)]


def _ids(name: str, path: Path) -> Iterator[int]:
    """Ids in a tokenizer's file. Raises ``CorruptFile`` for a file that cannot be loaded."""
    data = read_bytes(path, MOST_TOKENIZER_BYTES)
    if not data.strip():
        raise CorruptFile(f"{path} is empty")
    if not name.endswith(".json"):
        return
    document = parse_json_object(data, path)
    vocabulary: object = document
    if name == "tokenizer.json":
        model, added = document.get("model"), document.get("added_tokens")
        if not isinstance(model, dict):
            raise CorruptFile(f"{path} holds no tokenizer model")
        vocabulary = model.get("vocab")
        yield from _whole(token.get("id") for token in added or () if isinstance(token, dict))
    if isinstance(vocabulary, list):  # Unigram's, whose ids are positions in the list
        yield len(vocabulary) - 1
    elif isinstance(vocabulary, dict):
        yield from _whole(vocabulary.values())


def _whole(values: Iterable[object]) -> Iterator[int]:
    return (value for value in values if isinstance(value, int) and not isinstance(value, bool))


def _named_by_nanotron(checkpoint: Checkpoint) -> str:
    """A hint with the tokenizer that the run's config.yaml names."""
    training = checkpoint.source.nanotron_training
    if training is None:
        return ""
    with suppress(CorruptFile):
        section = parse_yaml_mapping(training, "config.yaml").get("tokenizer")
        name = section.get("tokenizer_name_or_path") if isinstance(section, dict) else None
        if isinstance(name, str) and name:
            return f" The run's config.yaml names {name:.100} (tokenizer.tokenizer_name_or_path)."
    return ""
