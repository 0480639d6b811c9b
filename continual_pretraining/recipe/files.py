"""Reads recipes from YAML, with the line of every mistake, writes them, and lists the shipped ones."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from smolconv.continual_pretraining.recipe.schedules import notes as schedule_notes
from smolconv.continual_pretraining.recipe.schema import Recipe
from smolconv.errors import BadCheckpoint, UsageError, first_line
from smolconv.files import read_bytes
from smolconv.parsing import require_small_yaml

_SHIPPED = Path(__file__).parent.parent / "recipes"
_ADVICE = "docs/recipes.md lists every field; `smolconv recipe show try-out` prints a complete recipe."

#: The longest published one has 10 KB. A recipe of this size is read within seconds.
_MOST_BYTES = 1 << 20
#: Most digits of a whole number: as many as 2^64 has.
_MOST_DIGITS = 20
_MOST_MISTAKES = 6
RECIPE = "recipe.resolved.yaml"  #: of a run, in its folder

Place = tuple[str | int, ...]  #: a value's keys and list indices, from the top


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with smolconv, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a file, or a shipped recipe by its name, and change it by ``section.key=value`` overrides.

    Paths in a recipe stay as they are written: relative ones start at the current directory.

    Raises ``UsageError`` with file, line and field of every mistake.
    """
    return parse_recipe(read_recipe(path_or_name), str(path_or_name), overrides)


