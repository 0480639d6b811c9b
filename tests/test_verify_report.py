"""The report as a page: it needs nothing else, says the verdict first, and shows whole at every width in a browser."""

from __future__ import annotations

import copy
import html
import json
import math
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import FIXTURES
from hf_models import edited

from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.compare import AsStored, VerifyOptions, verify_checkpoints
from smolconv.verification.report import render_html

SMOLLM3 = FIXTURES / "nanotron/smollm3-tiny"
NATIVE, HF = SMOLLM3 / "tp2-pp1-dp2-zero1", SMOLLM3 / "expected_hf"
Document = dict[str, Any]


def document(b: Path, **options: Any) -> Document:
    """The real run of ``verify`` on the fixture and ``b``, as JSON."""
    read = ReadOptions(optimizer=options.get("optimizer", False))
    left, right = (read_checkpoint(folder, read) for folder in (NATIVE, b))
    stored = (AsStored(folder=NATIVE, options=read), AsStored(folder=b, options=read))
    return verify_checkpoints(left, right, VerifyOptions(**{"length": 64, **options}), stored=stored).to_json()


def swap_gate_and_up(weights: dict[str, Any]) -> None:
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Document]:
    planted = edited(HF, tmp_path_factory.mktemp("report") / "planted", swap_gate_and_up)
    return {"PASS": document(HF), "FAIL": document(planted)}


@pytest.fixture
def passing(runs) -> Document:
    return copy.deepcopy(runs["PASS"])


@pytest.fixture
def failing(runs) -> Document:
    return copy.deepcopy(runs["FAIL"])


def page(found: Document, a: str = "nanotron", b: str = "hf") -> str:
    return render_html(found, a=a, b=b)


def words(markup: str) -> str:
    """What a reader sees, without the style sheet."""
    body = markup[markup.index("<body>") :]
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", body.replace("<wbr>", "")))).strip()


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["PASS", "FAIL"])
def test_a_page_refers_to_nothing_outside_and_runs_nothing(runs, verdict):
    markup = page(runs[verdict])
    for forbidden in (
        "<script",
        "<link",
        "<img",
        "<iframe",
        "http:",
        "https:",
        "src=",
        "href=",
        "url(",
        "@import",
        "javascript:",
    ):
        assert forbidden not in markup
    assert not re.search(r"\son\w+=", markup)


def test_a_passing_page_says_so_first(passing):
    said = words(page(passing))
    assert said.startswith("PASSThe same model: 74 tensors equal bit for bit")
    assert "First divergence" not in said and "FAIL" not in said


def test_a_failing_page_says_why_and_where_first(failing):
    said = words(page(failing))
    assert said.startswith("FAILNot the same model: 2 of 74 tensors differ")
    assert said.index("First divergence: model.layers.1.mlp") < said.index("What was compared")
    assert "first divergence: layers.1.mlp" in said


def test_a_page_says_what_was_compared(passing):
    said = words(page(passing, a="runs/a", b="runs/b"))
    logits = passing["logits"]
    for fact in (
        "runs/a",
        "runs/b",
        *logits["forwards"],
        logits["tokens_from"],
        "64 positions",
        "float32",
        "smolconv ",
    ):
        assert fact in said


@pytest.mark.parametrize("planted", ["<img src=x onerror=alert(1)>", "\"'><script>alert(1)</script>", "a & b <i>"])
def test_names_cannot_change_the_page(failing, planted):
    clean = page(failing)
    failing["reason"] = failing["first_divergence"] = failing["tensors"]["worst"] = planted
    failing["spec_differences"] = failing["tensors"]["missing"] = [planted]
    failing["layers"][3]["module"] = failing["logits"]["tokens_from"] = failing["logits"]["compute"] = planted
    failing["logits"]["forwards"] = [planted, planted]
    failing["gates"][planted] = failing["gates"]["kl"]
    failing["optimizer"] = {"slots": {planted: failing["tensors"]}, "differences": [planted]}
    markup = page(failing, a=planted, b=planted)
    assert planted not in markup
    tags = [set(re.findall(r"<([a-z0-9!]+)", each, re.IGNORECASE)) for each in (clean, markup)]
    assert tags[1] <= {*tags[0], "ul", "li"}
    assert words(markup).count(planted) >= 10


def test_a_run_without_logits_has_no_plots():
    markup = page(document(HF, logits=False))
    assert words(markup).startswith("PASS")
    assert "<svg" not in markup and "not compared" in words(markup)


def test_models_of_other_shapes_are_listed_apart():
    said = words(page(document(FIXTURES / "nanotron/smollm2-tiny/expected_hf")))
    assert said.startswith("FAILNot the same model: specs differ")
    assert "Spec differences (9)" in said and "In A only, parameters (36)" in said and "28 more" in said


