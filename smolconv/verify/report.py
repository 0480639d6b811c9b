"""A report of ``verify`` as one HTML page that needs nothing else: no scripts, fonts or images; for screen and paper.

Plots stretch without a script: what lies across is given in percent of the width, what stands upright in pixels.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from importlib import metadata
from typing import Any

from smolconv import __version__

#: A plot over positions draws no more columns than this; each shows the largest value of its bin.
_MOST_COLUMNS = 600
#: Lists of names and differences show this many, the rest when unfolded.
_MOST_LINES = 8
_HEIGHT = 190.0  # of a plot, in pixels
_ROW = 20.0  # what a plot's rows for 0 and for values that are not finite take of that

_GATES = {
    "max_abs": "largest difference of a logit",
    "kl": "mean KL(A ‖ B), nats",
    "top1": "share of equal first choices",
    "nll": "difference of mean NLL, nats per token",
    "flips": "share of clear first choices that change",
    "documents": "largest difference of a packed document from itself alone",
}
_SHARES = ("top1", "flips")
_METRICS = {
    "max_abs": "largest difference of a logit",
    "mean_abs": "mean difference of a logit",
    "kl_mean": "KL(A ‖ B), mean, nats",
    "kl_p99": "KL(A ‖ B), 99th percentile, nats",
    "top1_agreement": "share of equal first choices",
}


def render_html(document: Mapping[str, Any], *, a: str, b: str) -> str:
    """The page for ``VerifyReport.to_json()``; ``a`` and ``b`` are what the user called the two checkpoints."""
    logits = document["logits"]
    sections = [_verdict(document), _compared(logits, a, b), _lines("Spec differences", document["spec_differences"])]
    if logits is not None:
        sections.append(_gates(document["gates"]))
    sections.append(_tensors(document))
    if logits is not None:
        sections += [_layer_plot(document), _position_plots(logits["by_position"]), _metrics(logits)]
    body = "\n".join(filter(None, [*sections, _layer_list(document["layers"])]))
    word = "PASS" if document["passed"] else "FAIL"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<title>{word}: {escape(a)} and {escape(b)} · smolconv verify</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


# --- what is said in words -------------------------------------------------------------------------------------------


def _verdict(document: Mapping[str, Any]) -> str:
    passed, where = document["passed"], document["first_divergence"]
    place = f"<p>First divergence: <code>{_breakable(where)}</code></p>" if where else ""
    tiers = "".join(
        f'<li class="{_STATES[state][0]}"><b>{_STATES[state][1]} {name}</b><span>{escape(said)}</span></li>'
        for name, state, said in _tiers(document)
    )
    return (
        f'<header class="{"good" if passed else "bad"}"><h1>{"PASS" if passed else "FAIL"}</h1><div>'
        f"<p class=reason>{'The same model' if passed else 'Not the same model'}: {_breakable(document['reason'])}</p>"
        f"{place}</div></header>\n<ul class=tiers>{tiers}</ul>"
    )


_STATES = {True: ("good", "✓"), False: ("bad", "✗"), None: ("none", "&ndash;")}


def _tiers(document: Mapping[str, Any]) -> list[tuple[str, bool | None, str]]:
    """Name, whether it passed (None: not compared), and what was found."""
    spec, tensors, optimizer = document["spec_differences"], document["tensors"], document["optimizer"]
    logits, gates = document["logits"], document["gates"]
    tiers: list[tuple[str, bool | None, str]] = [
        ("Spec", not spec, f"{len(spec)} {_plural(len(spec), 'field')} differ" if spec else "every field equal"),
        ("Tensors", _tensors_pass(tensors), f"{tensors['equal']} of {tensors['compared']} equal bit for bit"),
    ]
    if optimizer is None:
        tiers.append(("Optimizer", None, "not compared"))
    else:
        slots, found = optimizer["slots"], optimizer["differences"]
        said = "; ".join(f"{slot} {each['equal']} of {each['compared']}" for slot, each in slots.items())
        if found:
            said += f"{'; ' * bool(said)}{len(found)} {_plural(len(found), 'difference')} of state"
        passed = all(map(_tensors_pass, slots.values())) and not found
        tiers.append(("Optimizer", passed, said or "none on either side"))
    if logits is None:
        tiers.append(("Logits", None, "not compared"))
    else:
        said = f"max abs {_number(logits['max_abs'])}, floor {_number(logits['noise_floor']['max_abs'])}"
        tiers.append(("Logits", all(gate["passed"] for gate in gates.values()), said))
    return tiers


def _tensors_pass(tensors: Mapping[str, Any]) -> bool:
    return tensors["equal"] == tensors["compared"] and not tensors["missing"] and not tensors["unexpected"]


def _compared(logits: Mapping[str, Any] | None, a: str, b: str) -> str:
    packages = ("torch", "transformers")
    made = [f"smolconv {__version__}", f"Python {platform.python_version()}", *filter(None, map(_version, packages))]
    facts = {"A": a, "B": b}
    if logits is not None:
        one, other = logits["forwards"]
        packed = f", {logits['documents']} documents packed into the row" if logits["documents"] > 1 else ""
        facts |= {
            "Forward of A": one,
            "Forward of B": other,
            "Tokens": f"{logits['positions']:,} positions of {logits['tokens_from']}{packed}",
            "Computed in": logits["compute"],
        }
    facts["Made"] = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC with {', '.join(made)}"
    rows = "".join(f"<div><dt>{name}</dt><dd>{_breakable(fact)}</dd></div>" for name, fact in facts.items())
    return f"<section><h2>What was compared</h2><dl>{rows}</dl></section>"


def _version(package: str) -> str | None:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return None


def _lines(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = [f"<li>{_breakable(line)}</li>" for line in lines]
    rest = items[_MOST_LINES:]
    more = f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    return f"<section><h2>{title} ({len(lines)})</h2><ul>{''.join(items[:_MOST_LINES])}</ul>{more}</section>"


def _gates(gates: Mapping[str, Mapping[str, Any]]) -> str:
    ratios = [abs(math.log10(r)) for gate in gates.values() if (r := _ratio(gate))]
    decades = min(8, max(1, math.ceil(max(ratios, default=1))))
    rows = [
        (
            _mark(gate["passed"]), f"<b>{escape(name)}</b> <small>{_GATES.get(name, '')}</small>",
            _number(gate["value"]), f"{'≥' if name == 'top1' else '≤'} {_number(gate['limit'])}",
            _bar(name, gate, decades),
        )
        for name, gate in gates.items()
    ]  # fmt: skip
    table = _table(("", "gate", "value", "limit", "value beside its limit"), rows)
    scale = (
        f"The upright line is the limit, {decades} {_plural(decades, 'decade')} to either side; shares lie from 0 to 1."
    )
    return f"<section><h2>Gates</h2>{table}<p><small>{scale}</small></p></section>"


def _ratio(gate: Mapping[str, Any]) -> float | None:
    value, limit = gate["value"], gate["limit"]
    return value / limit if value is not None and limit is not None and value > 0 and limit > 0 else None


def _bar(name: str, gate: Mapping[str, Any], decades: int) -> str:
    """Shares lie between 0 and 1; anything else on a log scale with its limit in the middle."""
    value, limit, ratio = gate["value"], gate["limit"], _ratio(gate)
    if limit is None or (name not in _SHARES and limit <= 0):
        return "&ndash;"
    if value is None:
        width, said = 100.0, "not finite"
    elif name in _SHARES:
        width, said = 100 * value, f"{100 * value:.4g} %"
    else:
        width = 50 + 50 * math.log10(ratio) / decades if ratio else 0.0
        times = f"{float(f'{ratio:.3g}'):,.10g} &times; limit" if ratio else "0"
        said = f"{100 * ratio:.2g} % of limit" if ratio and ratio <= 1 else times
    at = 100 * limit if name in _SHARES else 50
    css = "good" if gate["passed"] else "bad"
    return (
        f'<span class=bar><i class={css} style="width:{min(max(width, 0), 100):.1f}%"></i>'
        f'<u style="left:{min(max(at, 0), 99.5):.1f}%"></u></span> <small class=wrap>{said}</small>'
    )


def _metrics(logits: Mapping[str, Any]) -> str:
    floor = logits["noise_floor"]
    rows = [(said, _number(logits[name]), _number(floor[name])) for name, said in _METRICS.items()]
    one, other = logits["nll_a"], logits["nll_b"]
    apart = None if one is None or other is None else other - one
    nll = f"<div class=wrap>A {_number(one, 6)}, B {_number(other, 6)}, B &minus; A {_number(apart)}</div>"
    rows.append(("NLL of the next token, mean, nats", nll, ""))
    note = "The noise floor is how far A lies from itself when sdpa is exchanged for eager attention."
    table = _table(("", "B against A", "noise floor"), rows)
    return f"<section><h2>Logits over all positions</h2>{table}<p><small>{note}</small></p></section>"


def _tensors(document: Mapping[str, Any]) -> str:
    optimizer = document["optimizer"] or {"slots": {}, "differences": []}
    found = {"parameters": document["tensors"], **optimizer["slots"]}
    rows = []
    for name, each in found.items():
        by = "not finite, or another shape" if each["max_abs"] is None else f"by {each['max_abs']:.3g}"
        worst = f"<div class=wrap>{_breakable(each['worst'])} {by}</div>" if each["worst"] else "&ndash;"
        counts = (each["compared"], each["equal"], len(each["missing"]), len(each["unexpected"]))
        rows.append((_mark(_tensors_pass(each)), escape(name), *(f"{count:,}" for count in counts), worst))
    head = ("", "slot", "compared", "equal", "in A only", "in B only", "worst")
    lists = [
        _lines(f"{title}, {escape(name)}", each[side])
        for name, each in found.items()
        for title, side in (("In A only", "missing"), ("In B only", "unexpected"))
    ]
    lists.append(_lines("Optimizer state differences", optimizer["differences"]))
    return f"<section><h2>Tensors, bit for bit</h2>{_table(head, rows)}</section>{''.join(lists)}"


def _layer_list(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return ""
    rows = [
        (_mark(not each["diverged"]), f"<div class=wrap>{_breakable(each['module'])}</div>",
         *(_number(each[key]) if key in each else "&ndash;" for key in ("max_abs", "floor", "limit", "scale")))
        for each in layers
    ]  # fmt: skip
    table = _table(("", "module", "max abs", "noise floor", "limit", "std of A"), rows)
    return f"<section><details><summary>All {len(layers)} modules in forward order</summary>{table}</details></section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of HTML. On narrow screens the columns scroll inside."""
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _mark(passed: bool) -> str:
    css, sign = _STATES[passed]
    return f'<b class={css} title="{"passes" if passed else "fails"}">{sign}</b>'


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _breakable(text: str) -> str:
    """Escaped, and allowed to wrap inside dotted names and paths."""
    return re.sub(r"([./_])(?=\w)", r"\1<wbr>", escape(text))