def read_recipe(path_or_name: str | Path) -> str:
    """The text of the file, or of the shipped recipe with that name. Raises ``UsageError``."""
    path = _find(path_or_name)
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder.\nA recipe was expected: a YAML file, or the name of a shipped one.\n"
            "To make one: smolconv recipe init my.yaml --source CHECKPOINT --data TOKENS --gpus N"
        )
    try:
        return read_bytes(path, _MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8. A recipe is a text file in YAML.") from None
    except BadCheckpoint as error:
        raise UsageError(str(error)) from None


def _find(path_or_name: str | Path) -> Path:
    path, name, shipped = Path(path_or_name), str(path_or_name), shipped_recipes()
    if name in shipped and not os.path.isfile(path):
        return shipped[name]
    if os.path.lexists(path):
        return path
    raise UsageError(
        f"{name:.200}: no such file, and no recipe of that name ships with smolconv."
        f"{_near(name.removesuffix('.yaml'), shipped)}\n"
        f"`smolconv recipe list` names them: {', '.join(shipped)}."
    )


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Like ``load_recipe``, from text; errors name it ``where``."""
    document = _Document(where, text)
    for override in overrides:
        document.override(override)
    try:
        return Recipe.model_validate(document.value)
    except ValidationError as error:
        mistakes = document.mistakes(error)
        total = error.error_count()
    count = "a mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    count = count if total <= _MOST_MISTAKES else f"{total} mistakes; these are some"
    raise UsageError("\n".join([f"the recipe {where} has {count}.", *mistakes, _ADVICE])) from None


def dump_recipe(recipe: Recipe) -> str:
    """Every field as YAML, including defaults; ``load_recipe`` returns an equal recipe."""
    values = recipe.model_dump(mode="json")
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def notes(recipe: Recipe) -> list[str]:
    """Notes on numbers that were changed, and on what is allowed but perhaps not intended."""
    found = []
    named = [(f"data: stage {stage.name!r}", stage.sources) for stage in recipe.data.stages]
    for title, sources in named:
        total = math.fsum(source.weight for source in sources)
        if not math.isclose(total, 1, rel_tol=0, abs_tol=1e-6):
            shares = [f"{source.weight / total:.4g}" for source in sources[:6]]
            more = "" if len(sources) <= len(shares) else f", ... {len(sources)} in all"
            found.append(f"{title}: the weights sum to {total:.6g} and were normalised: {', '.join(shares)}{more}.")
    if recipe.export is None:
        found.append(
            "export: the recipe has no export section: nothing is exported after the last step. "
            "`export: {}` writes hf, verified; smolconv convert exports any checkpoint."
        )
    return found + schedule_notes(recipe.schedule)


# --- YAML with positions --------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Scalars as in YAML 1.2: 2e-4 is a number, while on, 24:00:00 and 007 are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would not read as text."""


_SCALARS = {
    "null": r"(?:~|null|Null|NULL|)",
    "bool": r"(?:true|True|TRUE|false|False|FALSE)",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
for _kind, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)


class _Document:
    """A recipe's plain values, each with its origin: a line of the file, or an override."""

    def __init__(self, where: str, text: str) -> None:
        self.where = where
        self.origins: dict[Place, tuple[int, str]] = {(): (1, f"{where}:1")}
        node = _compose(text, where)
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{where}:1: expected a recipe: sections such as model:, data: and schedule:. {_ADVICE}")
        self.value: dict[str, Any] = self._plain(node, ())

    def _plain(self, node: yaml.Node, place: Place, override: str | None = None) -> Any:
        line = node.start_mark.line + 1
        if override is None:
            self.origins.setdefault(place, (line, f"{self.where}:{line}"))
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*place, i), override) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return _scalar(node, override or f"{self.where}:{line}")
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            origin = override or f"{self.where}:{line}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(f"{origin}: a key must be a word.")
            key = _text(key_node.value, origin)
            at: Place = (*place, key)
            if key in found:
                first = f", first in line {self.origins[at][0]}" if override is None else ""
                raise UsageError(f"{origin}: {_dotted(at)} occurs twice{first}. Remove one of them.")
            if override is None:
                self.origins[at] = (line, origin)
            found[key] = self._plain(value_node, at, override)
        return found

    def override(self, text: str) -> None:
        """Set one value by ``section.key=value``, the value in YAML and list items by their index."""
        name = f"--set {text if len(text) <= 200 else f'{text:.200}...'}"
        path, equals, value_text = text.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise UsageError(f"{name}: expected section.key=value, such as schedule.train_steps=1000.")
        place: Place = ()
        value: Any = self.value
        for i, key in enumerate(keys):
            last = i == len(keys) - 1
            if isinstance(value, list):
                if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= len(value):
                    raise UsageError(
                        f"{name}: {_dotted(place)} has {len(value)} items; expected 0 to {len(value) - 1}, not "
                        f"{_shown(key)}."
                    )
                step: str | int = int(key)
            else:
                known = _fields(place)
                if known is not None and key not in known:
                    raise UsageError(f"{name}: {_unknown((*place, key))}\n{_ADVICE}")
                step = key
            place = (*place, step)
            if last:
                value[step] = self._plain(_compose(value_text, name), (), name)
                self.origins = {at: line for at, line in self.origins.items() if at[: len(place)] != place}
                self.origins[place] = (0, name)
            else:
                below = value[step] if isinstance(step, int) else value.get(step)
                if below is None and _is_section(place):
                    below = value[step] = {}  # not in the file
                if not isinstance(below, dict | list):
                    raise UsageError(f"{name}: {_dotted(place)} is {_shown(below)}, not a section.")
                value = below

    def mistakes(self, error: ValidationError) -> list[str]:
        """A sentence for each mistake, in the order of the file, up to a limit."""
        errors: list[Any] = error.errors()[:_MOST_MISTAKES]
        # pydantic counts only a list's valid items, and reports a misspelt key's intended key as missing.
        wrong = [one for one in errors if not (one["type"] == "too_short" and one["input"])]
        misspelt = {
            (*one["loc"][:-1], near)
            for one in errors
            if one["type"] == "extra_forbidden" and (near := _nearest(one["loc"][-1], _fields(one["loc"][:-1]) or {}))
        }
        wrong = [one for one in wrong if not (one["type"] == "missing" and tuple(one["loc"]) in misspelt)]
        return [sentence for _, sentence in sorted(map(self._mistake, wrong), key=lambda one: one[0])]

    def _mistake(self, error: Any) -> tuple[int, str]:
        place: Place = tuple(error["loc"])
        message = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "value_error" and (named := re.match(r"[a-z_]+(?:\.[a-z_]+)*", message)):
            # A check over several fields names them in its message.
            mentioned = (*place, *named[0].split("."))
            place = mentioned if mentioned in self.origins else place
        line, origin = next(self.origins[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.origins)
        field = _dotted(place)
        if error["type"] == "extra_forbidden":
            return line, f"{origin}: {_unknown(place)}"
        if error["type"] == "missing":
            section = _dotted(place[:-1])
            return line, f"{origin}: {field} is missing{f'; {section} needs it' if section else ''}."
        if error["type"] == "value_error":
            return line, f"{origin}: {message if len(message) <= 300 else f'{message:.300}...'}."
        found = error["input"]
        shown = "a section" if isinstance(found, dict) else "a list" if isinstance(found, list) else _shown(found)
        expected = message.replace("Input should be", "expected", 1)
        expected = re.sub("valid dictionary( or instance of .*)?", "section", expected)
        expected = re.sub("[Tt]uple", "list", expected.replace(" after validation", ""))
        quotes = " Put it in quotes." if error["type"] == "string_type" and isinstance(found, int | float) else ""
        return line, f"{origin}: {field} is {shown}; {expected[:1].lower()}{expected[1:]}.{quotes}"


def _compose(text: str, where: str) -> yaml.Node:
    """The parsed text as nodes, before values are constructed; empty text is null."""
    try:
        require_small_yaml(text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None or where.startswith("--set") else f":{mark.line + 1}"
        problem = error.problem or error.context or "it cannot be parsed"
        if mark is not None and text[mark.index : mark.index + 1] == "\t":
            problem = "a tab; YAML is indented by spaces"
        if problem.startswith("mapping values"):
            problem = "a second colon in the line, or a wrong indentation; text with a colon needs quotes"
        raise UsageError(f"{where}{line}: not YAML: {problem}.") from None
    except UnicodeEncodeError:
        raise UsageError(f"{where}: it has bytes that are not UTF-8. A recipe is text.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{where}: not YAML: {first_line(error)}.") from None
    return yaml.ScalarNode("tag:yaml.org,2002:null", "", yaml.Mark("", 0, 0, 0, "", 0)) if node is None else node


def _scalar(node: yaml.Node, origin: str) -> Any:
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            if len(text) > _MOST_DIGITS:
                raise UsageError(f"{origin}: {_shown(text)} has more than {_MOST_DIGITS} digits. No field takes it.")
            return int(text.replace("_", ""))
        if kind == "float":
            return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise UsageError(f"{origin}: {_shown(text)} is not a valid {kind}, which its tag requires.") from None
    if kind != "str":
        raise UsageError(f"{origin}: a recipe cannot have the tag {node.tag}.")
    return _text(text, origin)


def _text(text: str, origin: str) -> str:
    if "\0" in text or text != text.encode(errors="ignore").decode():
        raise UsageError(f"{origin}: {_shown(text)} has a character that is not valid in text. Remove it.")
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- the schema -----------------------------------------------------------------------------------------------------


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in an annotation such as ``tuple[Source, ...]`` or ``Export | None``."""
    if isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _fields(place: Place) -> Mapping[str, Any] | None:
    """The fields of the section at ``place``; None if it is not a section, as for free keys."""
    model: type[BaseModel] = Recipe
    in_list = False
    for key in place:
        if in_list:
            in_list = False  # the index
            continue
        if key not in model.model_fields:
            return None
        annotation = model.model_fields[str(key)].annotation
        below = next(_models(annotation), None)
        if below is None:
            return None
        model, in_list = below, _is_list(annotation)
    return None if in_list else model.model_fields


def _is_section(place: Place) -> bool:
    """Whether ``place`` has named keys: a section's, or free ones such as environment variables."""
    field = (_fields(place[:-1]) or {}).get(str(place[-1]))
    return _fields(place) is not None or (field is not None and str(field.annotation).startswith("dict["))


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_list(argument) for argument in get_args(annotation))
    return get_origin(annotation) in (tuple, list)


def _unknown(place: Place) -> str:
    """The message for a key that is not in the schema, with a suggestion."""
    key = str(place[-1])
    known = _fields(place[:-1]) or {}
    near = _near(key, known)
    if not near:
        elsewhere = [section for section, fields in _sections() if key in fields]
        near = f" It belongs to {' and '.join(elsewhere)}." if elsewhere else f" Known keys: {', '.join(known)}."
    return f"{_dotted(place)}: no such key.{near}"


def _sections(place: Place = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every section by its dotted place; a list of sections by its first item."""
    fields = _fields(place) or {}
    yield _dotted(place) or "the top", fields
    for name, field in fields.items():
        if next(_models(field.annotation), None) is not None:
            yield from _sections((*place, name, 0) if _is_list(field.annotation) else (*place, name))


def _nearest(word: object, known: Mapping[str, Any]) -> str | None:
    return next(iter(difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)), None)


def _near(word: str, known: Mapping[str, Any]) -> str:
    found = _nearest(word, known)
    return f" Did you mean {found}?" if found else ""


def _dotted(place: Place) -> str:
    return ".".join(str(key) for key in place)