def test_a_difference_of_the_spec_alone_fails_with_plots_that_agree(passing):
    passing |= {
        "passed": False,
        "reason": "specs differ: max_positions",
        "spec_differences": ["max_positions: 64 in A, 128 in B"],
    }
    said = words(page(passing))
    assert said.startswith("FAIL") and "Spec differences (1)" in said and "1 field differ" in said
    assert "74 of 74 equal bit for bit" in said


def test_the_optimizer_has_its_tier():
    said = words(page(document(SMOLLM3 / "tp1-pp2-dp1-zero0", optimizer=True, logits=False)))
    assert "exp_avg 74 of 74; exp_avg_sq 74 of 74" in said


# --- what it draws ---------------------------------------------------------------------------------------------------


def test_every_module_is_a_point_that_says_its_values(failing):
    markup = page(failing)
    assert markup.count("<circle") == len(failing["layers"])
    assert markup.count("<circle class=bad") == sum(each["diverged"] for each in failing["layers"])
    for each in failing["layers"]:
        assert f"{each['module']}: {each['max_abs']:.3g}, noise floor {each['floor']:.3g}" in markup


def test_a_limit_of_divergence_is_drawn_when_the_run_knows_it(failing):
    for each in failing["layers"]:
        each["limit"] = 1e-4
    assert "limit of divergence" in page(failing)
    for each in failing["layers"]:
        del each["limit"]
    assert "limit of divergence" not in page(failing)


def test_zero_has_a_row_of_its_own_below_the_decades(failing):
    failing["layers"] = [{**each, "max_abs": 0.0 if i else 1.0} for i, each in enumerate(failing["layers"])]
    heights = [float(y) for y in re.findall(r"<circle[^>]* cy=([\d.]+)", page(failing))]
    assert heights[0] < min(heights[1:]) and len(set(heights[1:])) == 1


def test_what_is_not_finite_is_drawn_above_everything(failing):
    failing["layers"][-1]["max_abs"] = failing["logits"]["max_abs"] = failing["gates"]["kl"]["value"] = None
    for name in ("max_abs", "kl", "nll_b"):
        failing["logits"]["by_position"][name] = [None] * 64
    failing["logits"]["nll_b"] = None
    markup = page(failing)
    heights = [float(y) for y in re.findall(r"<circle[^>]* cy=([\d.]+)", markup)]
    assert heights[-1] == 0.0 < min(heights[:-1])
    assert "∞, NaN" in markup and "not finite" in words(markup)
    assert "NLL of A| is not finite" in words(markup) and "is 0 at every position" not in words(markup)
    assert "nan" not in markup.split("</style>")[1].replace("nanotron", "")


@pytest.mark.parametrize("count", [1, 2, 599, 600, 601, 2048, 10_001])
def test_long_texts_are_drawn_by_the_largest_value_of_each_bin(failing, count):
    spike = count // 2
    for name in failing["logits"]["by_position"]:
        failing["logits"]["by_position"][name] = [
            7.25 if name == "max_abs" and i == spike else 0.5 for i in range(count)
        ]
    markup = page(failing)
    columns = [figure.count("<rect class=hit") for figure in markup.split("<figure>")[2:]]
    assert columns and max(columns) <= 600
    assert len(re.findall(r"B against A 7\.25<", markup)) == 1
    assert (f"largest value among {math.ceil(count / 600)} positions" in markup) == (count > 600)


@pytest.mark.parametrize("layers", [0, 1, 36, 128])
def test_models_of_any_depth_are_drawn_with_few_labels(failing, layers):
    names = [
        "model.embed_tokens",
        *(f"model.layers.{i}.part{k}" for i in range(layers) for k in range(10)),
        "model.norm",
    ]
    failing["layers"] = [{**failing["layers"][20], "module": name} for name in names]
    markup = page(failing)
    figure = markup.split("<figure>")[1].split("</figure>")[0]
    assert figure.count("<circle") == len(names)
    assert figure.count("text-anchor=middle") <= 11
    assert len(markup) < 1_000_000


def test_gates_of_ones_own_may_be_zero_or_negative(passing):
    passing["gates"] = {
        "max_abs": {"limit": -1.0, "value": 0.5, "passed": False},
        "kl": {"limit": 0.0, "value": 0.0, "passed": True},
        "flips": {"limit": 0.0, "value": 0.0, "passed": True},
    }
    assert "≤ -1" in words(page(passing))


# --- in a browser ----------------------------------------------------------------------------------------------------

