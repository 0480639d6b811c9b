"""The training model: packed documents give what transformers gives for each document alone, for loss and gradients."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import hf_models
import numpy as np
import pytest
import real_deepspeed
import torch
from deepspeed_worker import random_model
from real_deepspeed import Group, Job, continue_with_deepspeed, plain_adamw
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from training_model_worker import Packed, packed
from transformers import masking_utils

from smolconv.continual_pretraining.engine import attention, model
from smolconv.continual_pretraining.engine.attention import attend_by_document, choose_attention, pack
from smolconv.continual_pretraining.engine.config import MAX_LOGITS
from smolconv.continual_pretraining.engine.model import SummedCrossEntropy, build_model, check_no_leak
from smolconv.continual_pretraining.estimate.memory import memory_parts
from smolconv.continual_pretraining.recipe import schema as recipe
from smolconv.continual_pretraining.run.gate import source_loss
from smolconv.continual_pretraining.tokens.files import Batch
from smolconv.errors import NotInstalled, TrainingStopped, UnsupportedModel, UsageError
from smolconv.models.huggingface import parameter_shapes, spec_from_hf

ARCHITECTURES = {"llama": hf_models.llama, "smollm3": hf_models.smollm3}
VOCABULARY = 64
#: fp32, relative to a tensor's largest element: sums are taken in another order. 1.3e-6 was measured.
MAX_NOISE = 5e-6


@pytest.fixture(params=ARCHITECTURES)
def plain(request: pytest.FixtureRequest) -> torch.nn.Module:
    """transformers' own model, random, fp32, grouped-query; SmolLM3's fourth layer is NoPE."""
    return ARCHITECTURES[request.param]()


def training(plain: torch.nn.Module, **fields: Any) -> Any:
    """Ours with the weights of ``plain``; ``fields`` are the recipe's ``model``."""
    wanted = recipe.Model(source="-", **{"dtype": "float32", **fields})
    built = build_model(plain.config.to_dict(), wanted, "cpu")
    built.load_state_dict(plain.state_dict())
    return built


def batch(lengths: Sequence[Sequence[int]], seed: int = 0) -> Packed:
    """Rows of documents of these lengths, with random tokens; the last token of each has no label."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    tokens = torch.randint(0, VOCABULARY, positions.shape, generator=generator)
    labels = tokens.roll(-1, 1)
    labels[positions.roll(-1, 1) == 0] = -100
    return Packed(tokens, positions, labels)


def documents(given: Packed) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of each document alone, [1, length]."""
    for tokens, positions, labels in zip(*given):
        bounds = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        for start, stop in itertools.pairwise(bounds):
            yield tokens[None, start:stop], labels[None, start:stop]


def plain_loss(plain: Any, given: Packed) -> torch.Tensor:
    """transformers, one document after another, and ``F.cross_entropy`` of all its logits."""
    losses = [
        functional.cross_entropy(plain(input_ids=tokens, use_cache=False).logits.float()[0], labels[0], reduction="sum")
        for tokens, labels in documents(given)
        if (labels != -100).any()
    ]
    return torch.stack(losses).sum()


def run(built: Any, given: Packed) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    built.zero_grad()
    loss, targets = built(**given._asdict())
    loss.backward()
    assert targets.item() == (given.labels != -100).sum()
    return loss.detach(), gradients_of(built)


def gradients_of(built: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in built.named_parameters()}


