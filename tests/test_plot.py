"""A run as a picture: what stands out in millions of steps stays, and a browser shows all of it without a request."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import Finished, command, environment
from test_metrics import recipe, record, watch
from test_verify_report import read_png

from smolconv.commands import plot  # noqa: F401  (registers itself)
from smolconv.continual_pretraining.recipe.files import RECIPE, dump_recipe
from smolconv.continual_pretraining.watch.history import Curve, read_run
from smolconv.continual_pretraining.watch.plot import render_html, render_svg, write_plot
from smolconv.errors import CorruptFile, MissingFile, NotInstalled, UsageError


def trained(folder: Path, steps: int = 300, *, resume_at: int | None = None, seed: int = 0) -> Path:
    """A run's folder with two stages, a spike at step 120, evaluations, and maybe a second start."""
    choose = random.Random(seed)
    sources = [{"path": "tokens/<web>", "weight": 3}, {"path": "tokens/math", "weight": 1}]
    stages = [{"name": "stable", "sources": sources}]
    given = recipe(
        steps, logging={"every_steps": 1_000_000}, data={"sequence_length": 128, "eos_token_id": 0, "stages": stages},
        schedule={"train_steps": steps, "peak_lr": 1e-3, "warmup_steps": 10},
    )  # fmt: skip
    for first in (1, resume_at) if resume_at else (1,):
        began = {"launcher": "slurm", "host": "node-<a>", "ranks": 8, "nodes": 1}
        with watch(folder, given, first_step=first, began=began) as watched:
            if first == 1:
                watched.evaluation(0, {"held-out": 3.5})
            for step in range(first, steps + 1):
                loss = 2.2 + math.exp(-step / 50) + choose.gauss(0, 0.02) + 1.5 * (step == 120)
                if step == 120:
                    watched.event(step, f"loss spike: {loss:.4f}, kept", kind="spike")
                stage = "stable" if step <= 2 * steps // 3 else "decay <1>"
                watched.step(
                    record(
                        step,
                        loss=loss,
                        stage=stage,
                        grad_norm=choose.uniform(0.3, 0.6),
                        lr=1e-3 * min(1, (step - 1) / 10),
                        sources={"<web>": 700 * step, "math": 324 * step},
                    )
                )
                if step % 50 == 0:
                    watched.evaluation(step, {"held-out": loss + 0.1})
                    watched.tasks(step, {"copy": {"acc": step / 600, "ppl": 40.0}})
                if step % 100 == 0:
                    watched.event(step, "saved", kind="saved", write_seconds=1.0, stall_seconds=0.1, bytes=9)
    (folder / RECIPE).write_text(dump_recipe(given), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("plot") / "run <b>&", resume_at=201)


def cli(*words: object) -> Finished:
    before = "import smolconv.commands.plot"
    done = subprocess.run(
        command(*words, before=before), capture_output=True, text=True, check=False, env=environment()
    )
    return Finished(done.returncode, done.stdout, done.stderr)


