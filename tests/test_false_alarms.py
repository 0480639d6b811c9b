"""Verify says PASS where nothing but rounding, kernels, threads or the layout differs, and FAIL one step beyond that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, convert
from hf_models import edited, llama, saved, smollm3
from nanotron_folders import step_folder
from safetensors.torch import load_file

from smolconv.layouts.layout import ReadOptions
from smolconv.layouts.registry import read_checkpoint
from smolconv.verification.compare import AsStored, VerifyOptions, VerifyReport, side_of, verify_checkpoints
from smolconv.verification.forward import ForwardPass, Side
from smolconv.verification.inputs import Rows, choose_rows
from smolconv.verification.logits import LogitsReport, compare_logits

NANOTRON = FIXTURES / "nanotron"
RUNS = {
    "smollm2": NANOTRON / "smollm2-tiny/tp2-pp1-dp2-zero1",
    "smollm3": NANOTRON / "smollm3-tiny/tp2-pp1-dp2-zero1",
    "smollm3 in bf16": NANOTRON / "smollm3-tiny-bf16/tp2-pp1-dp1-zero0",
}
#: The six forms of one model.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "nanotron tp1": ("nanotron", {}),
    "nanotron tp2-pp2": ("nanotron", {"tp": 2, "pp": 2}),
    "hf": ("hf", {}),
    "ZeRO-1": ("deepspeed", {"zero_stage": 1, "world_size": 2}),
    "ZeRO-3": ("deepspeed", {"zero_stage": 3, "world_size": 3}),
    "universal": ("deepspeed", {}),
}
COMPUTE = ["float32", "bfloat16"]


@pytest.fixture(scope="module", params=RUNS)
def forms(request, tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("forms")
    for name, (to, options) in FORMS.items():
        convert(RUNS[request.param], home / name, to, **options)
    return {name: home / name for name in FORMS}


def verify(a: Path, b: Path, **options: Any) -> VerifyReport:
    read = ReadOptions(optimizer=options.get("optimizer", False))
    left, right = (read_checkpoint(folder, read) for folder in (a, b))
    stored = (AsStored(folder=a, options=read), AsStored(folder=b, options=read))
    return verify_checkpoints(left, right, VerifyOptions(**options), stored=stored)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param(a, b, marks=() if a == "nanotron tp1" else pytest.mark.matrix)  # each with the first
        for a, b in combinations(FORMS, 2)
    ],
    ids=lambda name: name.replace(" ", "-"),
)
def test_six_forms_of_one_model_are_the_same_model(forms, a, b, compute):
    report = verify(forms[a], forms[b], compute=compute, optimizer=compute == "float32")
    assert report.passed, report.reason
    assert report.logits.compute == compute


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_the_same_as_itself(forms, form, compute):
    report = verify(forms[form], forms[form], compute=compute)
    assert report.passed
    assert report.logits.max_abs == report.logits.kl_mean == 0


def test_equal_choices_among_equal_logits_agree():
    # bf16 logits are often equal: the first choice then has to be the same one on both sides.
    report = verify(RUNS["smollm3"], RUNS["smollm3"], compute="bfloat16")
    assert report.logits.top1_agreement == 1


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("form", ["ZeRO-1", "ZeRO-3"])
def test_packed_documents_are_no_alarm(forms, form, compute):
    assert verify(forms[form], forms["hf"], documents=3, compute=compute).passed


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("model", ["smollm3", "smollm3 in bf16"])  # nanotron's Llama does not separate documents
def test_documents_packed_for_nanotron_are_no_alarm(model, compute):
    assert verify(RUNS[model], RUNS[model].parent / "expected_hf", documents=3, compute=compute).passed


# --- the same tensors, run otherwise ---------------------------------------------------------------------------------


class Otherwise:
    """A side whose passes run with another attention, or on another number of threads."""

    def __init__(self, side: Side, attention: str | None = None, threads: int | None = None) -> None:
        self.side, self.attention, self.threads = side, attention, threads
        self.title, self.num_layers = side.title, side.num_layers
        self.vocab_size, self.max_positions = side.vocab_size, side.max_positions

    def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return work(*args)
        finally:
            torch.set_num_threads(before)

    def begin(self, runs: Sequence[ForwardPass]) -> None:
        for run in runs:
            run.attention = self.attention or run.attention
        self._run(self.side.begin, runs)

    def advance(self, layer: int, runs: Sequence[ForwardPass]) -> None:
        self._run(self.side.advance, layer, runs)

    def finish(self, runs: Sequence[ForwardPass]) -> None:
        self._run(self.side.finish, runs)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        return self._run(self.side.head_rows, start, stop)


def compared(a: Path, b: Path, compute: str, **otherwise: Any) -> LogitsReport:
    """A as it is, B otherwise."""
    left, right = (read_checkpoint(folder) for folder in (a, b))
    options = VerifyOptions(compute=compute)
    spec = left.spec
    rows = choose_rows(vocab_size=spec.vocab_size, max_positions=spec.max_positions, tokenizer=None)
    return compare_logits(
        Otherwise(side_of(left, AsStored(folder=a), options), threads=1),
        Otherwise(side_of(right, AsStored(folder=b), options), **otherwise),
        rows, compute=compute,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict[str, Path]:
    """A model whose sums are long enough to be cut among threads, and to be rounded otherwise by another kernel."""
    home = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 256}
    for name, model in {"llama": llama(**sizes), "smollm3": smollm3(**sizes)}.items():
        for parameter in model.parameters():
            parameter.data.mul_(0.3)
        convert(saved(model, home / name / "hf"), home / name / "nanotron", "nanotron", tp=2)
    return {
        f"{name} in {layout}": home / name / layout for name in ("llama", "smollm3") for layout in ("hf", "nanotron")
    }


OTHERWISE = [{"attention": "eager"}, {"threads": 2}, {"attention": "eager", "threads": 2}]


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param(a, b, marks=() if (a, b) == ("hf", "nanotron") else pytest.mark.matrix)
        for a, b in product(("hf", "nanotron"), repeat=2)
    ],
)
@pytest.mark.parametrize("model", ["llama", "smollm3"])
@pytest.mark.parametrize("otherwise", OTHERWISE, ids=lambda each: " ".join(map(str, each.values())))
def test_other_code_kernels_and_threads_are_no_alarm(wide, otherwise, model, a, b, compute):
    report = compared(wide[f"{model} in {a}"], wide[f"{model} in {b}"], compute, **otherwise)
    assert report.passed, report.gates
    assert report.first_divergence is None
    if "attention" in otherwise:
        assert report.max_abs > 0  # or nothing was tested


# --- the same tensors, in another transformers ------------------------------------------------------------------------


class Recorded:
    """A side whose last hidden states another release of transformers computed: ``fixtures/transformers``."""

    title = "recorded"

    def __init__(self, side: Side, hidden: torch.Tensor) -> None:
        self.hidden, self.head_rows = hidden, side.head_rows
        self.num_layers, self.vocab_size, self.max_positions = side.num_layers, side.vocab_size, side.max_positions

    def begin(self, runs: Sequence[ForwardPass]) -> None:
        for run in runs:
            run.hidden = self.hidden

    def advance(self, layer: int, runs: Sequence[ForwardPass]) -> None: ...

    def finish(self, runs: Sequence[ForwardPass]) -> None: ...


#: The installed transformers is one of these, or between them: ``make test`` has v5, ``make test-transformers4`` v4.
RELEASES = ["v4", "v5"]
RECORDED_ENDS = {"plain": (64,), "packed": (5, 6, 23, 64)}


def against_recorded(release: str, folder: Path, model: str, compute: str, form: str) -> LogitsReport:
    """A is ``folder`` in the installed transformers, or in our own forward; B is what ``release`` made of ``model``."""
    recorded, ends = load_file(FIXTURES / "transformers" / f"{release}.safetensors"), RECORDED_ENDS[form]
    rows = Rows(tokens=recorded["input_ids"].numpy(), where="the fixture", spans=tuple(zip((0, *ends), ends)))
    if form == "packed":
        assert rows.positions.tolist() == recorded["packed_position_ids"].tolist()
    side = side_of(read_checkpoint(folder), AsStored(folder=folder), VerifyOptions(compute=compute))
    hidden = recorded[f"{model}/{compute}/{form}"]
    return compare_logits(side, Recorded(side, hidden), rows, compute=compute)


@pytest.mark.parametrize("form", RECORDED_ENDS)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("model", ["smollm2-tiny", "smollm3-tiny"])
@pytest.mark.parametrize("release", RELEASES)
def test_releases_of_transformers_are_no_alarm(release, model, compute, form):
    report = against_recorded(release, NANOTRON / model / "expected_hf", model, compute, form)
    assert report.passed, report.gates
    if compute == "float32":
        assert report.max_abs <= 5e-6


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    ("model", "form"),
    [("smollm2-tiny", "plain"), ("smollm3-tiny", "plain"), ("smollm3-tiny", "packed")],  # its Llama joins documents
)
@pytest.mark.parametrize("release", RELEASES)
def test_nanotrons_forward_agrees_with_every_release_of_transformers(release, model, compute, form):
    run = RUNS[model.removesuffix("-tiny")]
    assert against_recorded(release, run, model, compute, form).passed


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("release", RELEASES)
def test_a_recording_of_another_model_is_an_alarm(release, compute, tmp_path):
    turned = edited(NANOTRON / "smollm3-tiny/expected_hf", tmp_path / "turned", turn_queries)
    assert not against_recorded(release, turned, "smollm3-tiny", compute, "plain").passed


# --- one step beyond -------------------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]


def swap_layers(weights: Weights) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        other = name.replace(".1.", ".2.")
        weights[name], weights[other] = weights[other], weights[name]


def swap_gate_and_up(weights: Weights) -> None:
    for name in [name for name in weights if "gate_proj" in name]:
        other = name.replace("gate_proj", "up_proj")
        weights[name], weights[other] = weights[other], weights[name]


def turn_queries(weights: Weights) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].roll(1, dims=0)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    ("edit", "module"),
    [
        (swap_layers, "model.layers.1.input_layernorm"),
        (swap_gate_and_up, "model.layers.0.mlp"),
        (turn_queries, "model.layers.0.self_attn"),
    ],
    ids=["layers", "gate and up", "queries"],
)
@pytest.mark.parametrize("form", ["nanotron tp1", "ZeRO-1"])
def test_misplaced_weights_fail_the_logits_tier_in_bf16_too(forms, form, edit, module, compute, tmp_path):
    report = verify(forms[form], edited(forms["hf"], tmp_path / "planted", edit), compute=compute)
    assert not report.tensors.passed and not report.logits.passed
    assert report.first_divergence == module
    if compute == "float32":
        assert report.logits.first_divergence == module


def test_the_command_compares_in_bf16_and_says_so_to_people(cli):
    done = cli("verify", RUNS["smollm3"], step_folder(RUNS["smollm3"]), "--compute", "bfloat16", "--per-layer")
    assert done.code == 0, done.stderr
    assert "PASS" in done.stdout