def noise(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest error of a parameter's gradients, relative to its largest one.

    Queries and keys of tokens that see only themselves have none, but for rounding, which differs between processors:
    such a parameter's error is relative to the largest gradient of all.
    """
    assert found.keys() == expected.keys()
    largest = {name: gradient.abs().max().item() for name, gradient in expected.items()}
    of_all = max(largest.values())
    scales = {name: own if own > 1e-6 * of_all else of_all for name, own in largest.items()}
    return max((found[name] - expected[name]).abs().max().item() / scales[name] for name in expected)


def config_of(plain: torch.nn.Module, folder: Path, **training_fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(plain.config.to_json_string()), "training": training_fields}))
    return path


# --- packed = separate documents --------------------------------------------------------------------------------------

ROWS = ([[7, 20, 5]], [[20, 7, 5], [5, 5, 22]], [[32], [31, 1]])


@pytest.mark.parametrize("lengths", ROWS, ids=["one row", "two rows", "whole rows and a single token"])
def test_packed_documents_give_the_loss_and_gradients_of_each_alone(plain, lengths):
    given = batch(lengths)
    loss, gradients = run(training(plain), given)
    expected = plain_loss(plain, given)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert noise(gradients, gradients_of(plain)) < MAX_NOISE


def test_the_comparison_notices_documents_that_see_each_other(plain):
    given = batch([[7, 20, 5]])
    leaking, _ = run(training(plain), given._replace(positions=torch.arange(32)[None]))
    assert abs(leaking.item() / plain_loss(plain, given).item() - 1) > 1e-3


def test_loss_is_that_of_transformers_with_shifted_labels(plain):
    given = batch([[7, 20, 5], [9, 9, 14]])
    loss, targets = training(plain)(**given._asdict())
    theirs = plain(
        input_ids=given.input_ids, position_ids=given.positions, labels=given.labels, shift_labels=given.labels,
        use_cache=False,
    ).loss  # fmt: skip
    assert (loss / targets).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_another_document_does_not_touch_the_gradients_of_the_embeddings_bitwise(plain):
    lengths = [7, 9, 16]  # as long as the ones before or longer: their order in the row is kept
    given = batch([lengths])
    changed = given.input_ids.clone()
    changed[:, 7:16] = (changed[:, 7:16] + 1) % VOCABULARY
    built, seen = training(plain), []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    built.model.embed_tokens.register_forward_hook(keep)
    for tokens in (given.input_ids, changed):
        run(built, given._replace(input_ids=tokens))
    (first, *_), (second, *_) = seen[0].grad, seen[1].grad
    moved = (first != second).any(1)
    assert moved[7:15].all()  # nothing is trained on after a document's last token
    assert not moved[:7].any()
    assert not moved[16:].any()


def test_documents_without_masks_are_whole_rows(plain):
    """What data.mask_documents false gives: positions that begin anew with rows only."""
    given = batch([[32], [32]])
    loss, _ = run(training(plain), given)
    logits = plain(input_ids=given.input_ids, use_cache=False).logits.flatten(0, 1)
    expected = functional.cross_entropy(logits, given.labels.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_bfloat16_is_as_near_as_transformers_is(plain):
    given = batch([[7, 20, 5], [9, 9, 14]])
    exact = plain_loss(plain, given).item()
    loss, gradients = run(training(plain, dtype="bfloat16"), given)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}
    theirs = abs(plain_loss(plain.bfloat16(), given).item() - exact)
    assert loss.dtype == torch.float32
    # The weights' rounding dominates: 0.2 to 1.2 of 550 here, theirs and ours.
    assert abs(loss.item() - exact) < 2 * theirs + 5e-3 * exact


@pytest.mark.parametrize("emulated", [True, False], ids=["CPU without bfloat16", "CPU with bfloat16"])
def test_bfloat16_has_the_gradients_of_float32_within_its_rounding(monkeypatch, emulated):
    monkeypatch.setattr(attention, "_cpu_multiplies_bfloat16", lambda: not emulated)
    plain = hf_models.smollm3(attention_bias=True)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.bfloat16())  # the same weights in both
    given = batch([[7, 20, 5], [9, 9, 14]])
    built = training(plain, dtype="bfloat16")
    assert (type(built.model.layers[0].mlp.up_proj) is torch.nn.Linear) != emulated
    (loss, gradients), (exact, expected) = run(built, given), run(training(plain), given)
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        if name == "model.layers.3.self_attn.k_proj.bias":
            continue  # without rotation it moves all weights of a query alike: its gradient is rounding alone
        cosine = functional.cosine_similarity(gradient.float().flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.99, name


def test_a_micro_batch_without_labels_has_a_loss_of_zero_and_gradients(plain):
    given = batch([[7, 25]])
    loss, gradients = run(training(plain), given._replace(labels=torch.full_like(given.labels, -100)))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_gradients_accumulate_over_micro_batches(plain):
    built = training(plain)
    one, two = batch([[7, 25]], seed=1), batch([[20, 12]], seed=2)
    apart = [run(built, given)[1] for given in (one, two)]
    built.zero_grad()
    for given in (one, two):
        built(**given._asdict())[0].backward()
    assert noise(gradients_of(built), {name: apart[0][name] + apart[1][name] for name in apart[0]}) < MAX_NOISE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(1, 31, dtype=torch.int64)}, "positions is torch.int64 \\[1, 31\\]"),
        ({"labels": torch.zeros(1, 32, dtype=torch.int32)}, "labels is torch.int32"),
        ({"input_ids": torch.zeros(32, dtype=torch.int64)}, "input_ids is torch.int64 \\[32\\]"),
        ({"positions": torch.arange(1, 33)[None]}, "row 0 begins at position 1"),
    ],
)
def test_wrong_shapes_and_rows_that_begin_inside_a_document_are_refused(change, message):
    given = batch([[32]])._replace(**change)
    with pytest.raises(ValueError, match=message):
        training(hf_models.llama())(**given._asdict())


# --- the model --------------------------------------------------------------------------------------------------------


def test_names_are_canonical_and_a_tied_head_is_the_embedding(plain):
    built = training(plain)
    shapes = parameter_shapes(spec_from_hf(plain.config.to_dict()))
    assert {name: tuple(parameter.shape) for name, parameter in built.named_parameters()} == shapes
    assert list(dict(built.named_parameters())) == list(shapes)
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert built.training
    assert not built.config.use_cache


def test_an_untied_head_is_its_own():
    plain = hf_models.llama(tie_word_embeddings=False)
    given = batch([[7, 25]])
    loss, gradients = run(training(plain), given)
    expected = plain_loss(plain, given)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert noise(gradients, gradients_of(plain)) < MAX_NOISE


@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_rope_theta_and_context_of_the_recipe_replace_those_of_the_config(spelling):
    plain, wanted = hf_models.smollm3(), hf_models.smollm3(**hf_models.rope(5e6, {"rope_type": "default"}))
    given = batch([[32]])
    config = {k: v for k, v in plain.config.to_dict().items() if k not in ("rope_theta", "rope_parameters")}
    config |= (
        {"rope_theta": 1e4} if spelling == "v4" else {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    )
    losses = {}
    for theta in (None, 5e6):
        choice = recipe.Model(source="-", dtype="float32", rope_theta=theta, max_positions=128)
        built = build_model(config, choice, "cpu")
        built.load_state_dict(plain.state_dict())
        assert built.config.max_position_embeddings == 128
        losses[theta] = built(**given._asdict())[0].item()
    assert losses[5e6] == pytest.approx(plain_loss(wanted, given).item(), rel=1e-6)
    assert abs(losses[None] - losses[5e6]) > 1e-3


def test_rope_scaling_is_kept():
    plain = hf_models.llama(**hf_models.rope(1e4, hf_models.LLAMA3_SCALING))
    given = batch([[32]])
    assert run(training(plain), given)[0].item() == pytest.approx(plain_loss(plain, given).item(), rel=1e-6)


def test_rotary_frequencies_stay_float32_when_the_model_is_cast(plain):
    built = training(plain, dtype="bfloat16")
    exact = plain.model.rotary_emb.inv_freq
    for cast in (lambda: None, built.bfloat16, lambda: built.to("cpu", torch.bfloat16)):
        cast()
        assert built.model.norm.weight.dtype == torch.bfloat16
        assert torch.equal(built.model.rotary_emb.inv_freq, exact)


def test_dropout_of_attention_weights_is_refused():
    with pytest.raises(UnsupportedModel, match=r"attention_dropout is 0\.1"):
        build_model({**hf_models.llama().config.to_dict(), "attention_dropout": 0.1}, recipe.Model(source="-"), "cpu")


def test_activation_checkpointing_gives_the_same_gradients_and_computes_layers_twice(plain):
    given, counted = batch([[7, 20, 5]]), []
    results = []
    for on in (False, True):
        built = training(plain, activation_checkpointing=on)
        calls: list[int] = []
        built.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(run(built, given))
        counted.append(len(calls))
    (loss, gradients), (again, regained) = results
    assert loss == again
    assert all(torch.equal(gradients[name], regained[name]) for name in gradients)
    assert counted == [1, 2]


class Watching(torch.autograd.graph.save_on_cpu):
    """Notes what is moved to the host."""

    moved: ClassVar[list[list[int]]] = []

    def __init__(self, pin_memory: bool) -> None:
        super().__init__(pin_memory)
        pack: Callable[[torch.Tensor], Any] = self.pack_hook  # type: ignore[has-type]

        def noted(tensor: torch.Tensor) -> Any:
            self.moved.append(list(tensor.shape))
            return pack(tensor)

        self.pack_hook = noted


def test_offloaded_activations_are_the_layers_inputs_alone_and_change_nothing(monkeypatch, plain):
    given = batch([[7, 20, 5]])
    loss, gradients = run(training(plain, activation_checkpointing=True), given)
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watching)
    monkeypatch.setattr(Watching, "moved", [])
    built = training(plain, activation_checkpointing=True, activation_offload=True)
    again, regained = run(built, given)
    assert loss == again and all(torch.equal(gradients[name], regained[name]) for name in gradients)
    assert Watching.moved == [[1, 32, plain.config.hidden_size]] * len(built.model.layers)


def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The inputs' sizes of every graph that torch.compile makes from now on. The graphs run as they are: no compiler."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[list[Any]] = []

    def backend(graph: Any, inputs: Sequence[Any]) -> Any:
        found = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        graphs.append([size for value in found if isinstance(value, torch.Tensor) for size in value.shape])
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept activations", "activation checkpointing"])
def test_layers_are_compiled_and_give_the_same(monkeypatch, plain, checkpointing):
    """transformers 5 checkpoints inside a layer, and torch then leaves the layer uncompiled without saying so."""
    graphs, calls, as_it_is = compiled_graphs(monkeypatch), [], training(plain)

    def attend(*given: Any) -> torch.Tensor:
        calls.append(1)
        return attend_by_document(*given)

    monkeypatch.setitem(attention.KERNELS, "documents", attend)
    built = training(plain, compile=True, activation_checkpointing=checkpointing)
    for lengths in ([7, 20, 5], [9, 23], [4] * 8):
        given = batch([lengths])
        (loss, gradients), (expected, theirs) = run(built, given), run(as_it_is, given)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert noise(gradients, theirs) < MAX_NOISE
    assert len(calls) == 3 * len(built.model.layers) * (2 if checkpointing else 1)  # computed again
    # Before attention and after it, with rotation and without; other lengths of documents need no other ones.
    assert 2 <= len(graphs) <= 5


@pytest.mark.slow
def test_what_comes_before_the_first_step_makes_its_graphs_neither_dynamic_nor_too_many(monkeypatch):
    """The leak test, the gate, and last batches of held-out sources have other numbers of tokens."""
    graphs, plain = compiled_graphs(monkeypatch), hf_models.smollm3()
    built = training(plain, compile=True)
    check_no_leak(built, VOCABULARY, 24, "cpu")
    for_one_length = len(graphs)
    for tokens in (32, 30, 28, 26, 20):
        with torch.no_grad():
            built(**batch([[tokens]])._asdict())
    before = len(graphs)
    run(built, batch([[40, 8]]))
    assert len(graphs) - before == for_one_length > 2  # nothing is left uncompiled
    assert {type(size) for graph in graphs for size in graph} == {int}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept activations", "activation checkpointing"])
def test_compiled_layers_keep_their_names_and_give_the_same_loss(plain, checkpointing):
    losses = {}
    for compiled in (False, True):
        torch.compiler.reset()
        built = training(plain, compile=compiled, activation_checkpointing=checkpointing)
        for row in ([7, 20, 5], [9, 23], [4] * 8):
            losses[compiled, str(row)] = run(built, batch([row]))[0].item()
    assert list(built.state_dict()) == list(plain.state_dict())
    for (compiled, lengths), loss in losses.items():
        assert loss == pytest.approx(losses[not compiled, lengths], rel=1e-5)


# --- loss by rows -----------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("rows", [1, 5, 16, 50], ids=lambda rows: f"{rows} rows at once")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_cross_entropy_of_some_rows_at_a_time_is_that_of_all(monkeypatch, rows, dtype, tolerance):
    monkeypatch.setitem(MAX_LOGITS, "cpu", 300 * rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(41, 16), torch.randn(300, 16)
    labels = torch.randint(0, 300, (41,))
    labels[[0, 3, 7, 40]] = -100
    head, results = SummedCrossEntropy(16, 300, bias=False), []
    for ours, computed in ((True, dtype), (False, torch.float32), (False, dtype)):
        h, w = (x.to(computed).clone().requires_grad_() for x in (hidden.to(dtype), weight.to(dtype)))
        with LargestTensor() as largest:
            if ours:
                head.weight = torch.nn.Parameter(w.detach())
                loss, w = head(h, labels), head.weight
                with torch.no_grad():
                    assert head(h, labels) == loss
            else:
                loss = functional.cross_entropy((h @ w.t()).float(), labels, reduction="sum")
            (loss * 0.25).backward()
        assert (largest.elements < 41 * 300) == (ours and rows < 41)
        results.append((loss.detach(), h.grad, w.grad))
    for found, expected, torchs in zip(*results):
        # A processor that multiplies bf16 rounds the logits to it, here by up to 0.03 of 16: torch's own way shows what
        # that costs (1.06e-2 of the largest gradient, on an Intel Xeon with AMX). Others compute them in fp32.
        rounding = (torchs - expected).abs().max()
        assert (found - expected).abs().max() <= max(tolerance * expected.abs().max(), 1.1 * rounding)


# --- attention --------------------------------------------------------------------------------------------------------


@contextmanager
def counted_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(documents, length) of every call of torch's attention."""
    calls, original = [], functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        assert options.get("attn_mask") is None
        assert options["is_causal"]
        calls.append((query.shape[0], query.shape[2]))
        return original(query, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        yield calls


def test_many_short_documents_cost_the_sum_of_their_squares_in_few_calls(monkeypatch, plain):
    built, layers = training(plain), len(plain.model.layers)
    costs = {}
    for lengths in ([512], [32] * 16, [40, 24] * 8):
        with counted_attention(monkeypatch) as calls, LargestTensor() as largest:
            built(**batch([lengths])._asdict())
        assert len(calls) == layers * len(set(lengths))
        costs[len(lengths), len(set(lengths))] = sum(count * length**2 for count, length in calls)
        assert largest.elements < 512 * 512  # no dense mask
    assert costs == {(1, 1): layers * 512**2, (16, 1): layers * 16 * 32**2, (16, 2): layers * 8 * (40**2 + 24**2)}


def test_transformers_own_packing_builds_the_dense_mask_that_we_do_not(plain):
    given = batch([[32] * 16])
    with LargestTensor() as largest:
        plain(input_ids=given.input_ids, position_ids=given.positions, use_cache=False)
    assert largest.elements >= 512 * 512


class AskedNumbers(TorchDispatchMode):
    """Operations that give Python a number or a truth: on a GPU, the CPU waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_never_waits_for_the_device(monkeypatch, plain):
    """transformers would look for documents in the positions; it is given the very attention that needs no mask."""

    def looked(*_: Any) -> None:
        raise AssertionError("transformers looks for documents")

    built = training(plain)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked, raising=False)
    with AskedNumbers() as mode:
        loss, targets = built(**batch([[7, 20, 5], [9, 9, 14]])._asdict())
        (loss / targets).backward()
    assert mode.asked == []
    with mode:
        loss.item()
    assert len(mode.asked) == 1


def test_transformers_makes_no_mask_for_our_attention(plain):
    """Whatever it would make is refused by ``packed_attention``, too."""
    built, given = training(plain), batch([[7, 25]])
    seen = []
    built.model.layers[0].register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["attention_mask"]), with_kwargs=True
    )
    run(built, given)
    assert seen == [None]


def test_copies_to_a_gpu_are_pinned_and_not_waited_for():
    asked = []
    pinned = SimpleNamespace(to=lambda device, non_blocking: asked.append((device, non_blocking)))
    gpu = torch.device("cuda", 1)
    attention.move(SimpleNamespace(is_cuda=False, pin_memory=lambda: pinned), gpu)
    attention.move(SimpleNamespace(is_cuda=True, to=pinned.to), gpu)  # there already: nothing to pin
    assert asked == [(gpu, True)] * 2
    here = torch.arange(3)
    assert attention.move(here, torch.device("cpu")) is here


class AsOnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.Tensor, AsOnGpu], ids=["CPU", "GPU"])
def test_float32_on_a_gpu_is_given_whole_heads_so_that_scores_are_never_written(monkeypatch, kind, dtype):
    """torch's kernels for GPUs that write no scores share heads in 16 bits only."""
    monkeypatch.setattr(attention, "_cpu_multiplies_bfloat16", lambda: True)
    calls, original = [], functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, *, enable_gqa: bool = False, **options: Any) -> torch.Tensor:
        calls.append(([tensor.shape[1] for tensor in (query, key, value)], enable_gqa))
        return original(query, key, value, enable_gqa=enable_gqa, **options)

    packing = pack(batch([[5, 5]]).positions, torch.device("cpu"), attend_by_document, by_length=True)
    q, k, v = (torch.randn(1, heads, 10, 16).to(dtype) for heads in (8, 2, 2))
    expected = attend_by_document(q, k, v, packing, 0.25)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    found = attend_by_document(q.as_subclass(kind), k.as_subclass(kind), v.as_subclass(kind), packing, 0.25)
    assert calls == [([8, 8, 8], False) if kind is AsOnGpu and dtype == torch.float32 else ([8, 2, 2], True)]
    assert (found - expected).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_the_estimate_counts_the_heads_that_float32_is_given_on_a_gpu():
    def activations(kv_heads: int, dtype: str) -> int:
        given = recipe.Recipe.model_validate({
            "name": "-", "model": {"source": "-", "dtype": dtype}, "schedule": {"train_steps": 1, "peak_lr": 1e-4},
            "data": {"sequence_length": 8, "eos_token_id": 0, "stages": [{"name": "-", "sources": [{"path": "-"}]}]},
            "parallelism": {"global_batch_sequences": 1},
        })  # fmt: skip
        spec = spec_from_hf(hf_models.llama(num_key_value_heads=kv_heads).config.to_dict())
        return next(part.bytes for part in memory_parts(given, spec, 1) if part.name == "activations")

    assert activations(2, "float32") == activations(8, "float32")
    # 4 layers, 8 positions, keys and values of 6 heads of 4 numbers
    assert activations(8, "bfloat16") - activations(2, "bfloat16") == 4 * 8 * 2 * 6 * 4 * 2


def reference_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> torch.Tensor:
    """[T, heads, D] in and out, each document by itself; key/value heads are repeated."""
    repeats = q.shape[1] // k.shape[1]
    outputs = []
    for start, stop in itertools.pairwise(bounds.tolist()):
        one, two, three = (
            x[start:stop].transpose(0, 1) for x in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
        )
        weights = (one @ two.transpose(1, 2) * scale).masked_fill(
            ~torch.ones(stop - start, stop - start).tril().bool(), -torch.inf
        )
        outputs.append((weights.softmax(-1) @ three).transpose(0, 1))
    return torch.cat(outputs)


def check_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Any, longest: Any) -> None:
    assert [x.shape for x in (q, k, v)] == [(64, 8, 4), (64, 4, 4), (64, 4, 4)]
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert all(x.dtype == torch.int32 and x.tolist() == [0, 7, 27, 32, 41, 50, 64] for x in bounds)
    assert all(type(x) is int and x == 20 for x in longest)