# --- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 4097, 100_000])
def test_a_curve_of_any_length_keeps_its_extremes_in_few_points(count):
    values = np.random.default_rng(count).normal(0, 1, count)
    values[count // 3], values[count // 2] = 99.0, -99.0
    curve = Curve()
    for step, value in enumerate(values.tolist(), 1):
        curve.add(step, value)
    points = curve.points()
    assert len(points) <= 2000 and points == sorted(points)
    assert {(p.step, p.value) for p in points} <= {(i + 1, v) for i, v in enumerate(values.tolist())}
    assert min(p.value for p in points) == values.min() and max(p.value for p in points) == values.max()
    assert (points[0].step, points[-1].step) == (1, count) or count > 1000
    if count <= 1000:
        assert [p.value for p in points] == values.tolist()


def test_smoothing_is_a_mean_that_weighs_every_step_once():
    curve = Curve()
    for step in range(1, 5001):
        curve.add(step, step % 2)
    inner = [point.value for point in curve.smoothed()][50:-50]
    assert len(inner) > 400 and max(abs(value - 0.5) for value in inner) < 0.01


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_run_is_read_with_its_stages_spikes_resumes_and_evaluations(run):
    found = read_run(run)
    assert (found.first.step, found.last.step) == (1, 300)
    assert found.stages == [(1, "stable"), (201, "decay <1>")]
    steps = {kind: [event.step for event in events] for kind, events in found.events.items() if events}
    assert sorted(set(steps.pop("evaluation"))) == [0, 50, 100, 150, 200, 250, 300]
    assert steps == {"started": [0], "resumed": [201], "spike": [120], "saved": [100, 200, 300]}
    assert [point.step for point in found.evaluations["held-out"].points()] == [0, 50, 100, 150, 200, 250, 300]
    assert found.seconds == 150.0


def test_a_run_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    folder = trained(tmp_path / "run", 20)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 21, "lo')
    assert read_run(folder).last.step == 20


def test_losses_that_are_not_finite_leave_a_gap(tmp_path):
    with watch(tmp_path, recipe(logging={"every_steps": 1000})) as watched:
        for step in range(1, 6):
            watched.step(record(step, loss=math.nan if step == 3 else 2.0))
    assert [point.step for point in read_run(tmp_path).curves["loss"].points()] == [1, 2, 4, 5]
    assert "nan" not in render_svg([read_run(tmp_path)])
    [path] = re.findall(
        r'class="line " stroke="#2463d6" d="([^"]+)"', render_svg([read_run(tmp_path)]).partition("Learning rate")[0]
    )
    assert re.sub(r"[\d. ]+", "", path) == "MhLMhL", "two strokes of two points"


def test_gaps_are_kept_in_bounded_memory_and_only_where_nothing_is_known():
    curve = Curve()
    for step in range(1 << 15):
        if step < 1000 or step % 2:
            curve.add(step, 1.0)
        else:
            curve.skip(step)
    assert curve.gaps() == []
    for step in range(1 << 15, 3 << 15):
        curve.skip(step)
    assert curve.gaps()[0] >= 1 << 15 and curve.gaps()[-1] < 3 << 15 and 100 < len(curve.gaps()) <= 1000


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n", b"[1, 2]\n", b'{"loss": 2.0}\n', b'{"step": "two"}\n', b"\xff\xfe\n",
        b'{"step": ' + b"9" * 5000 + b"}\n", b'{"step": 9223372036854775808}\n', b'{"step": -1}\n', b'{"step": true}\n',
        b'{"step": 4, "loss": 1e999}\n', b'{"step": 4, "loss": NaN}\n', b'{"step": 4, "loss": 1e301}\n',
        b'{"step": 4, "loss": "low"}\n', b'{"step": 4, "seconds": -1}\n', b'{"step": 4, "tokens": 1.5}\n',
        b'{"step": 4, "stage": ["a"]}\n', b'{"step": 4, "stage": "\\ud800"}\n', b"[" * 3000 + b"\n",
        b'{"step": 4, "stage": "' + b"x" * (1 << 20) + b'"}\n',
        b'{"step": 4, "sources": [1]}\n', b'{"step": 4, "sources": {"a": -1}}\n', b'{"step": 4, "sources": {"a": null}}\n',
    ],
    ids=range(22),
)  # fmt: skip
def test_a_line_that_is_none_of_ours_is_named(tmp_path, line):
    folder = trained(tmp_path / "run", 3)
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() + line + b'{"step": 5}\n')
    with pytest.raises(CorruptFile, match=r"metrics\.jsonl, line 4: "):
        read_run(folder)


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path):
    """As a file of nulls that a lost node leaves: 16 GB, on a disk that has no such file."""
    folder = trained(tmp_path / "run", 3)
    os.truncate(folder / "metrics.jsonl", 1 << 34)
    with pytest.raises(CorruptFile, match=r"metrics\.jsonl, line 4: it is longer than 1,048,576 bytes"):
        read_run(folder)


