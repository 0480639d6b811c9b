"""A layout shows itself: what is above the layouts asks their records, and names none of them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from conftest import convert

from smolconv.commands import convert as command
from smolconv.conversion import ConvertOptions
from smolconv.errors import UsageError
from smolconv.layouts.registry import BY_WORD, LAYOUTS
from smolconv.replacing import lost_with

ROOT = Path(__file__).parent.parent
NAMES = {name for layout in LAYOUTS for name in (layout.name, *layout.words)}
#: Comparisons with a name that are not about a layout, or are the one table of verify's forwards and engines.
OTHERS = {
    "commands/convert.py": "--push takes what the Hub shows as a model",
    "smolconv/api.py": "an engine's name",
    "continual_pretraining/recipe/schema.py": "a recipe's word for a format, of which one can be pushed",
    "continual_pretraining/run/export.py": "a recipe's word for a format, of which one can be pushed",
    "continual_pretraining/estimate/flops.py": "a formula's name",
    "smolconv/verification/engines/start.py": "an engine's name",
}


def compared_names(path: Path) -> set[str]:
    """Names of layouts that a source compares something with."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            parts += [item for part in parts if isinstance(part, (ast.Tuple, ast.List, ast.Set)) for item in part.elts]
            found |= {part.value for part in parts if isinstance(part, ast.Constant) and part.value in NAMES}
    return found


def sources() -> list[Path]:
    folders = ("smolconv", "commands", "continual_pretraining")
    found = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not {parent for parent in path.parents if parent.is_symlink()}
    ]
    return [path for path in found if "layouts" not in path.parts and "launchers" not in path.parts]


def test_nothing_above_the_layouts_compares_a_layouts_name():
    found = {str(path.relative_to(ROOT)): names for path in sources() if (names := compared_names(path))}
    assert {place: names for place, names in found.items() if place not in OTHERS} == {}


def test_the_comparison_would_be_noticed(tmp_path):
    (tmp_path / "a.py").write_text('if layout == "nanotron" or to in ("hf", "x"):\n    pass\n')
    assert compared_names(tmp_path / "a.py") == {"nanotron", "hf"}


def test_the_command_lists_the_words_of_the_registry():
    to = get_type_hints(inspect.unwrap(command.convert))["to"]
    assert set(get_args(to)) == BY_WORD.keys()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_only_one_writer_knows_is_an_option_of_convert_with_the_same_default(layout: Any):
    """So that the command can say which options have no meaning for a target, without a list of them."""
    known = ConvertOptions.__dataclass_fields__
    for field in layout.options.__dataclass_fields__.values():
        assert field.name in known
        made = layout.options()
        assert known[field.name].default in (None, False, getattr(made, field.name))


def test_an_unknown_word_names_the_known_ones(tmp_path):
    from smolconv.conversion import plan_conversion

    with pytest.raises(UsageError, match="expected one of hf, nanotron, deepspeed"):
        plan_conversion(tmp_path, tmp_path / "out", ConvertOptions(to="onnx"))


def test_a_users_file_beside_the_carried_documents_is_not_taken_for_one_of_them(tmp_path):
    source = ROOT / "fixtures/nanotron/smollm2-tiny/tp1-pp2-dp1-zero0"
    convert(source, tmp_path / "out", "deepspeed")
    assert lost_with(tmp_path / "out") is None
    (tmp_path / "out/smolconv_source/my-notes.txt").touch()
    assert lost_with(tmp_path / "out") == "also holds smolconv_source/my-notes.txt"
