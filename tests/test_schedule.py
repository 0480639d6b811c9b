"""The learning rate of a recipe, against a transcription of nanotron's table, torch's LambdaLR and transformers."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smolconv.continual_pretraining.recipe import schedules
from smolconv.continual_pretraining.recipe.schedules import (
    Phases,
    Schedule,
    learning_rate,
    notes,
    resolved,
    turning_steps,
)

SHAPES = ("linear", "cosine", "1-sqrt")


def schedule(**given) -> Schedule:
    return Schedule(**({"train_steps": 100, "peak_lr": 1e-3} | given))


def by_the_table(s: int, *, peak: float, low: float, W: int, S: int, D: int, shape: str) -> float:
    """The phases of nanotron's ``lr_scheduler_builder``, row by row."""
    if s <= W:
        return peak * s / max(W, 1)
    if s < S:
        return peak
    if s < S + D:
        f = (s - S) / D
        if shape == "linear":
            return low + (peak - low) * (1 - f)
        if shape == "cosine":
            return low + (peak - low) * (1 + math.cos(math.pi * f)) / 2
        return low + (peak - low) * (1 - math.sqrt(f))
    return low


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("W", "S", "D", "low"), [(10, 40, 60, 0.0), (10, 10, 90, 1e-4), (1, 50, 20, 1e-5), (5, 90, 30, 0.0)]
)
def test_every_step_is_as_the_table_says(shape, W, S, D, low):
    recipe = schedule(warmup_steps=W, decay=shape, decay_start_step=S, decay_steps=D, min_lr=low)
    for s in range(121):
        assert learning_rate(recipe, s) == pytest.approx(
            by_the_table(s, peak=1e-3, low=low, W=W, S=S, D=D, shape=shape), rel=1e-12, abs=1e-18
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_steps_through_the_same_rates(shape):
    torch = pytest.importorskip("torch")
    recipe = schedule(warmup_steps=7, decay=shape, decay_start_step=60, decay_steps=40, min_lr=1e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.peak_lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: by_the_table(s, peak=1e-3, low=1e-4, W=7, S=60, D=40, shape=shape) / 1e-3,
    )
    for step in range(1, 101):
        assert learning_rate(recipe, step - 1) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def wsd(decay_type: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    made = transformers.get_wsd_schedule(
        optimizer,
        num_warmup_steps=10,
        num_stable_steps=50,
        num_decay_steps=40,
        warmup_type="linear",
        decay_type=decay_type,
    )
    rates = []
    for _ in range(100):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return rates


def test_transformers_wsd_agrees_for_a_linear_decay_to_zero():
    recipe = schedule(warmup_steps=10, decay="linear", decay_steps=40)
    assert [learning_rate(recipe, s) for s in range(100)] == pytest.approx(wsd("linear"), rel=1e-9, abs=1e-15)


def test_transformers_wsd_with_a_minimum_is_another_schedule():
    recipe = schedule(warmup_steps=10, decay="linear", decay_steps=40, min_lr=1e-4)
    assert [learning_rate(recipe, s) for s in range(100)] != pytest.approx(wsd("linear"), rel=1e-3)


# --- restarts ---------------------------------------------------------------------------------------------------------


def restarts(cycles: int, **given) -> Schedule:
    return schedule(**({"warmup_steps": 10, "decay": "cosine-restarts", "cycles": cycles} | given))


@pytest.mark.parametrize("cycles", [1, 2, 3, 4, 7])
def test_restarts_are_those_of_transformers(cycles):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    made = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 10, 100, num_cycles=cycles)
    recipe = restarts(cycles)
    for s in range(100):
        # transformers rounds: where a cycle begins it may still be at the end of the one before.
        if s not in {10 + round(90 * c / cycles) for c in range(cycles)}:
            assert learning_rate(recipe, s) == pytest.approx(made.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        made.step()


@pytest.mark.parametrize(("cycles", "low"), [(1, 0.0), (3, 1e-4), (9, 0.0)])
def test_restarts_are_those_of_torch(cycles, low):
    torch = pytest.importorskip("torch")
    recipe = restarts(cycles, min_lr=low, warmup_steps=1, decay_start_step=20, decay_steps=90, train_steps=120)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    made = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 90 // cycles, eta_min=low)
    for s in range(20, 110):
        assert learning_rate(recipe, s) == pytest.approx(made.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        made.step()
    assert {learning_rate(recipe, s) for s in range(110, 121)} == {low}


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_every_cycle_of_whole_steps_begins_at_the_peak(cycles, length):
    recipe = restarts(cycles, warmup_steps=5, train_steps=5 + cycles * length)
    begins = {5 + length * c for c in range(cycles)}
    assert all((learning_rate(recipe, s) == recipe.peak_lr) == (s in begins) for s in range(5, recipe.train_steps))
    assert turning_steps(recipe) == {1, *(s + 1 for s in begins), recipe.train_steps}


def test_restarts_need_a_number_of_cycles_that_the_decay_has_room_for():
    with pytest.raises(ValueError, match=r"decay cosine-restarts needs schedule\.cycles"):
        schedule(decay="cosine-restarts")
    with pytest.raises(ValueError, match="cycles 11 is more than the 10 steps of the decay"):
        restarts(11, decay_steps=10)


def test_a_decay_is_named_in_its_table_alone():
    """Whoever adds one has one place to write it."""
    root = Path(schedules.__file__).parents[2]
    product = [
        path for part in ("smolconv", "commands", "continual_pretraining") for path in (root / part).rglob("*.py")
    ]
    for word in ("cosine-restarts", "cycles"):
        found = {path for path in product if re.search(rf"\b{word}\b", path.read_text())}
        assert {path.resolve() for path in found} == {Path(schedules.__file__).resolve()}


# --- any schedule -------------------------------------------------------------------------------------------------

phases = st.tuples(
    st.integers(1, 50), st.integers(0, 100), st.integers(1, 100), st.sampled_from(SHAPES), st.floats(0, 1e-3)
)


def made_of(drawn) -> Schedule:
    W, stable, D, shape, low = drawn
    return schedule(train_steps=W + stable + D, warmup_steps=W, decay=shape, decay_steps=D, min_lr=low)


@settings(deadline=None)
@given(phases)
def test_step_1_is_at_zero_w_plus_1_is_the_first_at_the_peak_and_s_plus_1_still_is(drawn):
    recipe = made_of(drawn)
    W, S = recipe.warmup_steps, resolved(recipe).decay_start_step
    assert learning_rate(recipe, 0) == 0
    assert learning_rate(recipe, W - 1) < recipe.peak_lr
    assert learning_rate(recipe, W) == recipe.peak_lr
    assert learning_rate(recipe, S) == pytest.approx(recipe.peak_lr, rel=1e-12)


@settings(deadline=None)
@given(phases)
def test_the_decay_falls_steadily_and_ends_at_the_minimum(drawn):
    recipe = made_of(drawn)
    end = recipe.train_steps
    rates = [learning_rate(recipe, s) for s in range(resolved(recipe).decay_start_step, end + 1)]
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(rates))
    assert rates[-1] == recipe.min_lr
    assert learning_rate(recipe, end + 1000) == recipe.min_lr


@settings(deadline=None)
@given(phases)
def test_no_step_moves_further_than_its_phase_allows(drawn):
    recipe = made_of(drawn)
    D = resolved(recipe).decay_steps
    allowed = recipe.peak_lr * max(
        1 / recipe.warmup_steps,
        {"linear": 1 / D, "cosine": math.pi / (2 * D), "1-sqrt": 1 / math.sqrt(D)}[recipe.decay],
    )
    rates = [learning_rate(recipe, s) for s in range(recipe.train_steps + 2)]
    assert all(abs(b - a) <= allowed * (1 + 1e-9) for a, b in itertools.pairwise(rates))


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 500))
def test_without_a_decay_the_rate_stays_at_the_peak(W, s):
    assume(s >= W)
    assert learning_rate(schedule(warmup_steps=W), s) == (1e-3 if s or not W else 0)