@pytest.mark.parametrize(
    "line",
    [b'{"step": 2, "kind": "evaluation", "losses": [1]}\n', b'{"step": 2, "tasks": [1]}\n', b'{"step": 2, "tasks": {"a": 1}}\n', b'{"step": 2, "tasks": {"a": {"acc": "x"}}}\n', b'{"step": 2, "losses": {"a": "x"}}\n', b'{"step": 2, "kind": 3}\n', b'{"step": 2, "ranks": "8"}\n', b'{"step": 2, "host": 3}\n', b'{"step": 2, "time": "now"}\n'],
)  # fmt: skip
def test_an_event_that_is_none_of_ours_is_named(line, tmp_path):
    folder = trained(tmp_path / "run", 3)
    (folder / "events.jsonl").write_bytes(b'{"step": 1}\n' + line)
    with pytest.raises(CorruptFile, match=r"events\.jsonl, line 2: "):
        read_run(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_pipe_in_a_run_is_not_waited_for(name, tmp_path):
    folder = trained(tmp_path / "run", 3)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CorruptFile, match=f"{name} is a named pipe"):
        read_run(folder)


def test_steps_and_values_of_any_size_are_drawn(tmp_path):
    """Steps that jump to 2^53 and back, losses from the least to the largest, times that no clock shows."""
    folder, choose = tmp_path / "ru\x01n\udcff", random.Random(3)
    folder.mkdir()
    steps = [0, 1, 1 << 53, 5, *(choose.randrange(1 << choose.randrange(1, 54)) for _ in range(3000))]
    values = [5e-324, 1e299, -1e299, 0, 10**39, 1e-300, 1.0, 1.0 + 2**-52]
    lines = [
        {"step": step, "loss": choose.choice(values), "lr": choose.choice(values), "grad_norm": 5e-324, "mfu": 1e299,
         "seconds": 1e299, "tokens": 10**39, "stage": f"a\x00\x1b[2J<b>{step % 3}"}
        for step in steps
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text(
        json.dumps({"step": 1, "kind": "spike", "text": "\x00", "losses": {"\x01": 1}}) + "\n"
    )
    found = read_run(folder)
    assert all(len(curve.points()) <= 2000 for curve in found.curves.values())
    ElementTree.fromstring(render_svg([found]))
    assert not re.search(r"[\x00-\x08\x1b]", render_html([found]).encode().decode())


@pytest.mark.parametrize("value", [5e-324, 1e-320, 1e-300, 1e17, 1e299, -1e299, 10**38])
def test_a_curve_of_one_value_of_any_size_is_drawn(value, tmp_path):
    for other in (value, 0, value * (1 + 2**-52), -value):
        lines = [{"step": i, "loss": v, "lr": v} for i, v in enumerate([value, other, value])]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ElementTree.fromstring(render_svg([read_run(tmp_path)]))


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").write_bytes(b"")
    for name, said in (("missing", "is not there"), ("empty", "holds no metrics"), ("new", "holds no step yet")):
        with pytest.raises(MissingFile, match=said):
            read_run(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", Path("x" * 5000)):
        with pytest.raises(MissingFile, match="is not there"):
            write_plot([path], tmp_path / "out.svg")


def test_a_picture_of_one_step_and_of_constant_values_is_drawn(tmp_path):
    with watch(tmp_path, peak_flops=None) as watched:
        watched.step(record(1, lr=0.0, loss=0.0, grad_norm=0.0))
    markup = render_svg([read_run(tmp_path)])
    ElementTree.fromstring(markup)
    assert "MFU" not in markup and "h0" in markup


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page_beside_the_run_and_other_pictures_where_asked(run, tmp_path):
    other = trained(tmp_path / "other", 40, seed=1)
    assert cli("plot", run).code == 0
    assert (run / "plot.html").read_text().startswith("<!DOCTYPE html>")
    assert cli("plot", run, tmp_path / "loss.svg").code == 0
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    done = cli("plot", run, other, "-o", tmp_path / "both.html")
    assert (done.code, done.stdout) == (0, "") and "both.html" in done.stderr
    assert "<td>other</td>" in (tmp_path / "both.html").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_the_command_refuses_with_the_promised_codes(run, tmp_path):
    assert cli("plot", tmp_path / "missing").code == 3
    assert cli("plot", run, run).code == 2
    done = cli("plot", run, "-o", tmp_path / "loss.gif")
    assert done.code == 2 and ".html, .svg, .png, .pdf" in done.stderr
    assert "Examples" in cli("plot", "--help").stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "function"), [(".png", "svg2png"), (".pdf", "svg2pdf")])