def fake_flash(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """flash-attn 2's function, with the arguments of its documentation."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check_arguments(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
        assert causal
        assert dropout_p == 0
        calls.append(1)
        return reference_kernel(q, k, v, cu_seqlens_q, softmax_scale)

    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


#: torch's varlen_attn, as its releases' wheels define it.
VARLEN: dict[str, Callable[..., Any]] = {
    "2.10": lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None: 0,
    "2.11": lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1): 0,
    "2.12 to 2.14": lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None: 0,
}  # fmt: skip


def fake_varlen(monkeypatch: pytest.MonkeyPatch, calls: list[int], release: str) -> None:
    """A release's function, by its own signature and defaults; it asks for what the release documents."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(VARLEN[release])

    def varlen_attn(*args: Any, **options: Any) -> torch.Tensor:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments
        q, k, v = (given[name] for name in ("query", "key", "value"))
        if not given.get("enable_gqa"):
            assert q.shape == k.shape == v.shape
            k, v = (tensor[:, ::2] for tensor in (k, v))  # each head came twice
        check_arguments(q, k, v, (given["cu_seq_q"], given["cu_seq_k"]), (given["max_q"], given["max_k"]))
        assert given["is_causal"] if "is_causal" in given else given["window_size"] == (-1, 0)
        calls.append(1)
        return reference_kernel(q, k, v, given["cu_seq_q"], given.get("scale") or q.shape[-1] ** -0.5)

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def test_the_installed_varlen_kernel_has_a_signature_that_is_known_here():
    """Otherwise a torch that changes it again would be called by what the table says, and no test would notice."""
    installed = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    named = [
        [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
        for function in (installed, *VARLEN.values())
    ]
    assert named[0] in named[1:]


@pytest.mark.parametrize("release", ["flash-attn 2", *VARLEN])
def test_gpu_kernels_are_called_as_they_document_and_give_the_same(monkeypatch, plain, release):
    """The kernels need a GPU; a plain computation with their signature stands in for them here."""
    given = batch([[7, 20, 5], [9, 9, 14]])
    built = training(plain)
    calls: list[int] = []
    expected, gradients = run(built, given)
    if release in VARLEN:
        name = "varlen"
        fake_varlen(monkeypatch, calls, release)
    else:
        name = "flash"
        fake_flash(monkeypatch, calls)
    built.attention, built.attend = name, attention.KERNELS[name]
    loss, regained = run(built, given)
    assert len(calls) == len(plain.model.layers)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert noise(regained, gradients) < MAX_NOISE
    check_no_leak_with(monkeypatch, built)


def test_a_scale_of_its_own_reaches_a_varlen_kernel_without_that_argument(monkeypatch):
    """transformers' models that we train all ask for the root of D, which is that kernel's own."""
    monkeypatch.setattr(sys.modules[__name__], "check_arguments", lambda *_: None)
    query, key, value = (torch.randn(1, heads, 11, 4) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    packing = attention.Packing(cu_seqlens=bounds, max_length=7, order=None, groups=(), kernel=attention.varlen)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    expected = reference_kernel(q, k, v, bounds, 0.3)
    for release in VARLEN:
        fake_varlen(monkeypatch, [], release)
        found = attention.varlen(query, key, value, packing, 0.3)[0]
        assert torch.allclose(found, expected, atol=1e-6), release


def check_no_leak_with(monkeypatch: pytest.MonkeyPatch, built: Any) -> None:
    """With any lengths."""
    monkeypatch.setattr(sys.modules[__name__], "check_arguments", lambda *_: None)
    check_no_leak(built, VOCABULARY, 24, "cpu")


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "installed", "capability", "expected"),
    [
        ("auto", "cpu", BF16, {"flash", "varlen"}, (9, 0), "documents"),
        ("auto", "cuda", BF16, {"flash", "varlen"}, (9, 0), "flash"),
        ("auto", "cuda:1", BF16, {"varlen"}, (8, 0), "varlen"),
        ("auto", "cuda", BF16, set(), (9, 0), "documents"),
        ("auto", "cuda", FP32, {"flash", "varlen"}, (9, 0), "documents"),
        ("auto", "cuda", BF16, {"flash", "varlen"}, (7, 5), "documents"),
        ("varlen", "cuda", BF16, {"flash", "varlen"}, (9, 0), "varlen"),
        ("documents", "cuda", BF16, {"flash", "varlen"}, (9, 0), "documents"),
        ("flash", "cpu", BF16, {"flash"}, (9, 0), UsageError),
        ("varlen", "cuda", FP32, {"varlen"}, (9, 0), UsageError),
        ("flash", "cuda", BF16, {"varlen"}, (9, 0), NotInstalled),
        ("varlen", "cuda", BF16, {"flash"}, (9, 0), NotInstalled),
    ],
)
def test_attention_is_chosen_by_what_is_there(monkeypatch, asked, device, dtype, installed, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_no_flash", lambda: None if "flash" in installed else "flash-attn is not installed")
    monkeypatch.setattr(attention, "_no_varlen", lambda: None if "varlen" in installed else "torch has none")
    if isinstance(expected, str):
        assert choose_attention(asked, device, dtype) == expected
    else:
        with pytest.raises(expected, match=f"model.attention is {asked}"):
            choose_attention(asked, device, dtype)


def test_liger_is_refused_where_it_is_not_and_left_out_when_not_asked_for():
    config = hf_models.llama().config.to_dict()
    with pytest.raises(NotInstalled, match="liger-kernel is not installed"):
        build_model(config, recipe.Model(source="-", liger="on"), "cpu")
    assert build_model(config, recipe.Model(source="-"), "cpu").lm_head.fused is None


def modeling_of(plain: torch.nn.Module) -> Any:
    """transformers' module: LlamaRMSNorm, LlamaMLP, apply_rotary_pos_emb, ..."""
    return importlib.import_module(type(plain).__module__)


def refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError("0 active drivers ([]). There should only be one.")


class OnGpusOnly(torch.nn.Module):
    """As Liger's modules are on a CPU."""

    forward = refused


class FusedLoss(torch.nn.Module):
    """In torch, with Liger's signature."""

    def __init__(self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
                 softcap=None, return_z_loss=False, accum_dtype=None):  # fmt: skip
        super().__init__()
        self.options = {"ignore_index": ignore_index, "reduction": reduction}

    def forward(self, lin_weight, _input, target, bias=None):
        return functional.cross_entropy((_input @ lin_weight.t()).float(), target, **self.options)


def fused_rotation(query: Any, *_: Any, **__: Any) -> Any:
    return "Liger's" if query.is_cuda else refused()


def fake_liger(monkeypatch: pytest.MonkeyPatch, plain: torch.nn.Module) -> list[dict[str, Any]]:
    """A module with the signatures and side effects of liger-kernel 0.8.5; the options that it is called with.

    It replaces three names in transformers' module, and binds methods to what the given model already holds. Those
    compute in torch here, where Liger's would need a GPU.
    """
    modeling, name = modeling_of(plain), type(plain).__name__.removesuffix("ForCausalLM")
    calls: list[dict[str, Any]] = []
    for each in ("apply_rotary_pos_emb", f"{name}RMSNorm", f"{name}MLP"):
        monkeypatch.setattr(modeling, each, getattr(modeling, each))  # what the test leaves is put right
    own = {kind: getattr(modeling, f"{name}{kind}").forward for kind in ("RMSNorm", "MLP")}

    def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        assert rope and rms_norm and swiglu and not cross_entropy and not fused_linear_cross_entropy
        calls.append({"model": model})
        modeling.apply_rotary_pos_emb = fused_rotation
        setattr(modeling, f"{name}RMSNorm", OnGpusOnly)
        setattr(modeling, f"{name}MLP", OnGpusOnly)
        for module in model.model.modules():
            for kind, forward in own.items():
                if type(module).__name__ == f"{name}{kind}":
                    module.__dict__["forward"] = forward.__get__(module)

    liger: Any = ModuleType("liger_kernel")
    inside: Any = ModuleType("liger_kernel.transformers")
    inside.LigerFusedLinearCrossEntropyLoss = FusedLoss
    setattr(inside, f"apply_liger_kernel_to_{plain.config.model_type}", apply)
    liger.transformers = inside
    monkeypatch.setitem(sys.modules, "liger_kernel", liger)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inside)
    return calls


def with_liger(monkeypatch: pytest.MonkeyPatch, plain: torch.nn.Module) -> Any:
    """Ours on the CPU, with Liger's functions as on a GPU."""
    chosen = model._wanted_liger
    monkeypatch.setattr(model, "_wanted_liger", lambda asked, device, architecture: chosen("on", "cuda", architecture))
    return training(plain)


def test_ligers_functions_are_called_as_they_document(monkeypatch, plain):
    calls = fake_liger(monkeypatch, plain)
    with pytest.raises(UsageError, match="kernels need GPUs"):
        training(plain, liger="on")
    built, given = with_liger(monkeypatch, plain), batch([[7, 25]])
    assert calls == [{"model": built}]
    assert list(built.state_dict()) == list(plain.state_dict())
    assert "forward" in vars(built.model.norm) and "forward" in vars(built.model.layers[0].mlp)
    assert run(built, given)[0].item() == pytest.approx(plain_loss(plain, given).item(), rel=1e-6)


def test_transformers_computes_on_the_cpu_as_before_in_a_process_that_trains_with_liger(monkeypatch, plain):
    """An export is verified there, by transformers on the CPU."""
    fake_liger(monkeypatch, plain)
    tokens = batch([[32]]).input_ids
    expected = plain(input_ids=tokens, use_cache=False).logits
    with_liger(monkeypatch, plain)
    again = type(plain)(plain.config).eval()
    again.load_state_dict(plain.state_dict())
    for theirs in (plain, again):
        assert torch.equal(theirs(input_ids=tokens, use_cache=False).logits, expected)


def test_liger_rotates_on_gpus_alone_however_many_models_were_built(monkeypatch, plain):
    fake_liger(monkeypatch, plain)
    modeling = modeling_of(plain)
    given = [torch.randn(1, 2, 3, 4) for _ in range(2)] + [torch.randn(1, 3, 4) for _ in range(2)]
    expected = modeling.apply_rotary_pos_emb(*given)
    for _ in range(2):
        with_liger(monkeypatch, plain)
        assert modeling.apply_rotary_pos_emb(SimpleNamespace(is_cuda=True), 0, 0, 0) == "Liger's"
        assert all(map(torch.equal, modeling.apply_rotary_pos_emb(*given), expected))


def incompatible(monkeypatch: pytest.MonkeyPatch, plain: torch.nn.Module) -> None:
    """Liger imports what it expects of transformers when one of its functions is asked for, and not before."""
    fake_liger(monkeypatch, plain)
    inside: Any = ModuleType("liger_kernel.transformers")

    def lazily(name: str) -> Any:
        raise ImportError("liger-kernel requires transformers >= 9, got this one")

    inside.__getattr__ = lazily
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inside)
    monkeypatch.setattr(sys.modules["liger_kernel"], "transformers", inside)