# --- plots -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Series:
    """One line of a plot. None is a gap, or on an axis with a row for it a value that is not finite."""

    title: str
    css: str
    values: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Upright: linear, or decades with a row for 0 below them and one for what is not finite above."""

    low: float  #: log10 of the value when ``log``
    high: float
    log: bool = True
    zero: bool = False
    broken: bool = False

    @classmethod
    def over(cls, values: Iterable[float | None], *, log: bool = True, broken: bool = False) -> _Axis:
        known = list(values)
        finite = [value for value in known if value is not None]
        if not log:
            low, high = min(finite, default=0.0), max(finite, default=1.0)
            return cls(low=min(low, 0.0), high=high if high > min(low, 0.0) else 1.0, log=False)
        positive = [math.log10(value) for value in finite if value > 0] or [-8.0, -7.0]
        low, high = math.floor(min(positive)), math.ceil(max(positive))
        zero = any(value <= 0 for value in finite)
        return cls(low=low, high=max(high, low + 1), zero=zero, broken=broken and None in known)

    def y(self, value: float | None) -> float:
        """Pixels from the top."""
        if value is None:
            return 0.0
        if self.log and value <= 0:
            return _HEIGHT
        return self._at(math.log10(value) if self.log else value)

    def _at(self, position: float) -> float:
        top, bottom = _ROW * self.broken, _HEIGHT - _ROW * self.zero
        return bottom - (bottom - top) * (position - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels from the top, and what stands there."""
        step = float(math.ceil((self.high - self.low) / 6))
        if not self.log:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = unit * next(times for times in (1, 2, 5, 10) if unit * times >= rough)
        first = math.ceil(self.low / step)
        marks = [step * (first + i) for i in range(math.floor(self.high / step) - first + 1)]
        shown = [(self._at(m), f"10{str(round(m)).translate(_RAISED)}" if self.log else f"{m:g}") for m in marks]
        return shown + [(_HEIGHT, "0")] * self.zero + [(0.0, "∞, NaN")] * self.broken


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _plot(
    title: str, note: str, axis: _Axis, series: Sequence[_Series], ticks: Iterable[tuple[float, str]], across: str,
    *, over: str = "", under: str = "", legend: str = "",
) -> str:  # fmt: skip
    """A figure. ``ticks`` are percents and labels below; ``under`` and ``over`` are SVG below and above the lines."""
    grid = "".join(
        f'<line class=grid x1=0 x2="100%" y1={y:.1f} y2={y:.1f} />'
        f"<text x=-8 y={y + 4:.1f} text-anchor=end>{label}</text>"
        for y, label in axis.ticks()
    )
    grid += "".join(f'<text x="{x:.2f}%" y={_HEIGHT + 18} text-anchor=middle>{label}</text>' for x, label in ticks)
    lines = "".join(f'<path class="{each.css}" d="{_path(each.values, axis)}"/>' for each in series)
    keys = "".join(f'<span><i class="{each.css}"></i>{each.title}</span>' for each in series) + legend
    return (
        f"<figure><figcaption><b>{title}</b> <small>{note}</small><div class=legend>{keys}</div></figcaption>\n"
        f'<svg role=img aria-label="{title}" width="100%" height={_HEIGHT:.0f}>{under}{grid}<svg width="100%" '
        f'height={_HEIGHT:.0f} viewBox="0 0 1000 {_HEIGHT:.0f}" preserveAspectRatio=none>{lines}</svg>{over}'
        f"</svg><div class=across>{across}</div></figure>"
    )


