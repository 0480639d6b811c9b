"""Wheels for ``make gpu-check`` on a machine without a network: ``make gpu-wheels``.

That machine has Python, torch, triton, transformers, numpy and what these need; the folder brings the rest, built or
downloaded here for its Python and for Linux on x86-64. DeepSpeed is built without compiled operators, which training
does not use. smolconv itself is not in it: the check runs from the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import REPOSITORY

#: With what they need, in the versions of constraints.txt.
WITH_NEEDS = (
    "einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "pydantic", "pyyaml", "rich", "tqdm",
    "typer", "xxhash", "zlib-ng",
)  # fmt: skip
#: These need torch or transformers, which are there.
ALONE = ("accelerate", "liger-kernel==0.8.5")
BUILT = "deepspeed"
CHECKSUMS = "SHA256SUMS"
LIMIT_BYTES = 60_000_000
#: glibc 2.28 and earlier; pip matches each exactly.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def fetch(folder: Path, python: str) -> None:
    """Fill ``folder`` with wheels for ``python``, as "3.12". Raises ``CalledProcessError``."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    constraints = ["--constraint", str(REPOSITORY / "constraints.txt")]
    aimed = [
        "--only-binary=:all:", "--implementation", "cp", "--python-version", python,
        *(word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")),
    ]  # fmt: skip
    for names, more in ((WITH_NEEDS, []), (ALONE, ["--no-deps"])):
        subprocess.run([*pip, "download", "--quiet", *aimed, *more, *constraints, "-d", folder, *names], check=True)
    # Its setup imports torch, which an isolated build does not have.
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", *constraints, "-w", folder, BUILT],
        check=True, env={**os.environ, "DS_BUILD_OPS": "0"},
    )  # fmt: skip


def checked(folder: Path) -> Sequence[Path]:
    """The wheels of ``folder``, with their checksums written beside them in the format of sha256sum.

    Raises ``SystemExit`` for one that holds compiled DeepSpeed operators, for two of one package, and beyond the limit.
    """
    wheels = sorted(folder.glob("*.whl"))
    names = [wheel.name.partition("-")[0].lower() for wheel in wheels]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        sys.exit(f"{folder} has more than one wheel of {', '.join(twice)}; remove the folder and run it again.")
    if not any(wheel.name.startswith(f"{BUILT}-") and wheel.name.endswith("-py3-none-any.whl") for wheel in wheels):
        sys.exit(f"{folder} has no {BUILT} wheel without compiled operators (py3-none-any): {', '.join(names)}")
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > LIMIT_BYTES:
        sys.exit(f"{folder} has {size / 1e6:.1f} MB; {LIMIT_BYTES / 1e6:.0f} MB may be carried.")
    lines = [f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel.name}\n" for wheel in wheels]
    (folder / CHECKSUMS).write_text("".join(lines))
    return wheels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "gpu-wheels", help="replaced when all is there")
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    given = parser.parse_args()
    output: Path = given.output
    with tempfile.TemporaryDirectory(prefix=".gpu-wheels-", dir=output.absolute().parent) as work:
        made = Path(work) / output.name
        made.mkdir()
        try:
            fetch(made, given.python)
        except subprocess.CalledProcessError as error:
            sys.exit(f"pip, above, could not get all wheels (exit code {error.returncode}); {output} is as it was.")
        wheels = checked(made)
        if output.exists():
            if not (output / CHECKSUMS).is_file() and any(output.iterdir()):
                sys.exit(f"{output} holds something else: it has no {CHECKSUMS}. Name another --output, or remove it.")
            shutil.rmtree(output)
        made.rename(output)
    for wheel in wheels:
        print(f"{(output / wheel.name).stat().st_size / 1e6:8.2f} MB  {wheel.name}")
    print(f"{sum((output / wheel.name).stat().st_size for wheel in wheels) / 1e6:8.2f} MB  in {output}")


if __name__ == "__main__":
    main()
