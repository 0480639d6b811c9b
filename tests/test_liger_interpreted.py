"""Liger's real kernels on a CPU, in Triton's interpreter, by our wiring: what they compute and what they are given.

``make test-liger`` has an environment with both. Rotation is left out: we give Liger's only what lies on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hf_models
import pytest
import torch

from smolconv.continual_pretraining.engine import model
from smolconv.continual_pretraining.recipe import schema as recipe

pytestmark = pytest.mark.liger
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Liger's kernels need Triton's interpreter on a CPU: make test-liger", allow_module_level=True)
liger = pytest.importorskip("liger_kernel.transformers", reason="make test-liger installs liger-kernel and triton")

#: Of the norm of a gradient, in float32 by kernels beside float64 by torch; 9e-7 was seen.
MAX_ERROR = 1e-5


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that ran. Triton 3.9's interpreter lacks two things that Liger's RMSNorm and SwiGLU need."""
    import liger_kernel.ops.rms_norm as norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    tensor_of, ran = interpreter._implicit_cvt, list[str]()

    def with_numbers(argument: Any) -> Any:
        if isinstance(argument, float):  # has no .to; on a GPU, an argument is a tensor
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return tensor_of(argument)

    executed = interpreter.GridExecutor.__call__

    def noted(executor: Any, *args: Any, **options: Any) -> Any:
        ran.append(executor.fn.__name__)
        return executed(executor, *args, **options)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_numbers)
    # CUDA's own has no body, and the interpreter replaces Triton's where it is looked up as a kernel runs.
    monkeypatch.setattr(norm, "rsqrt", lambda x: tl.rsqrt(x))  # noqa: PLW0108
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    torch.manual_seed(0)
    yield ran


def test_ligers_loss_and_gradients_are_those_of_float64(launches):
    hidden, weight = torch.randn(37, 48, requires_grad=True), torch.randn(101, 48, requires_grad=True)
    labels = torch.randint(0, 101, (37,))
    labels[3:6] = -100
    ours = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="sum", accum_dtype=torch.float32)
    loss = ours(weight, hidden, labels)
    loss.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels, ignore_index=-100, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, right in zip((hidden, weight), exact):
        assert error(found.grad, right.grad) < MAX_ERROR
    assert not hidden.grad[3:6].any()
    assert "liger_cross_entropy_kernel" in launches


def error(found: Any, expected: Any) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def built(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch | None = None) -> Any:
    """With Liger where a ``monkeypatch`` is given, and in float64 where none is."""
    if monkeypatch is None:
        return model.build_model(config, recipe.Model(source="-", dtype="float32", liger="off"), "cpu").double()
    chosen = model._wanted_liger
    with monkeypatch.context() as patched:  # as if it were on a GPU
        patched.setattr(model, "_wanted_liger", lambda asked, device, name: chosen(asked, "cuda", name))
        return model.build_model(config, recipe.Model(source="-", dtype="float32", liger="on"), "cpu")


def run(trained: Any, tokens: Any, labels: Any) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in (7, 1, 12)])[None]
    total, targets = trained(input_ids=tokens, positions=positions, labels=labels)
    (total / targets).backward()
    return (total / targets).detach()


@pytest.mark.parametrize("make", [hf_models.llama, hf_models.smollm3])
def test_a_model_with_ligers_kernels_has_the_loss_and_gradients_of_float64(monkeypatch, launches, make):
    config = make().config.to_dict()
    ours, exact = built(config, monkeypatch), built(config)
    with torch.no_grad():
        for found, right in zip(ours.parameters(), exact.parameters()):
            found.normal_(std=0.1).add_(float(found.dim() == 1))  # norms around 1
            right.copy_(found)
    tokens = torch.randint(0, config["vocab_size"], (1, 20))
    labels = tokens.roll(-1, 1)
    labels[0, [6, 7, 19]] = -100
    loss, expected = run(ours, tokens, labels), run(exact, tokens, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    worst = max(error(one.grad, two.grad) for one, two in zip(ours.parameters(), exact.parameters()))
    assert worst < MAX_ERROR
    kernels = {name for each in ("rms_norm", "swiglu", "cross_entropy") for name in launches if each in name}
    assert {"_rms_norm_forward_kernel", "_swiglu_forward_kernel", "liger_cross_entropy_kernel"} <= kernels
    assert {"_rms_norm_backward_kernel", "_swiglu_backward_kernel"} <= kernels
    # And the comparison notices a norm that is off by a thousandth.
    with torch.no_grad():
        ours.model.norm.weight.mul_(1.001)
    ours.zero_grad(), exact.zero_grad()
    run(ours, tokens, labels), run(exact, tokens, labels)
    assert max(error(one.grad, two.grad) for one, two in zip(ours.parameters(), exact.parameters())) > MAX_ERROR