def test_a_png_or_pdf_is_drawn_by_cairosvg_or_refused(suffix, function, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(NotInstalled, match=r"(?s)cairosvg.*\.html or \.svg"):
        write_plot([run], tmp_path / f"loss{suffix}")
    assert not list(tmp_path.iterdir())
    asked: dict[str, Any] = {}

    def draw(**options: Any) -> bytes:
        asked.update(options)
        return b"a picture"

    monkeypatch.setitem(sys.modules, "cairosvg", SimpleNamespace(**{function: draw}))
    write_plot([run], tmp_path / f"loss{suffix}")
    assert (tmp_path / f"loss{suffix}").read_bytes() == b"a picture"
    assert b"prefers-color-scheme" not in asked["bytestring"] and b"var(" not in asked["bytestring"]


def test_an_unknown_suffix_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError):
        write_plot([tmp_path / "missing"], tmp_path / "out.txt")


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_page_refers_to_nothing_outside_and_runs_nothing(run):
    markup = render_html([read_run(run)])
    for forbidden in ("<script", "<link", "<img", "<iframe", "http:", "https:", "src=", "href=", "url(", "@import"):
        assert forbidden not in markup
    assert not re.search(r"\son\w+=", markup)


def test_names_cannot_change_the_page_or_the_drawing(run):
    for markup in (render_html([read_run(run)]), render_svg([read_run(run)])):
        assert "<b>&" not in markup and "<1>" not in markup and "decay &lt;1&gt;" in markup
        assert "<web>" not in markup and "&lt;web&gt;" in markup and "<a>" not in markup and "node-&lt;a&gt;" in markup
    ElementTree.fromstring(render_svg([read_run(run)]))


def test_marks_are_drawn_where_they_belong(run):
    drawn = ElementTree.fromstring(render_svg([read_run(run)]))
    name = "{http://www.w3.org/2000/svg}"

    def where(css: str) -> list[float]:
        """Of the first panel, from its left axis, in shares of its width."""
        paths = next(drawn.iter(f"{name}g")).iterfind(f"{name}path[@class='{css}']")
        return [(float(re.match(r"M([\d.]+)", path.get("d", ""))[1]) - 62) / (1140 - 62 - 12) for path in paths]

    for css, steps in (("stage", [201]), ("resumed", [201]), ("spike", [120]), ("saved", [100, 200, 300])):
        assert where(css) == [pytest.approx(step / 300, abs=1e-3) for step in steps]


def lines_of(panel: str, markup: str, css: str) -> list[list[tuple[float, float]]]:
    """The lines of a panel, as shares of its width and height from its lower left corner."""
    name = "{http://www.w3.org/2000/svg}"
    groups = [each for each in ElementTree.fromstring(markup).iterfind(f"{name}g") if (each[0].text or "") == panel]
    wide = 1140 if panel == "Loss" else 560
    return [
        [
            ((float(x) - 62) / (wide - 62 - 12), 1 - (float(y) - 54) / (300 - 54 - 34))
            for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.get("d", ""))
        ]
        for path in groups[0].iterfind(f"{name}path[@class='line {css}']")
    ]


