"""The versions of DeepSpeed that smolconv's engines support.

A patch release changes what a file means. Up to 0.19.6 ZeRO's flat partitions have no padding between parameters
(``round_robin_bit16_padding``, partitions.py). 0.19.7 loads what smolconv writes; going on from what it saves then,
with a frozenset for ``sparse_tensor_module_names``, was not tried.
"""

from __future__ import annotations

import importlib.metadata

from smolconv.errors import NotInstalled

#: test_deepspeed_engine.py and test_training_resume.py pass with 0.19.8. pyproject.toml requires the same.
RANGE = ">=0.19.8,<0.19.9"


def check_deepspeed(wanting: str) -> None:
    """Raise ``NotInstalled`` unless a DeepSpeed of ``RANGE`` is there, which is not imported. ``wanting`` needs it."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise NotInstalled(f"{wanting} needs deepspeed: pip install 'deepspeed{RANGE}'.") from None
    from packaging.specifiers import SpecifierSet  # DeepSpeed needs it itself

    if not SpecifierSet(RANGE).contains(found, prereleases=True):
        raise NotInstalled(
            f"deepspeed {found} is installed, and {wanting} needs deepspeed{RANGE}: others lay ZeRO's partitions out "
            f"differently, or were not tried.\nInstall one that was: pip install 'deepspeed{RANGE}'."
        )