def _path(values: Sequence[float | None], axis: _Axis) -> str:
    """Straight lines between the middles of columns; a lone point is a line of no length, which its round ends show."""
    said, pen = [], "M"
    for i, value in enumerate(values):
        if value is None and not axis.broken:
            pen = "M"
            continue
        said.append(f"{pen}{1000 * (i + 0.5) / len(values):.1f} {axis.y(value):.1f}{'h0' if pen == 'M' else ''}")
        pen = "L"
    return "".join(said)


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _layer_plot(document: Mapping[str, Any]) -> str:
    layers = document["layers"]
    if not layers:
        return ""
    count = len(layers)
    limits = [each["limit"] for each in layers if "limit" in each]
    series = [_Series(title="noise floor (sdpa against eager)", css="floor", values=[each["floor"] for each in layers])]
    if len(limits) == count:
        series.append(_Series(title="limit of divergence", css="limit", values=limits))
    found = [each["max_abs"] for each in layers]
    axis = _Axis.over([value for each in series for value in each.values] + found, broken=True)
    points = "".join(
        f'<circle class={"bad" if each["diverged"] else "good"} cx="{100 * (i + 0.5) / count:.2f}%" '
        f"cy={axis.y(each['max_abs']):.1f} r=3.2><title>{escape(each['module'])}: {_number(each['max_abs'])}, "
        f"noise floor {_number(each['floor'])}</title></circle>"
        for i, each in enumerate(layers)
    )
    starts: dict[int, list[int]] = {}
    for i, each in enumerate(layers):
        if match := _LAYER.match(each["module"]):
            starts.setdefault(int(match[1]), []).append(i)
    bands = "".join(
        f'<rect class=band x="{100 * spread[0] / count:.2f}%" width="{100 * len(spread) / count:.2f}%" height="100%"/>'
        for layer, spread in starts.items() if layer % 2 == 0
    )  # fmt: skip
    every = max(1, math.ceil(len(starts) / 10))
    ticks = [(100 * (s[0] + len(s) / 2) / count, str(layer)) for layer, s in starts.items() if layer % every == 0]
    dots = "<span><i class=dot></i>B against A</span>"
    if any(each["diverged"] for each in layers):
        dots += "<span><i class='dot bad'></i>beyond the limit</span>"
    under, over = _marker(document["first_divergence"], [each["module"] for each in layers])
    figure = _plot(
        "Difference by module", "largest |A &minus; B| of what each module computes, in forward order, log scale",
        axis, series, ticks, "layer; embedding before, final norm after", under=bands + under, over=points + over,
        legend=dots,
    )  # fmt: skip
    return f"<section><h2>By layer</h2>{figure}</section>"


