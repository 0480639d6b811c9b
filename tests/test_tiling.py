"""An MLP that is computed by tiles of tokens: the same loss and gradients, each tile twice, and less memory at once.

Expected are transformers' own models on each document alone. Ranks and DeepSpeed are in ``test_sequence_parallel`` and
``test_training_model``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hf_models
import pytest
import torch
from test_training_model import batch, compiled_graphs, gradients_of, noise, plain_loss, run, training
from torch.distributed._tools.mem_tracker import MemTracker

from smolconv.continual_pretraining.engine.model import check_no_leak
from smolconv.continual_pretraining.engine.tiling import tile_mlp

#: fp32, of a loss; and of gradients, relative to a tensor's largest element. Sums are taken in another order.
LOSS_NOISE, GRADIENT_NOISE = 1e-6, 1e-5
#: 90 tokens: 6 tiles of 15, across rows and documents.
ROWS, TILE_TOKENS, TILES = ((20, 1, 3, 21), (45,)), 16, 6
KEPT: dict[str, dict[str, bool]] = {
    "kept": {},
    "checkpointed": {"activation_checkpointing": True},
    "offloaded": {"activation_checkpointing": True, "activation_offload": True},
}
FAMILIES = ("llama", "smollm3", "qwen2", "qwen3")


def tiled(plain: torch.nn.Module, **fields: Any) -> Any:
    built = training(plain, **fields)
    tile_mlp(built, TILE_TOKENS)
    return built


def differs(built: Any, plain: Any) -> bool:
    given = batch(ROWS)
    loss, gradients = run(built, given)
    expected = plain_loss(plain, given)
    plain.zero_grad()
    expected.backward()
    targets = int((given.labels != -100).sum())
    return bool(
        abs(loss - expected) / targets > LOSS_NOISE or noise(gradients, gradients_of(plain)) > GRADIENT_NOISE
    )  # fmt: skip


def watched(mlp: torch.nn.Module, change: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, x: x) -> list[int]:
    """Tokens of each call from now on, whose results ``change`` is given with the calls before."""
    calls: list[int] = []
    compute = mlp.forward

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        calls.append(inputs.shape[-2])
        return change(len(calls) - 1, compute(inputs))

    mlp.forward = forward
    return calls


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family, kept):
    plain = getattr(hf_models, family)()
    assert not differs(tiled(plain, **KEPT[kept]), plain)


@pytest.mark.parametrize("kept", KEPT)
def test_each_tile_is_computed_twice_with_and_without_checkpointing(kept):
    built = training(hf_models.llama(), **KEPT[kept])
    calls = watched(built.model.layers[1].mlp)
    tile_mlp(built, TILE_TOKENS)
    run(built, batch(ROWS))
    assert calls == [15] * TILES * 2


@pytest.mark.parametrize("lost", [2, TILES + 2], ids=["in the forward pass", "in the backward pass"])
def test_the_comparison_notices_a_tile_that_is_lost(lost):
    plain = hf_models.llama()
    built = training(plain)
    watched(built.model.layers[1].mlp, lambda call, found: found * (call != lost))
    tile_mlp(built, TILE_TOKENS)
    assert differs(built, plain)


def test_short_rows_are_computed_as_before_bit_for_bit():
    plain, given = hf_models.smollm3(), batch(((16,),))
    (loss, gradients), (again, regained) = run(training(plain), given), run(tiled(plain), given)
    assert loss == again and all(torch.equal(gradients[name], regained[name]) for name in gradients)


def test_without_gradients_each_tile_is_computed_once():
    plain, given = hf_models.llama(), batch(ROWS)
    built = training(plain)
    calls = watched(built.model.layers[0].mlp)
    tile_mlp(built, TILE_TOKENS)
    with torch.no_grad():
        loss, targets = built(**given._asdict())
    assert calls == [15] * TILES
    assert abs(loss - plain_loss(plain, given)) / targets < LOSS_NOISE
    check_no_leak(built, 64, 45, "cpu")


@pytest.mark.parametrize("frozen", ["embed_tokens", "mlp", "gate_proj", ""], ids=lambda name: name or "all but a norm")
def test_frozen_weights_have_no_gradient_and_the_others_have_theirs(frozen):
    plain = hf_models.llama()
    built = tiled(plain)
    for each in (plain, built):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(frozen not in name or name == "model.norm.weight")
    given = batch(ROWS)
    plain_loss(plain, given).backward()
    built(**given._asdict())[0].backward()
    expected = {name: each.grad for name, each in plain.named_parameters() if each.grad is not None}
    found = {name: each.grad for name, each in built.named_parameters() if each.grad is not None}
    assert noise(found, expected) < GRADIENT_NOISE
    assert len(found) < len(list(plain.parameters()))


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    """One token a tile: 90 gradients of each weight, whose sum in bfloat16 would lose digits."""
    exact = hf_models.llama()
    plain = exact.to(torch.bfloat16).float()  # the same numbers
    _, expected = run(training(plain), batch(ROWS))
    found = []
    for tokens in (100, 1):
        built = training(plain, dtype="bfloat16")
        tile_mlp(built, tokens)
        _, gradients = run(built, batch(ROWS))
        found.append({name: each.float() for name, each in gradients.items()})
    one, many = (noise(gradients, expected) for gradients in found)
    assert many < 1.2 * one


@pytest.mark.parametrize("kept", ["kept", "checkpointed"])
def test_a_tile_and_not_a_row_is_what_the_mlp_holds_at_once(kept):
    """900 tokens of 12.8 kB in the widest tensors, of which SwiGLU keeps four in a layer: nearly all there is."""
    plain = hf_models.llama(intermediate_size=3200, num_hidden_layers=2)
    whole, tiles = (training(plain, **KEPT[kept]) for _ in range(2))
    tile_mlp(tiles, 150)
    rows = (peak(whole) - peak(tiles)) / (900 * 4 * 3200)
    assert rows > (4 if kept == "checkpointed" else 2 * 4) * 5 / 6


def peak(built: Any) -> int:
    """Bytes of all tensors at once, in a forward and a backward pass."""
    tracker = MemTracker()
    tracker.track_external(built)
    with tracker:
        built(**batch(((900,),))._asdict())[0].backward()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def test_tiles_are_compiled_and_give_the_same(monkeypatch):
    graphs, plain = compiled_graphs(monkeypatch), hf_models.smollm3()
    built = training(plain, compile=True, activation_checkpointing=True)
    tile_mlp(built, TILE_TOKENS, compiled=True)
    assert not differs(built, plain)
    assert any(15 in sizes for sizes in graphs), graphs
    assert built.state_dict().keys() == plain.state_dict().keys()