def without_this_architecture(monkeypatch: pytest.MonkeyPatch, plain: torch.nn.Module) -> None:
    """As liger-kernel before 0.6.3 is for SmolLM3."""
    fake_liger(monkeypatch, plain)
    delattr(sys.modules["liger_kernel.transformers"], f"apply_liger_kernel_to_{plain.config.model_type}")


@pytest.mark.parametrize(
    ("installed", "says"),
    [(incompatible, "requires transformers >= 9"), (without_this_architecture, "has no attribute")],
)
def test_liger_that_cannot_be_used_ends_no_run_that_only_likes_to_have_it(monkeypatch, plain, installed, says):
    installed(monkeypatch, plain)
    architecture = plain.config.model_type
    with pytest.warns(UserWarning, match=f"continues without Liger.*{architecture}.*{says}"):
        assert model._wanted_liger("auto", "cuda:0", architecture) is None
    with pytest.raises(NotInstalled, match=f"model.liger is on, but liger-kernel cannot be used.*{says}"):
        model._wanted_liger("on", "cuda:0", architecture)


def test_liger_that_is_not_installed_is_left_out_without_a_word(recwarn):
    assert model._wanted_liger("auto", "cuda:0", "llama") is None
    assert not recwarn.list


# --- leaks ------------------------------------------------------------------------------------------------------------