def _marker(module: str | None, modules: Sequence[str]) -> tuple[str, str]:
    """The first divergence: a band over what the module and its parts compute, and its name above the plot."""
    parts = [i for i, name in enumerate(modules) if f"{name}.".startswith(f"{module}.")]
    if module is None or (not parts and module != "lm_head"):
        return "", ""
    left, right = (100 * parts[0] / len(modules), 100 * (parts[-1] + 1) / len(modules)) if parts else (99.7, 100.0)
    x = (left + right) / 2
    anchor = "start" if x < 30 else "end" if x > 70 else "middle"
    name = escape(module.removeprefix("model."))
    return (
        f'<rect class=first x="{left:.2f}%" width="{right - left:.2f}%" height="100%"/>',
        f'<text class=first x="{x:.2f}%" y=-8 text-anchor={anchor}>first divergence: {name}</text>',
    )


def _position_plots(found: Mapping[str, Sequence[float | None]]) -> str:
    count = len(found["max_abs"])
    if not count:
        return ""
    size = math.ceil(count / _MOST_COLUMNS)
    apart = [None if x is None or y is None else abs(y - x) for x, y in zip(found["nll_a"], found["nll_b"])]
    over_a, over_b = (_binned(found[name], size) for name in ("nll_a", "nll_b"))
    plots = [
        ("Logits", "largest |A &minus; B| at each position, log scale", True, [
            _Series(title="noise floor", css="floor", values=_binned(found["floor"], size, strict=True)),
            _Series(title="B against A", css="b", values=_binned(found["max_abs"], size, strict=True))]),
        ("KL(A ‖ B)", "nats, log scale", True, [
            _Series(title="KL", css="b", values=_binned(found["kl"], size, strict=True))]),
        ("NLL of the next token", "nats", False, [
            _Series(title="A", css="a", values=over_a), _Series(title="B", css="b thin", values=over_b)]),
        ("|NLL of B &minus; NLL of A|", "nats, log scale", False, [
            _Series(title="difference", css="b", values=_binned(apart, size))]),
    ]  # fmt: skip
    marks = [i * step for step in (_round_step(count),) for i in range(math.ceil(count / step))]
    columns = len(over_a)
    ticks = [(100 * (mark / size + 0.5) / columns, f"{mark:,}") for mark in marks]
    figures, notes = [], [f"Each point is the largest value among {size} positions."] * (size > 1)
    for title, note, broken, series in plots:
        values = [value for each in series for value in each.values]
        if any((value is None and broken) or value for value in values):
            axis = _Axis.over(values, log="log" in note, broken=broken)
            figures.append(_plot(title, note, axis, series, ticks, "position", over=_columns(series, size, count)))
        else:
            found_none = all(value is None for value in values)
            notes.append(f"{title} is {'not finite, or has no target,' if found_none else '0'} at every position.")
    said = f"<p><small>{' '.join(notes)}</small></p>" if notes else ""
    return f"<section><h2>By position</h2>{said}<div class=plots>{''.join(figures)}</div></section>"