def test_the_step_before_the_first_is_inside_the_axes(run):
    """A run's first evaluation is at step 0; an axis from step 1 on would put it left of its panel."""
    [points] = lines_of("Evaluation", render_svg([read_run(run)]), "dots")
    assert [x for x, _ in points] == [pytest.approx(step / 300, abs=1e-3) for step in range(0, 301, 50)]
    assert points[0][1] == max(y for _, y in points) < 1


def test_accuracies_of_tasks_are_drawn_and_perplexities_are_not(run):
    found = read_run(run)
    assert [point.value for point in found.tasks["copy acc"].points()] == [step / 600 for step in range(50, 301, 50)]
    assert set(found.tasks) == {"copy acc", "copy ppl"}
    markup = render_svg([found])
    [points] = lines_of("Tasks", markup, "dots")
    assert [x for x, _ in points] == [pytest.approx(step / 300, abs=1e-3) for step in range(50, 301, 50)]
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert "copy acc" in markup and "copy ppl" not in markup


def test_the_mixture_and_the_recipe_are_drawn_beside_each_other(run):
    """Steps took 700 and 324 of 1,024 tokens; the recipe weighs 3 to 1. The axis ends 4% above the largest, from 0."""
    found = read_run(run)
    assert {name: {p.value for p in curve.points()} for name, curve in found.mixture.items()} == {
        "<web>": {700 / 1024}, "math": {324 / 1024},
    }  # fmt: skip
    assert [p.step for p in found.mixture["math"].points()] == list(range(1, 301)), "also over the resume"
    markup = render_svg([found])
    for css, values in (("expected", (0.75, 0.25)), ("", (700 / 1024, 324 / 1024))):
        for line, value in zip(lines_of("Mixture", markup, css), values):
            assert {round(y, 2) for _, y in line} == {round(value / (0.75 * 1.04), 2)}
    [rates] = lines_of("Learning rate", markup, "expected")
    assert rates == lines_of("Learning rate", markup, "")[0], "the schedule that the run was logged with"
    assert rates[5] == pytest.approx((6 / 300, 0.5 / 1.04), abs=1e-2), "in the middle of the warmup"


def test_the_estimate_stands_beside_what_was_measured(run, tmp_path):
    """2,048 tokens/s were an MFU of 0.25; the estimate assumes 0.3. Without an MFU there is none."""
    found = read_run(run)
    assert {round(point.value, 6) for point in found.expected["tokens_per_second"].points()} == {2457.6}
    assert "2,048; 2,458 estimated for an MFU of 30%" in render_html([found])
    [expected] = lines_of("Throughput", render_svg([found]), "expected")
    assert {round(y, 2) for _, y in expected} == {round(1 / 1.04, 2)}
    with watch(tmp_path, peak_flops=None) as watched:
        watched.step(record(1))
    assert "estimated" not in (page := render_html([read_run(tmp_path)])) and "estimate, MFU" not in page


def test_a_page_tells_the_facts_and_events_of_each_run(run, tmp_path):
    page = render_html([read_run(run)])
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", page)]
    facts = dict(zip(cells[::2], cells[1::2]))
    assert (facts["name"], facts["source"], facts["recipe"]) == ("run <b>&", "somewhere", "tiny")
    assert (facts["steps"], facts["tokens"]) == ("1 to 300 of 300", "307,200")
    assert facts["trained by"] == "8 ranks on node-<a> by slurm" and facts["last checkpoint"].startswith("step 300 2")
    assert page.count("<td>saved</td>") == 2 * 3 and page.count("<td>spike</td>") == 1


