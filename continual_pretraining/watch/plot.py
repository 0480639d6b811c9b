"""Plots one run or several as HTML, SVG, PNG or PDF. The HTML page has no scripts and loads nothing from outside."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.estimate.hardware import ASSUMED_MFU
from smolconv.continual_pretraining.watch.history import RunHistory, read_run
from smolconv.continual_pretraining.watch.panels import DARK, DRAWING, HEIGHT, WIDE, panels
from smolconv.errors import NotInstalled, UsageError
from smolconv.storage.atomic import appearing_whole
from smolconv.version import __version__

#: cairosvg's function for each suffix, with its arguments: a PNG has twice the resolution.
_WRITERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {".png": ("svg2png", {"scale": 2}), ".pdf": ("svg2pdf", {})}
SUFFIXES = (".html", ".svg", *_WRITERS)
_MOST_SECONDS = 1e12  #: the most that timedelta can show
#: Facts shown below an SVG; an HTML page shows all of them.
_SHORT = ("steps", "tokens", "last checkpoint", "loss", "time of steps")
_LEGEND = (
    "Up to 1,000 steps, every point is drawn; beyond that, the lowest and the highest of each bin. "
    "Bold: the mean over 1/50 of the run on either side."
)


def write_plot(folders: Sequence[Path], out: Path) -> None:
    """Draw the runs into ``out``, in the format of its suffix. The file appears only once it is complete."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: the suffix chooses the format: use {', '.join(SUFFIXES)}.")
    convert = _converter(out.suffix) if out.suffix in _WRITERS else None
    names = [os.path.basename(os.path.realpath(folder)) for folder in folders]
    alone = len(set(names)) == len(names)
    runs = [read_run(folder, name if alone else str(folder)) for folder, name in zip(folders, names)]
    drawn = render_html(runs) if out.suffix == ".html" else render_svg(runs, dark=convert is None)
    data = drawn.encode() if convert is None else convert(drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(out) as part:
        part.write_bytes(data)


def _converter(suffix: str) -> Callable[[str], bytes]:
    try:
        cairosvg = importlib.import_module("cairosvg")
    except (ImportError, OSError) as error:  # OSError: the package is installed, the cairo library is not
        raise NotInstalled(
            f"a {suffix} needs cairosvg, which cannot be imported: {str(error).partition(chr(10))[0]}\n"
            "Write .html or .svg, which need no package, or: pip install cairosvg"
        ) from None

    def write(svg: str) -> bytes:
        name, options = _WRITERS[suffix]
        found: bytes = getattr(cairosvg, name)(bytestring=svg.encode(), **options)
        return found

    return write


def render_html(runs: Sequence[RunHistory]) -> str:
    """A self-contained HTML page."""
    title = escape(", ".join(run.name for run in runs))
    figures = "\n".join(
        f'<div class="scroll{" wide" if panel.wide else ""}"><svg role=img aria-label="{escape(panel.title)}" '
        f'viewBox="0 0 {panel.width} {HEIGHT}">{panel.drawn}</svg></div>'
        for panel in panels(runs)
    )
    events = "".join(_events(run, named=len(runs) > 1) for run in runs)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<title>{title} · smolconv plot</title>\n'
        f"<style>{_PAGE}{DRAWING}{DARK}</style></head>\n"
        f"<body><main><h1>{title}</h1>{_facts_table(runs)}\n<div class=panels>{figures}</div>{events}"
        f"<p><small>smolconv {__version__}. {_LEGEND}</small></p></main></body></html>\n"
    )


def render_svg(runs: Sequence[RunHistory], *, dark: bool = True) -> str:
    """One SVG with all panels; ``dark``: follow the viewer's colour scheme."""
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
        f'<text x="20" y="{height - 20 * (len(runs) - i) + 4}">{escape(run.name)}: {escape(said)}</text>'
        for i, run in enumerate(runs)
        for said in [", ".join(f"{label} {value}" for label, value in _facts(run).items() if label in _SHORT)]
    )
    width = WIDE + 40
    title = escape(", ".join(run.name for run in runs))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif"><style>{DRAWING}{DARK if dark else ""}</style>'
        f'<rect class="page" width="{width}" height="{height}"/><text class="head" x="20" y="38">{title}</text>'
        f"{''.join(placed)}{facts}</svg>\n"
    )


