"""The JSON schema of recipes, with which editors complete and check a YAML file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from smolconv.continual_pretraining.recipe.schema import Recipe

#: The schema as an installed file: the output of ``recipe schema``. A test compares them.
SCHEMA_FILE = Path(__file__).parent.parent / "recipes" / "recipe.schema.json"
_MODELINE = "# yaml-language-server: $schema="
_FIELD = re.compile(r"^    (\w+): .*?  #: (.+)$", re.MULTILINE)


def recipe_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a recipe: every field with its type, limits, default and meaning."""
    schema = Recipe.model_json_schema(mode="validation")
    sections = {section.__name__: section for section in _sections(Recipe)}
    for name, document in (("Recipe", schema), *schema["$defs"].items()):
        for field, meaning in _meanings(sections[name]).items():
            document["properties"][field].setdefault("description", meaning)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A recipe of smolconv"}


def with_modeline(text: str) -> str:
    """A recipe's text with a first line that tells editors where the schema is."""
    rest = text.partition("\n")[2] if text.startswith(_MODELINE) else text
    return f"{_MODELINE}{SCHEMA_FILE}\n{rest}"


def _meanings(section: type[BaseModel]) -> dict[str, str]:
    """The comment of each field in the class's source."""
    return dict(_FIELD.findall(inspect.getsource(section)))


def _sections(of: Any) -> Iterator[type[BaseModel]]:
    """A section and all sections in its fields."""
    if isinstance(of, type) and issubclass(of, BaseModel):
        yield of
        for field in of.model_fields.values():
            yield from _sections(field.annotation)
    for part in get_args(of):
        yield from _sections(part)