class PlainTransformers(torch.nn.Module):
    """Our forward's arguments, answered by transformers with its sdpa attention and these ``options``."""

    attention = "sdpa"

    def __init__(self, plain: torch.nn.Module, options: Callable[[torch.Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.plain, self.options = plain, options

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.plain(input_ids=input_ids, **self.options(positions)).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss, (labels != -100).sum()


def test_leak_test_passes_and_leaves_the_model_as_it_was(plain):
    built = training(plain, activation_checkpointing=True)
    check_no_leak(built, VOCABULARY, 33, "cpu")
    check_no_leak(training(plain, dtype="bfloat16"), VOCABULARY, 32, "cpu")
    assert built.training
    assert all(parameter.grad is None for parameter in built.parameters())


@pytest.mark.parametrize(
    ("options", "leaks"),
    [
        (lambda positions: {"position_ids": positions, "use_cache": False}, False),
        (lambda positions: {"position_ids": positions}, True),  # its default has a cache, and then no packing
        (lambda positions: {"position_ids": positions, "use_cache": False, "attention_mask": torch.ones_like(positions)}, True),
        (lambda positions: {"use_cache": False}, True),
    ],
    ids=["positions alone", "with the cache that is the default", "with a mask of ones", "without positions"],
)  # fmt: skip
def test_leak_test_refuses_transformers_where_it_leaks(plain, options, leaks):
    theirs = PlainTransformers(plain, options)
    if leaks:
        with pytest.raises(TrainingStopped, match="see each other in sdpa attention"):
            check_no_leak(theirs, VOCABULARY, 32, "cpu")
    else:
        check_no_leak(theirs, VOCABULARY, 32, "cpu")


def test_leak_test_refuses_a_kernel_that_ignores_the_bounds(plain):
    built = training(plain)

    def ignoring(query, key, value, packing, scale):
        whole = pack(torch.arange(query.shape[2])[None], query.device, attend_by_document, by_length=False)
        return attend_by_document(query, key, value, whole, scale)

    built.attend = ignoring
    with pytest.raises(TrainingStopped, match="see each other in documents attention"):
        check_no_leak(built, VOCABULARY, 32, "cpu")


def test_leak_test_refuses_a_model_that_attends_to_nothing(plain):
    built = training(plain)
    built.attend = lambda query, key, value, packing, scale: torch.zeros_like(query).transpose(1, 2)
    with pytest.raises(TrainingStopped, match="do not see the ones before them"):
        check_no_leak(built, VOCABULARY, 32, "cpu")


# --- the start gate ---------------------------------------------------------------------------------------------------


class Watched:
    """A source of two layers that computes nothing; every tensor that it makes is watched."""

    title, num_layers, vocab_size, max_positions = "watched", 2, 4, 8

    def __init__(self) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []

    def _new(self, *shape: int) -> torch.Tensor:
        tensor = torch.zeros(shape)
        self.made.append(weakref.ref(tensor))
        return tensor

    def begin(self, runs: Sequence[Any]) -> None:
        for each in runs:
            each.hidden = self._new(1, each.tokens.shape[1], 3)

    def advance(self, layer: int, runs: Sequence[Any]) -> None:
        self.begin(runs)

    def finish(self, runs: Sequence[Any]) -> None:
        self.begin(runs)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        return self._new(stop - start, 3)


def test_the_gate_gives_back_what_it_took_of_a_gpu(monkeypatch):
    side, held = Watched(), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append([ref() for ref in side.made]))
    row = np.array([[0, 1, 2, 0, 1]])
    found = source_loss(side, Batch(input_ids=row, positions=row, labels=row, rows=()))
    assert found.loss == pytest.approx(np.log(4))  # all are alike
    assert len(side.made) > 3
    assert held == [[None] * len(side.made)]


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def test_two_ranks_of_zero_3_train_as_plain_torch_on_each_document(monkeypatch, tmp_path):
    """Also with activation checkpointing, a tiled MLP, accumulation, and the leak test before the first step."""
    plain = hf_models.smollm3()
    names = tuple(name for name, _ in plain.named_parameters())
    groups = [Group(names=names[1:], weight_decay=0.1, eps=1e-4), Group(names=names[:1], eps=1e-4)]
    batches = np.random.default_rng(0).integers(0, VOCABULARY, (2, 4, 33))
    weights = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    jobs = []
    checkpointed = {"activation_checkpointing": True}
    choices: list[dict[str, Any]] = [{}, checkpointed, {"tile_tokens": 9}, {**checkpointed, "tile_tokens": 9}]
    for i, fields in enumerate(choices):
        (tmp_path / str(i)).mkdir()
        config = config_of(plain, tmp_path / str(i), **fields)
        jobs.append(Job(config=config, stage=3, groups=groups, weights=weights, batches=batches, micro_batch_rows=1))
    monkeypatch.setattr(real_deepspeed, "WORKER", Path(__file__).parent / "training_model_worker.py")
    results = continue_with_deepspeed(jobs, 2, tmp_path)

    def mean_loss(theirs: Any, tokens: torch.Tensor) -> torch.Tensor:
        given = packed(tokens)
        return plain_loss(theirs, given) / (given.labels != -100).sum()

    monkeypatch.setattr(real_deepspeed, "language_model_loss", mean_loss)
    assert random_model(jobs[0].config).config._attn_implementation == "eager"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    expected = plain_adamw(jobs[0].config, weights, zeros, zeros, 0, groups, batches, micro_batches=4)
    assert abs(expected.losses[0] - expected.losses[1]) > 1e-3
    for result in results:
        assert result.losses == pytest.approx(expected.losses, rel=1e-6)
        for name, master in result.trained.masters.items():
            assert (master - expected.masters[name]).abs().max() <= 2e-6 * expected.masters[name].abs().max(), name