# --- what is left open, and what is said ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_fields", "expected"),
    [
        ({"decay_steps": 30}, (70, 30)),
        ({"decay_start_step": 60}, (60, 40)),
        ({"decay_start_step": 60, "decay_steps": 10}, (60, 10)),
        ({}, (10, 90)),
    ],
)
def test_what_the_schedule_leaves_open_is_filled_in(given_fields, expected):
    found = resolved(schedule(warmup_steps=10, decay="linear", **given_fields))
    assert (found.decay_start_step, found.decay_steps) == expected
    assert notes(schedule(warmup_steps=10, decay="linear", decay_steps=30)) == []


def test_a_decay_that_never_begins_is_none():
    open_end = schedule(decay="linear", decay_start_step=100)
    assert resolved(open_end) == Phases(warmup_steps=0, decay="none", decay_start_step=100, decay_steps=0)
    assert learning_rate(open_end, 99) == 1e-3


@pytest.mark.parametrize(
    ("given_fields", "said"),
    [
        (
            {"decay": "linear", "decay_start_step": 80, "decay_steps": 40},
            "20 beyond the last one: the run stops at 0.0005",
        ),
        ({"decay": "linear", "decay_start_step": 50, "decay_steps": 40}, "the other 10 train at min_lr 0"),
        ({"decay": "linear", "decay_start_step": 100}, "before its linear decay"),
        ({"decay": "linear", "warmup_steps": 50, "decay_steps": 80}, "within the warm-up of 50"),
        ({"decay_steps": 40}, "decay_steps has no effect"),
        ({"min_lr": 1e-5}, "min_lr has no effect"),
        ({"train_steps": 1, "warmup_steps": 0, "decay": "linear", "decay_steps": 1}, "the run changes no weights"),
        ({"decay": "cosine", "decay_steps": 40, "cycles": 2}, "cycles has no effect: schedule.decay is cosine"),
        ({"warmup_steps": 100}, "never trains at peak_lr"),
        ({"decay": "linear", "min_lr": 1.0}, "the rate rises"),
    ],
)
def test_what_is_perhaps_not_meant_is_said(given_fields, said):
    assert any(said in note for note in notes(schedule(**given_fields)))
