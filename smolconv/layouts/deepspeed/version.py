"""The versions of DeepSpeed that smolconv's engines support.

A patch release can change the meaning of a file. Up to 0.19.6 ZeRO's flat partitions have no padding between parameters
(``round_robin_bit16_padding``, partitions.py). 0.19.7 loads what smolconv writes; resuming from its own saves,
which have a frozenset for ``sparse_tensor_module_names``, was not tested.
"""

from __future__ import annotations

import importlib.metadata

from smolconv.errors import NotInstalled

#: test_deepspeed_engine.py and test_training_resume.py pass with 0.19.8. pyproject.toml requires the same.
RANGE = ">=0.19.8,<0.19.9"


def check_deepspeed(wanting: str) -> None:
    """Raise ``NotInstalled`` unless DeepSpeed in ``RANGE`` is installed, without importing it. ``wanting`` needs it."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise NotInstalled(f"{wanting} needs deepspeed: pip install 'deepspeed{RANGE}'.") from None
    from packaging.specifiers import SpecifierSet  # DeepSpeed needs it itself

    if not SpecifierSet(RANGE).contains(found, prereleases=True):
        raise NotInstalled(
            f"deepspeed {found} is installed, and {wanting} needs deepspeed{RANGE}: other versions lay ZeRO's "
            f"partitions out differently, or were not tested.\nInstall: pip install 'deepspeed{RANGE}'."
        )