#: Around the page in a frame as wide as a window cannot be made; the page itself has no scripts.
_FRAME = """<!DOCTYPE html><style>*{margin:0;border:0}</style><iframe id=f style="width:%dpx;height:%dpx;display:block" srcdoc="%s"></iframe>
<pre id=found></pre><script>
document.getElementById('f').onload = e => {
  const d = e.target.contentDocument, all = q => [...d.querySelectorAll(q)];
  const box = x => { const r = x.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  document.getElementById('found').textContent = JSON.stringify({
    scroll: d.documentElement.scrollWidth, verdict: box(d.querySelector('h1')),
    right: Math.max(...all('main *').filter(x => !x.closest('.scroll, svg')).map(x => x.getBoundingClientRect().right)),
    labels: all('svg text').map(box), plots: all('figure > svg').map(box)});
};</script>"""


class Seen(NamedTuple):
    """What a browser laid out, in pixels from the top left, and painted, as [height, width, 3]."""

    layout: dict[str, Any]
    pixels: np.ndarray


def browse(markup: str, width: int, folder: Path) -> Seen:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    height = 4000
    (folder / "frame.html").write_text(_FRAME % (width, height, html.escape(markup)), encoding="utf-8")

    def run(*flags: str) -> str:
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
             f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 600)},{height}", *flags,
             (folder / "frame.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout

    found = re.search(r"<pre id=\"found\">(.+?)</pre>", run("--dump-dom"))
    assert found is not None
    run(f"--screenshot={folder / 'page.png'}")
    return Seen(json.loads(html.unescape(found[1])), read_png((folder / "page.png").read_bytes()))


def read_png(data: bytes) -> np.ndarray:
    """[height, width, 3] of a PNG of 8 bits a channel, RGB or RGBA, not interlaced."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed, header = 8, b"", b""
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, chunk = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        header, packed = (chunk if kind == b"IHDR" else header), packed + chunk * (kind == b"IDAT")
        at += 12 + size
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    assert (depth, interlaced) == (8, 0) and colour in (2, 6)
    channels = 3 if colour == 2 else 4
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    pixels = np.zeros((height, width, channels), np.uint8)
    above = np.zeros((width, channels), np.uint8)
    for y, line in enumerate(lines):
        above = pixels[y] = _unfiltered(int(line[0]), line[1:].reshape(width, channels), above)
    return pixels[..., :3]


def _unfiltered(kind: int, line: np.ndarray, above: np.ndarray) -> np.ndarray:
    """PNG specification, section 9: None, Sub, Up, Average, Paeth."""
    if kind < 3:
        return (line, np.cumsum(line, axis=0, dtype=np.uint8), line + above)[kind]
    result = []
    for now, up in zip(line.T.tolist(), above.T.tolist()):
        left = corner = 0
        row = []
        for value, b in zip(now, up):
            if kind == 3:
                guess = (left + b) // 2
            else:
                near = {left: abs(b - corner)}
                near.setdefault(b, abs(left - corner))
                near.setdefault(corner, abs(left + b - 2 * corner))
                guess = min(near, key=near.__getitem__)
            left, corner = (value + guess) & 255, b
            row.append(left)
        result.append(row)
    return np.array(result, np.uint8).T


@pytest.mark.parametrize("width", [1200, 420])
@pytest.mark.parametrize("verdict", ["PASS", "FAIL"])
def test_a_browser_shows_the_whole_page_and_draws_its_plots(runs, verdict, width, tmp_path):
    long = "/checkpoints/" + 190 * "x"
    layout, pixels = browse(page(runs[verdict], a=long, b=long), width, tmp_path)
    # Nothing reaches beyond the width, and the labels of plots stay within the page.
    assert layout["scroll"] == width and layout["right"] <= width
    assert all(left >= 0 and right <= width for left, _, right, _ in layout["labels"])
    # The verdict stands at the top, in its colour on its ground.
    left, top, right, bottom = map(int, layout["verdict"])
    assert 0 <= top < bottom < 200 and 0 <= left < right <= width
    ink = (24, 122, 67) if verdict == "PASS" else (192, 38, 45)
    assert (pixels[top:bottom, left:right] == ink).all(-1).sum() > 200
    # Every plot has lines or points in colour: grid, labels and the noise floor are grey.
    assert len(layout["plots"]) == 5 and layout["plots"][-1][3] < len(pixels)
    for left, top, right, bottom in ([int(edge) for edge in plot] for plot in layout["plots"]):
        inside = pixels[top:bottom, left:right].astype(int)
        assert (inside.max(-1) - inside.min(-1) > 60).sum() > 150