def test_the_last_events_of_each_kind_are_kept_and_the_others_counted(tmp_path):
    folder = trained(tmp_path / "run", 3)
    lines = [{"step": step, "kind": "saved", "text": f"save {step}"} for step in range(10_000)]
    lines += [{"step": 2, "kind": f"<kind {step}>", "text": ""} for step in range(1000)] + [
        {"step": 1, "kind": "resume"}
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(folder)
    assert [len(found.events[kind]) for kind in ("saved", "note", "resumed")] == [200, 200, 1]
    page = render_html([found])
    assert "save 9999" in page and "save 9799" not in page and "10,600 earlier events" in page and "<kind" not in page


def test_many_sources_share_one_curve_beyond_the_first(tmp_path):
    sources = {f"s{i}": i + 1 for i in range(100)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "sources": sources}) + "\n")
    found = read_run(tmp_path)
    shares = {name: curve.points()[0].value for name, curve in found.mixture.items()}
    assert len(shares) == 17 and sum(shares.values()) == pytest.approx(1) and shares["s15"] == 16 / 5050
    assert shares["others"] == pytest.approx(sum(range(17, 101)) / 5050)


@pytest.mark.parametrize("text", [None, "name: [", "name: old\nsections: 1\n", "\0"])
def test_a_run_whose_recipe_cannot_be_read_is_drawn_by_its_files(text, tmp_path):
    folder = trained(tmp_path / "run", 3)
    (folder / RECIPE).unlink() if text is None else (folder / RECIPE).write_text(text)
    page = render_html([read_run(folder)])
    assert "<th>source</th>" not in page and "<td>1 to 3</td>" in page


#: Around the page, which has no scripts: what it laid out, and whether it asked for anything or complained.
_FRAME = """<!DOCTYPE html><style>*{margin:0;border:0}</style><iframe id=f style="width:%dpx;height:%dpx;display:block" srcdoc="%s"></iframe>
<pre id=found></pre><script>
document.getElementById('f').onload = e => {
  const w = e.target.contentWindow, d = w.document, all = q => [...d.querySelectorAll(q)];
  const box = x => { const r = x.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  document.getElementById('found').textContent = JSON.stringify({
    scroll: d.documentElement.scrollWidth, requests: w.performance.getEntriesByType('resource').length,
    panels: all('.panels > div').map(box), labels: all('.panels svg').map(s => [box(s), [...s.querySelectorAll('text')].map(box)])});
};</script>"""


@pytest.mark.parametrize("width", [1240, 480])
def test_a_browser_shows_every_panel_with_its_curve(run, width, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    height = 2600
    frame = _FRAME % (width, height, html.escape(render_html([read_run(run)])))
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")

    def show(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
             f"--window-size={max(width, 600)},{height}", *flags, (tmp_path / "frame.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip

    done = show("--dump-dom", f"--screenshot={tmp_path / 'page.png'}")
    found = re.search(r"<pre id=\"found\">(.+?)</pre>", done.stdout)
    assert found is not None and "CONSOLE" not in done.stderr
    layout = json.loads(html.unescape(found[1]))
    assert layout["scroll"] == width and layout["requests"] == 0
    assert len(layout["panels"]) == 7
    for (left, top, right, bottom), labels in layout["labels"]:
        # Labels lie inside their panel's drawing (a pixel of rounding).
        assert all(l >= left - 1 and r <= right + 1 and t >= top - 1 and b <= bottom + 1 for l, t, r, b in labels)  # noqa: E741
    if not (tmp_path / "page.png").exists():
        show(f"--screenshot={tmp_path / 'page.png'}")
    pixels = read_png((tmp_path / "page.png").read_bytes()).astype(int)
    for left, top, right, bottom in ([int(edge) for edge in panel] for panel in layout["panels"]):
        inside = pixels[max(top, 0) : bottom, max(left, 0) : min(right, width)]
        assert ((inside.max(-1) - inside.min(-1)) > 60).sum() > 150, "the curve is drawn in colour"
