"""A picture of one run or several: a page, an SVG, or a PNG. A page has no scripts and refers to nothing outside."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path

from smolconv import __version__
from smolconv.continual_pretraining.watch.history import RunHistory, read_run
from smolconv.continual_pretraining.watch.panels import DARK, DRAWING, HEIGHT, MOST_MARKS, WIDE, panels
from smolconv.errors import NotInstalled, UsageError
from smolconv.storage.atomic import appearing_whole

SUFFIXES = (".html", ".svg", ".png")
_MOST_SECONDS = 1e12  #: that Python can say as days
_LEGEND = (
    "Every point is drawn up to 1,000 steps; beyond, the lowest and the highest of each bin. "
    "Bold: the mean of a fiftieth of the run to either side."
)


def write_plot(folders: Sequence[Path], out: Path) -> None:
    """Draw the runs into ``out``, by its suffix. It appears whole, or not at all."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: a picture is written as {', '.join(SUFFIXES)}, by the suffix of its name.")
    to_png = _png_writer() if out.suffix == ".png" else None
    names = [os.path.basename(os.path.realpath(folder)) for folder in folders]
    alone = len(set(names)) == len(names)
    runs = [read_run(folder, name if alone else str(folder)) for folder, name in zip(folders, names)]
    drawn = render_html(runs) if out.suffix == ".html" else render_svg(runs, dark=to_png is None)
    data = drawn.encode() if to_png is None else to_png(drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(out) as part:
        part.write_bytes(data)


def _png_writer() -> Callable[[str], bytes]:
    try:
        cairosvg = importlib.import_module("cairosvg")
    except (ImportError, OSError) as error:  # OSError: the package is there, the cairo library is not
        raise NotInstalled(
            f"a .png is drawn by cairosvg, which cannot be used here: {str(error).partition(chr(10))[0]}\n"
            "Write .html or .svg, which need nothing, or: pip install cairosvg"
        ) from None

    def write(svg: str) -> bytes:
        found: bytes = cairosvg.svg2png(bytestring=svg.encode(), scale=2)
        return found

    return write


def render_html(runs: Sequence[RunHistory]) -> str:
    """One page that needs nothing else."""
    title = escape(", ".join(run.name for run in runs))
    figures = "\n".join(
        f'<div class="scroll{" wide" if panel.wide else ""}"><svg role=img aria-label="{escape(panel.title)}" '
        f'viewBox="0 0 {panel.width} {HEIGHT}">{panel.drawn}</svg></div>'
        for panel in panels(runs)
    )
    facts = "".join(f"<li><b>{escape(run.name)}</b> {escape(_facts(run))}</li>" for run in runs)
    notes = "".join(f"<li>{escape(note)}</li>" for run in runs for note in _notes(run, many=len(runs) > 1))
    said = f"<section><h2>Events</h2><ul>{notes}</ul></section>" if notes else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<title>{title} · smolconv plot</title>\n'
        f"<style>{_PAGE}{DRAWING}{DARK}</style></head>\n"
        f"<body><main><h1>{title}</h1><ul class=facts>{facts}</ul>\n<div class=panels>{figures}</div>{said}"
        f"<p><small>smolconv {__version__}. {_LEGEND}</small></p></main></body></html>\n"
    )


def render_svg(runs: Sequence[RunHistory], *, dark: bool = True) -> str:
    """The panels below each other; ``dark`` follows the viewer's colours."""
    placed, x, y = [], 0, 60
    for panel in panels(runs):
        if panel.wide and x:
            x, y = 0, y + HEIGHT + 20
        placed.append(f'<g transform="translate({20 + x} {y})">{panel.drawn}</g>')
        x += panel.width + 20
        if x >= WIDE:
            x, y = 0, y + HEIGHT + 20
    height = y + (HEIGHT + 20 if x else 0) + 20 * len(runs)
    facts = "".join(
        f'<text x="20" y="{height - 20 * (len(runs) - i) + 4}">{escape(run.name)}: {escape(_facts(run))}</text>'
        for i, run in enumerate(runs)
    )
    width = WIDE + 40
    title = escape(", ".join(run.name for run in runs))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif"><style>{DRAWING}{DARK if dark else ""}</style>'
        f'<rect class="page" width="{width}" height="{height}"/><text class="head" x="20" y="38">{title}</text>'
        f"{''.join(placed)}{facts}</svg>\n"
    )


def _facts(run: RunHistory) -> str:
    first, last = run.first.step, run.last.step
    said = [f"steps {first:,} to {last:,}" if first < last else f"step {last:,}"]
    if means := run.curves["loss"].means():
        said.append(f"loss {means[0].value:.4f} to {means[-1].value:.4f}")
    if run.last.tokens is not None:
        said.append(f"{run.last.tokens:,} tokens")
    for name, curve in run.evaluations.items():
        said.append(f"{name} {curve.means()[-1].value:.4f}")
    return ", ".join([*said, f"{timedelta(seconds=round(min(run.seconds, _MOST_SECONDS)))} of training"])


def _notes(run: RunHistory, *, many: bool) -> list[str]:
    marks = sorted(mark for each in run.marks.values() for mark in each)
    said = [f"{f'{run.name}, ' * many}step {step:,}: {text}" for step, text in marks[:MOST_MARKS]]
    return said + [f"and {len(marks) - MOST_MARKS:,} more in events.jsonl"] * (len(marks) > MOST_MARKS)


_PAGE = """
*{box-sizing:border-box}body{margin:0;background:#f6f7f9;color:#1b2230;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1220px;margin:0 auto;padding:18px 16px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 6px}small,.facts{color:#5c667a}
.facts{list-style:none;padding:0;margin:2px 0 12px;overflow-wrap:anywhere}
.panels{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.scroll,section{background:#fff;border:1px solid #dfe3ea;border-radius:10px;padding:14px;overflow-x:auto;min-width:0}
.wide{grid-column:1/-1}.panels svg{display:block;width:100%;min-width:440px}.wide svg{min-width:820px}
section{margin-top:14px}ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
@media(max-width:900px){.panels{grid-template-columns:1fr}.panels>*{grid-column:1}}
@media(prefers-color-scheme:dark){body{background:#12151b;color:#e7eaf0}.scroll,section{background:#1b2029;
border-color:#323a48}small,.facts{color:#9aa4b6}}
@media print{.scroll,section{break-inside:avoid}}
"""
