"""The model families, and the detection of a config's family."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from smolconv.errors import UnsupportedModel, UsageError
from smolconv.models.family import Family, NanotronClass
from smolconv.models.spec import ModelSpec

#: The names of families; each is also the name of the module with its record.
_NAMES = (
    "llama",
    "smollm3",
    "qwen2",
    "qwen3",
)
FAMILIES: Mapping[str, Family] = {name: import_module(f"smolconv.models.{name}").FAMILY for name in _NAMES}


def family_of(spec: ModelSpec) -> Family:
    return FAMILIES[spec.architecture]


def family_named(name: str) -> Family:
    """The family for ``--architecture``. Raises ``UsageError``."""
    if name not in FAMILIES:
        raise UsageError(f"--architecture {name}: expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def family_of_hf_config(config: Mapping[str, Any], where: str) -> Family:
    """The family by model_type. Raises ``UnsupportedModel``."""
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        known = ", ".join(f"{family.name} ({family.models})" for family in FAMILIES.values())
        raise UnsupportedModel(
            f"{where}: model_type is {name!r}; smolconv reads {known}.\n"
            "Check that this folder holds a checkpoint of one of them."
        )
    return FAMILIES[name]


def _in_nanotron() -> list[tuple[Family, NanotronClass]]:
    return [(family, family.nanotron) for family in FAMILIES.values() if isinstance(family.nanotron, NanotronClass)]


def is_nanotron_config(config: Mapping[str, Any]) -> bool:
    """Whether a model config is nanotron's rather than Hugging Face's, which names a model_type."""
    return "model_type" not in config and any(form.flag in config for _, form in _in_nanotron())


def family_of_nanotron_config(
    config: Mapping[str, Any], where: str, architecture: str | None
) -> tuple[Family, NanotronClass]:
    """The family by the config's class; ``architecture`` chooses if several families share it.

    Raises ``UnsupportedModel`` for other classes, and for a class that does not support ``architecture``.
    """
    flag = next((form.flag for _, form in _in_nanotron() if config.get(form.flag)), None)
    if flag is None:
        kinds = [key for key in config if key.startswith("is_") and key.endswith("_config")]
        known = [(family.models, form) for family, form in _in_nanotron() if form.assumed]
        raise UnsupportedModel(
            f"{where}: neither {' nor '.join(form.flag for _, form in known)} is set "
            f"(found {kinds or 'no such field'}).\nsmolconv reads nanotron's "
            f"{' and '.join(f'{form.title} ({models})' for models, form in known)} models."
        )
    held = [(family, form) for family, form in _in_nanotron() if form.flag == flag]
    for family, form in held:
        if family.name == architecture or (architecture is None and form.assumed):
            return family, form
    names = " or ".join(family.name for family, _ in held)
    raise UnsupportedModel(f"{where} sets {flag}, which holds {names}; --architecture is {architecture}.")


def nanotron_class(spec: ModelSpec) -> NanotronClass:
    """nanotron's class for the spec's family. Raises ``UnsupportedModel`` if there is none."""
    form = family_of(spec).nanotron
    if isinstance(form, str):
        raise UnsupportedModel(f"nanotron cannot hold this model: {form}.")
    return form
