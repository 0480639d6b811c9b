"""A report of ``verify`` as one self-contained HTML page, without scripts, fonts or images, for screen and print.

Plots scale without a script: horizontal coordinates are percents of the width, vertical ones pixels.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib import metadata
from typing import Any

from smolconv.verification.plots import layer_plot, number, position_plots
from smolconv.version import __version__

#: Lists of names and differences show this many entries; unfold them for the rest.
_MOST_LINES = 8

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
    """The page for ``VerifyReport.to_json()``; ``a`` and ``b``: the checkpoints' names as given by the user."""
    logits = document["logits"]
    sections = [_verdict(document), _compared(logits, a, b), _lines("Spec differences", document["spec_differences"])]
    if logits is not None:
        sections.append(_gates(document["gates"]))
    sections.append(_tensors(document))
    if logits is not None:
        sections += [layer_plot(document), position_plots(logits["by_position"]), _metrics(logits)]
    body = "\n".join(filter(None, [*sections, _layer_list(document["layers"])]))
    word = "PASS" if document["passed"] else "FAIL"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">\n<title>{word}: {escape(a)} and {escape(b)} · smolconv verify</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


# --- text ------------------------------------------------------------------------------------------------------------


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
    """Each tier's name, whether it passed (None: not compared), and its result."""
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
        said = f"max abs {number(logits['max_abs'])}, floor {number(logits['noise_floor']['max_abs'])}"
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
            number(gate["value"]), f"{'≥' if name == 'top1' else '≤'} {number(gate['limit'])}",
            _bar(name, gate, decades),
        )
        for name, gate in gates.items()
    ]  # fmt: skip
    table = _table(("", "gate", "value", "limit", "value beside its limit"), rows)
    scale = f"The vertical line is the limit, {decades} {_plural(decades, 'decade')} on either side; shares are 0 to 1."
    return f"<section><h2>Gates</h2>{table}<p><small>{scale}</small></p></section>"


def _ratio(gate: Mapping[str, Any]) -> float | None:
    value, limit = gate["value"], gate["limit"]
    return value / limit if value is not None and limit is not None and value > 0 and limit > 0 else None


def _bar(name: str, gate: Mapping[str, Any], decades: int) -> str:
    """Shares are drawn from 0 to 1; anything else on a log scale with the limit in the middle."""
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
    rows = [(said, number(logits[name]), number(floor[name])) for name, said in _METRICS.items()]
    one, other = logits["nll_a"], logits["nll_b"]
    apart = None if one is None or other is None else other - one
    nll = f"<div class=wrap>A {number(one, 6)}, B {number(other, 6)}, B &minus; A {number(apart)}</div>"
    rows.append(("NLL of the next token, mean, nats", nll, ""))
    note = "The noise floor is the difference of A with sdpa and with eager attention."
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
         *(number(each[key]) if key in each else "&ndash;" for key in ("max_abs", "floor", "limit", "scale")))
        for each in layers
    ]  # fmt: skip
    table = _table(("", "module", "max abs", "noise floor", "limit", "std of A"), rows)
    return f"<section><details><summary>All {len(layers)} modules in forward order</summary>{table}</details></section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table. On narrow screens it scrolls horizontally."""
    cells = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _mark(passed: bool) -> str:
    css, sign = _STATES[passed]
    return f'<b class={css} title="{"passes" if passed else "fails"}">{sign}</b>'


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _breakable(text: str) -> str:
    """Escaped, and allowed to wrap inside dotted names and paths."""
    return re.sub(r"([./_])(?=\w)", r"\1<wbr>", escape(text))


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
