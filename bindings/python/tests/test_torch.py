"""blockem.torch.penalty: values, gradients and manners of a torch function."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracle import ACTIVATIONS, ARCHITECTURES, Case

import blockem
from blockem import _arrays


def formula(case: Case, hidden: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor):
    """The penalty in torch's own operations, float64."""
    a = {name: torch.from_numpy(x).double() for name, x in case.arrays.items()}
    ids = torch.from_numpy(case.ids)
    g = hidden.double() @ a["encoder_weight"][ids].T
    if case.architecture == "gated":
        pre = a["magnitude_log_scale"][ids].exp() * g + a["magnitude_bias"][ids]
    else:
        pre = g + a["encoder_bias"][ids]
    if case.activation == "preactivation":
        z = pre
    elif case.activation == "native" and case.architecture == "jumprelu":
        z = pre * (pre > a["threshold"][ids])
    elif case.activation == "native" and case.architecture == "gated":
        z = pre.relu() * (g + a["gate_bias"][ids] > 0)
    else:
        z = pre.relu()
    rise = (torch.from_numpy(case.signs) * (z - reference)).relu()
    return (mask[..., None] * torch.from_numpy(case.weights).double() * rise**2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_against_torch_autograd(architecture: str, activation: str, dtype: torch.dtype) -> None:
    case = Case(architecture, activation, 45, 8)
    plan = case.plan(backend="reference" if dtype == torch.float64 else "auto")
    hidden = torch.from_numpy(case.hidden(30)).reshape(5, 6, 45).to(dtype).requires_grad_()
    reference = plan.encode(torch.from_numpy(case.hidden(30, seed=8)).reshape(5, 6, 45).to(dtype))
    mask = torch.rand(5, 6) * (torch.rand(5, 6) > 0.3)

    loss_sum, count = blockem.torch.penalty(plan, hidden, reference, mask)
    (0.3 * loss_sum / count).backward()

    other = hidden.detach().double().requires_grad_()
    want = formula(case, other, reference.double(), mask.double())
    (0.3 * want / mask.double().sum()).backward()
    eps = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    assert loss_sum.shape == count.shape == ()
    assert loss_sum.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss_sum.double(), want, rtol=1e-4, atol=1e-6)
    assert count.item() == pytest.approx(mask.double().sum().item())
    assert hidden.grad.dtype == dtype
    top = other.grad.abs().max().item()
    torch.testing.assert_close(
        hidden.grad.double(), other.grad, rtol=eps[dtype], atol=top * eps[dtype]
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradcheck(architecture: str, activation: str) -> None:
    case = Case(architecture, activation, 6, 4)
    plan = case.plan(backend="reference")
    hidden = torch.from_numpy(case.hidden(5)).double().requires_grad_()
    reference = torch.from_numpy(case.latent(case.hidden(5, seed=3)).z)
    mask = torch.tensor([1, 0.5, 0, 2, 1])
    assert torch.autograd.gradcheck(
        lambda h: blockem.torch.penalty(plan, h, reference, mask)[0], (hidden,)
    )


@pytest.fixture
def small() -> tuple[Case, blockem.Plan, torch.Tensor, torch.Tensor]:
    case = Case("standard", "native", 24, 6)
    hidden = torch.from_numpy(case.hidden(20)).reshape(4, 5, 24)
    return case, case.plan(), hidden, torch.zeros(4, 5, 6)


def test_saves_coefficients_only(small) -> None:
    _, plan, hidden, reference = small
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        blockem.torch.penalty(plan, hidden.requires_grad_(), reference)
        assert [tuple(x.shape) for x in saved] == [(20, 6)]
        saved.clear()
        blockem.torch.penalty(plan, hidden.detach(), reference)
        with torch.no_grad():
            loss_sum, _ = blockem.torch.penalty(plan, hidden, reference)
    assert saved == [] and not loss_sum.requires_grad


def test_no_grad_and_inference_mode_give_the_same_bits(small) -> None:
    _, plan, hidden, reference = small
    want, _ = blockem.torch.penalty(plan, hidden.clone().requires_grad_(), reference)
    with torch.no_grad():
        assert torch.equal(blockem.torch.penalty(plan, hidden, reference)[0], want)
    with torch.inference_mode():
        assert torch.equal(blockem.torch.penalty(plan, hidden, reference)[0], want)


def test_retain_graph(small) -> None:
    _, plan, hidden, reference = small
    loss_sum, _ = blockem.torch.penalty(plan, hidden.requires_grad_(), reference)
    first, = torch.autograd.grad(loss_sum, hidden, retain_graph=True)
    second, = torch.autograd.grad(loss_sum, hidden)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss_sum, hidden)