def _binned(values: Sequence[float | None], size: int, *, strict: bool = False) -> list[float | None]:
    """The largest of each ``size`` values. None counts as larger than any when ``strict``, else it is left out."""
    bins = [values[i : i + size] for i in range(0, len(values), size)]
    return [
        None if strict and None in each else max((value for value in each if value is not None), default=None)
        for each in bins
    ]


def _round_step(count: int) -> int:
    """1, 2 or 5 times a power of ten, so that five or fewer ticks lie over ``count`` positions."""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return next(unit * times for times in (1, 2, 5, 10, 20) if count <= 5 * times * unit)


def _columns(series: Sequence[_Series], size: int, count: int) -> str:
    """Invisible columns that say their values when pointed at."""
    columns = len(series[0].values)
    said = []
    for i in range(columns):
        last = min(count, (i + 1) * size) - 1
        where = f"position {i * size}" + (f" to {last}" if last > i * size else "")
        values = ", ".join(f"{each.title} {_number(each.values[i])}" for each in series)
        box = f'x="{100 * i / columns:.2f}%" width="{100 / columns:.2f}%" height="100%"'
        said.append(f"<rect class=hit {box}><title>{where}: {values}</title></rect>")
    return "".join(said)


_STYLE = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1b2230;--soft:#5c667a;--line:#dfe3ea;--good:#187a43;--goodbg:#e3f4ea;
--bad:#c0262d;--badbg:#fdeaea;--a:#8a93a6;--b:#2463d6;--limit:#c77700;--band:#f0f3f7}
@media(prefers-color-scheme:dark){:root{--page:#12151b;--card:#1b2029;--ink:#e7eaf0;--soft:#9aa4b6;--line:#323a48;
--good:#56c98a;--goodbg:#14301f;--bad:#ff7d7d;--badbg:#3a191c;--a:#8f9ab0;--b:#7aa8ff;--limit:#f0ab3c;--band:#222936}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--good:#187a43;--goodbg:#e3f4ea;
--bad:#c0262d;--badbg:#fdeaea;--a:#777;--b:#2463d6;--limit:#c77700;
--band:#f2f2f2}figure,tr,header,.tiers{break-inside:avoid}}
*{box-sizing:border-box;print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 40px}code,dd,.wrap,.reason{overflow-wrap:anywhere}
section,header,.tiers li{background:var(--card);border:1px solid var(--line);border-radius:10px}
section{padding:14px 18px 16px;margin-top:14px}h2{font-size:16px;margin:0 0 8px}
small{color:var(--soft);font-size:13px}p{margin:4px 0}
header{display:flex;gap:4px 22px;align-items:center;flex-wrap:wrap;padding:14px 20px;border-width:0 0 0 8px}
header>div{flex:1 1 260px;min-width:0}h1{margin:0;font-size:40px;line-height:1.2;letter-spacing:.04em}
.reason{font-size:17px}header.good{background:var(--goodbg);border-color:var(--good)}
header.bad{background:var(--badbg);border-color:var(--bad)}.good>h1,b.good,.tiers .good b{color:var(--good)}
.bad>h1,b.bad,.tiers .bad b{color:var(--bad)}b.good,b.bad{white-space:nowrap}
.tiers{list-style:none;display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:10px;padding:0;
margin:12px 0 0}.tiers li{padding:8px 14px}.tiers li b,.tiers li span{display:block}
.tiers span{color:var(--soft);font-size:13px}section>ul,details ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:600}dl{margin:0}dl div{display:flex;flex-wrap:wrap;gap:0 12px;padding:2px 0}
dt{flex:0 0 120px;color:var(--soft)}dd{flex:1 1 200px;margin:0}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;font-size:13px;color:var(--soft)}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--line)}td{white-space:nowrap}
.wrap,td small{white-space:normal}.wrap{min-width:110px}.bar+small{display:inline-block;margin-left:6px}
tbody tr:last-child td{border-bottom:0}
.bar{display:inline-block;position:relative;width:clamp(90px,16vw,180px);height:12px;background:var(--band);
border-radius:3px;vertical-align:-1px}.bar i{position:absolute;inset:0 auto 0 0;border-radius:3px}
.bar u{position:absolute;top:-3px;bottom:-3px;width:2px;background:var(--ink)}i.good{background:var(--good)}
i.bad{background:var(--bad)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px 30px}
figure{margin:0;padding:0 12px 0 56px;overflow:hidden;min-width:0}figcaption{margin:0 0 28px -56px}
svg{display:block;overflow:visible}.plots figcaption{margin-bottom:12px}
.across{text-align:center;color:var(--soft);font-size:12px;margin-top:22px}
.legend{display:flex;flex-wrap:wrap;gap:0 16px;font-size:13px;color:var(--soft)}
.legend i{display:inline-block;width:18px;border-top:2.5px solid;margin-right:6px;vertical-align:4px}
.legend i.dot{width:9px;height:9px;border:0;border-radius:50%;background:var(--b);vertical-align:0}
.legend i.dot.bad{background:var(--bad)}.legend i.limit{border-top-style:dashed}i.floor,i.a{color:var(--a)}
i.b{color:var(--b)}i.limit{color:var(--limit)}text{fill:var(--soft);font-size:12px}.grid{stroke:var(--line)}
.band{fill:var(--band)}.hit{fill:transparent}.hit:hover{fill:#8886}
path{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}
path.floor,path.a{stroke:var(--a)}path.b{stroke:var(--b)}path.limit{stroke:var(--limit);stroke-dasharray:6 4}
path.a{stroke-width:3.5}path.thin{stroke-width:1.2}circle.good{fill:var(--b)}circle.bad{fill:var(--bad)}
rect.first{fill:var(--bad);opacity:.22}text.first{fill:var(--bad);font-weight:600}
@media(max-width:600px){th,td{padding-right:9px}td small,.bar+small{display:block;margin:0}.wrap{min-width:70px}
.bar{width:70px}}
"""
