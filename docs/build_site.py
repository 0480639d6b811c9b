"""Build the documentation as a site: ``make site``. Warnings, such as a link to a page that is not there, are errors.

Pages link to the README, to results of benchmarks and to other pages beside docs/, as they do on a Git host. The site
is built of a copy in which those pages lie beside the others.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
#: Pages from outside docs/, by the name that they get in the site.
BESIDE = {
    "README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md", "LICENSE": "LICENSE", "benchmarks/README.md": "benchmarks/README.md",
}  # fmt: skip
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)")


def _places() -> dict[Path, str]:
    """Every page and picture of the site: where it is in the repository, and its path in the site."""
    docs = REPOSITORY / "docs"
    found = {path: str(path.relative_to(docs)) for path in docs.rglob("*") if path.is_file() and path.suffix != ".py"}
    found |= {REPOSITORY / path: name for path, name in BESIDE.items()}
    results = (REPOSITORY / "benchmarks" / "results").glob("*.md")
    return found | {path: f"benchmarks/results/{path.name}" for path in results}


def _rewritten(page: Path, places: dict[Path, str]) -> str:
    """The page with links as they are in the site. What the site does not have becomes plain text."""
    here = Path(places[page]).parent

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.groups()
        target = places.get((page.parent / path).resolve())
        return text if target is None else f"[{text}]({'../' * len(here.parts)}{target}{anchor})"

    return _LINK.sub(link, page.read_text(encoding="utf-8"))


def build(target: Path) -> None:
    """Write the site into ``target``, which is replaced. Raises ``CalledProcessError`` for a warning."""
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        work, places = Path(folder), _places()
        for path, name in places.items():
            copy = work / "docs" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                copy.write_text(_rewritten(path, places), encoding="utf-8")
            else:
                shutil.copy(path, copy)
        (work / "mkdocs.yml").write_text(yaml.safe_dump({**settings, "site_dir": "site"}), encoding="utf-8")
        zensical = Path(sys.executable).with_name("zensical")
        subprocess.run([str(zensical), "build", "--strict", "-f", "mkdocs.yml"], cwd=work, check=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(work / "site", target)


if __name__ == "__main__":
    build(REPOSITORY / "site")
    print(REPOSITORY / "site" / "index.html")
