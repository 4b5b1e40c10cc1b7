"""blockem.torch.penalty: values, gradients and manners of a torch function."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch._dynamo.testing
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
        assert [tuple(x.shape) for x in saved] == [(4, 5, 6), ()]  # coefficients, and loss_sum
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


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(small, use_reentrant: bool) -> None:
    _, plan, hidden, reference = small
    layer, calls = torch.nn.Linear(24, 24), []

    def step(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return blockem.torch.penalty(plan, layer(x), reference)[0]

    loss = step(hidden)
    loss.backward()
    want = layer.weight.grad.clone()
    layer.zero_grad()
    again = torch.utils.checkpoint.checkpoint(
        step, hidden.requires_grad_(), use_reentrant=use_reentrant
    )
    again.backward()
    assert len(calls) == 3 and torch.equal(again, loss) and torch.equal(layer.weight.grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_hidden_in_its_dtype(small, dtype: torch.dtype) -> None:
    _, plan, hidden, reference = small
    results = []
    for enabled in (False, True):
        x = hidden.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            loss_sum, _ = blockem.torch.penalty(plan, x, reference)
            z = blockem.torch.encode(plan, x)
        loss_sum.backward()
        assert loss_sum.dtype == z.dtype == torch.float32 and x.grad.dtype == dtype
        results.append((loss_sum, z, x.grad))
    assert all(map(torch.equal, *results))


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


def test_per_latent_shares(small) -> None:
    _, plan, hidden, reference = small
    mask = torch.rand(4, 5) > 0.4
    parts = blockem.torch.penalty(plan, hidden.requires_grad_(), reference, mask, per_latent=True)
    loss_sum, count = blockem.torch.penalty(plan, hidden, reference, mask)
    want = plan.penalty(hidden, reference, mask, per_latent=True)
    assert torch.equal(parts.loss_sum, loss_sum) and torch.equal(parts.count, count)
    assert parts.loss_sum.requires_grad and not parts.latent_loss.requires_grad
    torch.testing.assert_close(parts.latent_loss.double(), want.latent_loss)
    assert parts.latent_loss.shape == (6,) and parts.latent_loss.sum() > 0


def test_encode(small) -> None:
    _, plan, hidden, _ = small
    z = blockem.torch.encode(plan, hidden.requires_grad_())
    assert torch.equal(z, plan.encode(hidden)) and not z.requires_grad
    compiled = torch.compile(lambda x: blockem.torch.encode(plan, 2 * x) + 1, fullgraph=True,
                             backend="aot_eager")
    assert torch.equal(compiled(hidden), plan.encode(2 * hidden) + 1)


@pytest.mark.parametrize("per_latent", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(small, dtype: torch.dtype, masked: bool, per_latent: bool) -> None:
    case, _, hidden, reference = small
    plan = case.plan(backend="reference" if dtype == torch.float64 else "auto")
    key, x = plan._key, hidden.to(dtype).requires_grad_()
    mask = torch.rand(4, 5) > 0.4 if masked else None
    forward = torch.ops.blockem.penalty_forward
    torch.library.opcheck(forward, (key, x, reference, mask, per_latent))
    loss_sum, _, _, coef = forward(key, x.detach(), reference, mask, per_latent)
    torch.library.opcheck(torch.ops.blockem.penalty_backward,
                          (key, coef, torch.ones_like(loss_sum), loss_sum, None, dtype))
    torch.library.opcheck(torch.ops.blockem.encode, (key, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [True, False, None])
def test_compiled_training_step(small, dynamic: bool | None, backend: str) -> None:
    """One graph, and the values of the uncompiled step."""
    _, plan, hidden, _ = small

    def step(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        reference = blockem.torch.encode(plan, x.detach() * 0.5)
        loss_sum, count, shares = blockem.torch.penalty(plan, 2 * x, reference, mask,
                                                        per_latent=True)
        return 3 * loss_sum / count + shares.max()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (4, 3, 2):
        mask = torch.rand(rows, 5) > 0.3
        x, y = (hidden[:rows].clone().requires_grad_() for _ in range(2))
        want, found = step(x, mask), compiled(y, mask)
        want.backward()
        found.backward()
        assert torch.equal(found, want) and torch.equal(x.grad, y.grad)
        assert x.grad.abs().max() > 0


def test_dynamic_shapes_compile_once(small) -> None:
    _, plan, hidden, reference = small
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x, r: blockem.torch.penalty(plan, x, r)[0], fullgraph=True,
                         dynamic=True, backend=counter)
    for rows in (4, 3, 2):
        x = hidden[:rows].clone().requires_grad_()
        step(x, reference[:rows].clone()).backward()
    assert counter.frame_count == 1


def test_a_dead_plan_is_an_error(small) -> None:
    case, _, hidden, reference = small
    plan = case.plan()
    key = plan._key
    loss_sum, _ = blockem.torch.penalty(plan, hidden.requires_grad_(), reference)
    del plan
    loss_sum.backward()  # The graph keeps it.
    del loss_sum
    gc.collect()
    with pytest.raises(ValueError, match="plan .* is no more: keep the Plan"):
        torch.ops.blockem.penalty_forward(key, hidden, reference, None, False)


def test_vmap_and_func_grad(small) -> None:
    _, plan, hidden, reference = small
    mask = torch.rand(4, 5) > 0.3

    def loss(x: torch.Tensor, r: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return 2 * blockem.torch.penalty(plan, x, r, m)[0]

    x, y = (hidden.clone().requires_grad_() for _ in range(2))
    loss(x, reference, mask).backward()
    each = torch.vmap(loss)(y, reference, mask)
    assert torch.equal(each, torch.stack([loss(*one) for one in zip(hidden, reference, mask)]))
    each.sum().backward()
    assert torch.equal(y.grad, x.grad)
    z = torch.vmap(lambda h: blockem.torch.encode(plan, h), in_dims=1)(hidden)
    assert torch.equal(z.transpose(0, 1), plan.encode(hidden))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(hidden, reference, mask)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
def test_the_gradient_goes_through_a_norm_and_the_latents_that_win(norm: str, compiled: bool) -> None:
    """The backward pass of an SAE that normalises every token keeps hidden; autograd agrees."""
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 16), 0.1 * torch.randn(40)
    sae = blockem.Sae.from_tensors(
        encoder_weight=weight, encoder_bias=bias, encoder_layout="f_d", architecture="topk", k=9,
        token_norm=norm,
    )
    ids = [3, 0, 21, 39]
    plan = blockem.Plan(sae, blockem.Latents(ids, [1, 1, 1, 1]))
    assert plan.encode_needs_workspace and plan.backward_needs_hidden
    hidden = (torch.randn(2, 30, 16) + 0.4).requires_grad_()
    call = blockem.torch.penalty
    call = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    loss_sum, count = call(plan, hidden, torch.zeros(2, 30, 4))
    (found,) = torch.autograd.grad(2.5 * loss_sum, hidden)

    x = hidden.double()
    if norm == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.std(-1, keepdim=True) + 1e-5)
    else:
        x = x * 4 / x.norm(dim=-1, keepdim=True)
    pre = x @ weight.double().T + bias.double()
    kth = pre.topk(9, dim=-1).values[..., -1:]
    z = torch.where(pre >= kth, pre.relu(), 0)[..., ids]
    want_sum = (z**2).sum()
    (want,) = torch.autograd.grad(2.5 * want_sum, hidden)
    assert loss_sum.item() == pytest.approx(want_sum.item(), rel=1e-5) and count == 60
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