def _facts(run: RunHistory) -> dict[str, str]:
    first, last = run.first.step, run.last.step
    recipe, of = run.recipe, "" if run.recipe is None else f" of {run.recipe.schedule.train_steps:,}"
    said = {"name": run.name}
    if recipe is not None:
        said |= {"recipe": recipe.name, "source": recipe.model.source}
    said["steps"] = f"{f'{first:,} to ' * (first < last)}{last:,}{of}"
    if run.last.tokens is not None:
        said["tokens"] = f"{run.last.tokens:,}"
    if by := [event.by for kind in ("started", "resumed") for event in run.events[kind] if event.by]:
        said["trained by"] = by[-1]
    if saved := run.events["saved"]:
        said["last checkpoint"] = f"step {saved[-1].step:,}{_when(saved[-1].time)}"
    if means := run.curves["loss"].means():
        said["loss"] = f"{means[0].value:.4f} to {means[-1].value:.4f}"
    for name, curve in run.evaluations.items():
        said[f"evaluation: {name}"] = f"{curve.means()[0].value:.4f} to {curve.means()[-1].value:.4f}"
    if speeds := run.curves["tokens_per_second"].means():
        expected = run.expected["tokens_per_second"].means()
        beside = f"; {expected[-1].value:,.0f} estimated for an MFU of {ASSUMED_MFU:.0%}" if expected else ""
        said["tokens/s"] = f"{speeds[-1].value:,.0f}{beside}"
    return said | {"time of steps": str(timedelta(seconds=round(min(run.seconds, _MOST_SECONDS))))}


def _facts_table(runs: Sequence[RunHistory]) -> str:
    """A table with a column for each run."""
    facts = [_facts(run) for run in runs]
    rows = []
    for label in dict.fromkeys(label for each in facts for label in each):
        cells = "".join(f"<td>{escape(each.get(label, ''))}</td>" for each in facts)
        rows.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    return f"<section class=facts><table>{''.join(rows)}</table></section>"


def _events(run: RunHistory, *, named: bool) -> str:
    kept = sorted((event for each in run.events.values() for event in each), key=lambda event: event.step)
    if not kept:
        return ""
    rows = "".join(
        f"<tr><td>{event.step:,}</td><td>{_when(event.time)}</td><td>{escape(event.kind)}</td>"
        f"<td>{escape(event.text)}</td></tr>"
        for event in kept
    )
    left = f"<p><small>{run.event_count - len(kept):,} earlier events are in events.jsonl.</small></p>"
    return (
        f"<section><h2>Events{f' of {escape(run.name)}' * named}</h2>{left * (run.event_count > len(kept))}"
        f"<div class=events><table><tr><th>step</th><th>time (UTC)</th><th>kind</th><th></th></tr>{rows}</table></div>"
        "</section>"
    )


def _when(time: str | None) -> str:
    return "" if time is None else f" {time[:19].replace('T', ' ')}"


_PAGE = """
*{box-sizing:border-box}body{margin:0;background:#f6f7f9;color:#1b2230;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1220px;margin:0 auto;padding:18px 16px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 6px}small,th{color:#5c667a}
table{border-collapse:collapse}th,td{text-align:left;vertical-align:top;padding:1px 16px 1px 0;overflow-wrap:anywhere}
th{font-weight:600;white-space:nowrap}.facts{margin:8px 0 14px}.events{max-height:420px;overflow:auto}
.panels{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.scroll,section{background:#fff;border:1px solid #dfe3ea;border-radius:10px;padding:14px;overflow-x:auto;min-width:0}
.wide{grid-column:1/-1}.panels svg{display:block;width:100%;min-width:440px}.wide svg{min-width:820px}
section{margin-top:14px}
@media(max-width:900px){.panels{grid-template-columns:1fr}.panels>*{grid-column:1}}
@media(prefers-color-scheme:dark){body{background:#12151b;color:#e7eaf0}.scroll,section{background:#1b2029;
border-color:#323a48}small,th{color:#9aa4b6}}
@media print{.scroll,section{break-inside:avoid}.events{max-height:none}}
"""