def test_second_derivative_is_refused(small) -> None:
    _, plan, hidden, reference = small
    loss_sum, _ = blockem.torch.penalty(plan, hidden.requires_grad_(), reference)
    grad, = torch.autograd.grad(loss_sum, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()
    loss_sum, _ = blockem.torch.penalty(plan, hidden, reference)
    grad, = torch.autograd.grad(loss_sum**2, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


def test_count_and_reference_get_no_gradient(small) -> None:
    _, plan, hidden, reference = small
    reference.requires_grad_()
    loss_sum, count = blockem.torch.penalty(plan, hidden.requires_grad_(), reference)
    assert not count.requires_grad
    loss_sum.backward()
    assert reference.grad is None


@pytest.mark.parametrize(
    "make, copies",
    [
        (lambda x: x, False),
        (lambda x: x[:, 1:4], True),
        (lambda x: x[1:3], False),
        (lambda x: x[:, 2], False),
        (lambda x: x[..., :24], False),
        (lambda x: x[:, ::2][..., :24], True),
        (lambda x: x.reshape(2, 2, 5, 30)[:, :, :, 3:27], False),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[:1, :1].expand(4, 5, 30), False),
        (lambda x: x.transpose(1, 2), True),
    ],
)
def test_views(make: object, copies: bool) -> None:
    view = make(torch.randn(4, 5, 30, requires_grad=True))
    case = Case("standard", "native", view.shape[-1], 6)
    plan = case.plan()
    assert (_arrays.rows("hidden", view).owner is not view) == copies
    reference = torch.zeros(*view.shape[:-1], 6)
    view.retain_grad()
    loss_sum, _ = blockem.torch.penalty(plan, view, reference)
    loss_sum.backward()
    dense = view.detach().contiguous().requires_grad_()
    want, _ = blockem.torch.penalty(plan, dense, reference)
    want.backward()
    assert torch.equal(loss_sum, want) and torch.equal(view.grad, dense.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_gradient_accumulation(dtype: torch.dtype) -> None:
    """Sums over micro-batches, divided once, are the whole batch, ragged masks or not."""
    torch.manual_seed(0)
    case = Case("standard", "native", 32, 6)
    plan, block = case.plan(), torch.nn.Linear(16, 32).to(dtype)
    inputs, mask = torch.randn(8, 10, 16, dtype=dtype), torch.rand(8, 10) > 0.6
    reference = plan.encode(block(inputs).detach())
    trained = copy.deepcopy(block)
    with torch.no_grad():
        trained.weight += 0.1 * torch.randn(32, 16)

    def gradient(micro: int) -> torch.Tensor:
        trained.zero_grad()
        count = mask.sum()
        for i in range(0, 8, micro):
            part = slice(i, i + micro)
            hidden = trained(inputs[part])
            loss_sum, _ = blockem.torch.penalty(plan, hidden, reference[part], mask[part])
            (hidden.float().square().mean() * 0 + loss_sum / count).backward()
        return trained.weight.grad.clone()

    whole = gradient(8)
    assert whole.abs().max() > 0
    near = 1e-6 if dtype == torch.float32 else 2e-3
    for micro in (1, 2, 4):
        torch.testing.assert_close(gradient(micro), whole, rtol=20 * near, atol=near)

    optimizer = torch.optim.SGD(trained.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss_sum, count = blockem.torch.penalty(plan, trained(inputs), reference, mask)
        (loss_sum / count).backward()
        optimizer.step()
        losses.append((loss_sum / count).item())
    assert losses[-1] < 0.7 * losses[0]


def test_no_tokens(small) -> None:
    _, plan, hidden, reference = small
    empty = hidden[:0].clone().requires_grad_()
    loss_sum, count = blockem.torch.penalty(plan, empty, reference[:0])
    loss_sum.backward()
    assert loss_sum.item() == count.item() == 0 and empty.grad.shape == (0, 5, 24)


def test_gradient_checkpointing_and_autocast(small) -> None:
    _, plan, hidden, reference = small
    layer = torch.nn.Linear(24, 24)

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return blockem.torch.penalty(plan, layer(x), reference)[0]

    step(hidden).backward()
    want = layer.weight.grad.clone()
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(step, hidden, use_reentrant=False).backward()
    assert torch.equal(layer.weight.grad, want)


def test_errors_name_the_argument(small) -> None:
    _, plan, hidden, reference = small
    call = blockem.torch.penalty
    for args, error, text in [
        ((plan, hidden[..., :-1], reference), ValueError, r"hidden.*\[4, 5, 23\].*\[\.\.\., 24\]"),
        ((plan, hidden, reference[:-1]), ValueError, r"reference.*\[3, 5, 6\].*\[4, 5, 6\]"),
        ((plan, hidden, reference, torch.ones(4)), ValueError, r"mask.*\[4\].*\[4, 5\]"),
        ((plan, hidden.long(), reference), ValueError, "hidden is int64"),
        ((plan, hidden.double(), reference), ValueError, "hidden is float64"),
        ((plan, hidden, reference.half()), ValueError, "reference is float16"),
        ((plan, hidden, reference, torch.ones(4, 5).long()), ValueError, "mask is int64"),
        ((plan, hidden.to("meta"), reference), ValueError, "hidden is on meta"),
        ((plan, hidden.cfloat(), reference), ValueError, "hidden is torch.complex64"),
        ((plan, hidden.numpy(), reference), TypeError, "hidden is a ndarray"),
        ((plan, hidden, reference, [1]), TypeError, "mask is a list"),
        ((hidden, plan, reference), TypeError, "plan is a Tensor"),
    ]:
        with pytest.raises(error, match=text):
            call(*args)


def test_deepcopy_of_a_module_that_holds_a_plan(small) -> None:
    _, plan, hidden, reference = small
    module = torch.nn.Identity()
    module.plan = plan
    assert copy.deepcopy(module).plan is plan and copy.copy(plan) is plan


def test_compiled_training_step(small) -> None:
    """torch.compile breaks the graph at the call and keeps its values."""
    _, plan, hidden, reference = small

    def step(x: torch.Tensor) -> torch.Tensor:
        loss_sum, count = blockem.torch.penalty(plan, 2 * x, reference)
        return loss_sum / count

    x = hidden.clone().requires_grad_()
    step(x).backward()
    y = hidden.clone().requires_grad_()
    torch.compile(step, backend="eager")(y).backward()
    np.testing.assert_array_equal(x.grad.numpy(), y.grad.numpy())
