"""Same bits everywhere: whatever shares the batch, the plan, the call or the machine's threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracle import ARCHITECTURES, Case

import blockem

# Seconds after which a child that takes milliseconds hangs, however busy the machine is.
HANGS = 600
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def hidden_of(case: Case, tokens: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(case.hidden(tokens, seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_does_not_depend_on_its_batch(architecture: str, dtype: torch.dtype) -> None:
    case = Case(architecture, "native", 77, 13)
    plan, hidden = case.plan(), hidden_of(case, 97, dtype)
    z = plan.encode(hidden)
    order = torch.randperm(97)
    assert torch.equal(plan.encode(hidden[order]), z[order])
    for start, stop in [(0, 1), (1, 2), (3, 20), (20, 97)]:
        assert torch.equal(plan.encode(hidden[start:stop]), z[start:stop])
    wide = torch.zeros(97, 200, dtype=dtype)
    wide[:, 5:82] = hidden
    assert torch.equal(plan.encode(wide[:, 5:82]), z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_latent_does_not_depend_on_its_plan(dtype: torch.dtype) -> None:
    case = Case("jumprelu", "native", 130, 21)
    z = case.plan().encode(hidden_of(case, 40, dtype))
    for chosen in ([0], [20, 3], list(range(5, 19)), list(range(21))[::-1]):
        plan = blockem.Plan(case.sae, blockem.Latents(case.ids[chosen], case.signs[chosen]))
        assert torch.equal(plan.encode(hidden_of(case, 40, dtype)), z[:, chosen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    case = Case("gated", "native", 64, 9)
    hidden, base = hidden_of(case, 3000, dtype), hidden_of(case, 3000, dtype, seed=2)
    one = case.plan(num_threads=1)
    reference = one.encode(base)
    want = one.penalty(hidden, reference, per_latent=True, coef=True)
    for threads in (2, 3, 0):
        plan = case.plan(num_threads=threads)
        assert plan.identity == one.identity and plan.numerics == one.numerics
        assert torch.equal(plan.encode(base), reference)
        got = plan.penalty(hidden, reference, per_latent=True, coef=True)
        assert (got.loss_sum, got.token_count) == (want.loss_sum, want.token_count)
        assert torch.equal(got.latent_loss, want.latent_loss)
        assert torch.equal(got.coef, want.coef)
        assert torch.equal(got.grad_hidden, want.grad_hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_equal_to_base_gives_exactly_zero(architecture: str, dtype: torch.dtype) -> None:
    for activation in ("native", "dense_relu", "preactivation"):
        case = Case(architecture, activation, 100, 10)
        plan, hidden = case.plan(), hidden_of(case, 333, dtype)
        got = plan.penalty(hidden[100:], plan.encode(hidden)[100:])
        assert got.loss_sum == 0 and not got.grad_hidden.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_is_forward_and_backward(dtype: torch.dtype) -> None:
    case = Case("standard", "native", 70, 6)
    plan, hidden = case.plan(), hidden_of(case, 500, dtype)
    reference = plan.encode(hidden_of(case, 500, dtype, seed=2))
    fused = plan.penalty(hidden, reference)
    tensor = hidden.clone().requires_grad_()
    loss_sum, count = blockem.torch.penalty(plan, tensor, reference)
    loss_sum.backward()
    assert loss_sum.item() == np.float32(fused.loss_sum) and count.item() == 500
    assert torch.equal(tensor.grad, fused.grad_hidden)


def test_many_threads_share_a_plan() -> None:
    case = Case("standard", "native", 64, 8)
    plan, hidden = case.plan(), hidden_of(case, 700, torch.float32)
    reference = torch.zeros(700, 8)
    want = plan.penalty(hidden, reference)

    def work(i: int) -> bool:
        # Different sizes, so that threads would notice a shared workspace.
        part = slice(0, 700 - i % 3)
        got = plan.penalty(hidden[part], reference[part])
        whole = part.stop < 700 or got.loss_sum == want.loss_sum
        return whole and torch.equal(got.grad_hidden, want.grad_hidden[part])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_calls_release_the_gil() -> None:
    case = Case("standard", "native", 512, 64)
    plan, hidden = case.plan(backend="reference"), case.hidden(500)
    ticks, done, during = 0, threading.Event(), 0

    def work() -> None:
        nonlocal during
        # A busy machine may give the other thread no time in one call, but not in hundreds.
        for _ in range(500):
            before = ticks
            plan.encode(hidden)
            during = ticks - before
            if during:
                break
        done.set()

    interval = sys.getswitchinterval()
    # A thread gives up the GIL of its own accord, or never.
    sys.setswitchinterval(1e6)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        while not done.is_set():
            time.sleep(0)
            ticks += 1
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert during


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_and_exits() -> None:
    case = Case("standard", "native", 64, 8)
    plan, hidden = case.plan(num_threads=2), case.hidden(4000)
    want = plan.encode(hidden)
    child = os.fork()
    if child == 0:
        same = np.array_equal(plan.encode(hidden), want)
        again = np.array_equal(case.plan().encode(hidden), want)
        del plan
        os._exit(0 if same and again else 1)
    for _ in range(10 * HANGS):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def _child(plan: blockem.Plan, hidden: np.ndarray, queue: multiprocessing.Queue) -> None:
    queue.put(plan.encode(hidden))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_worker_ends_like_any_interpreter() -> None:
    case = Case("standard", "native", 64, 8)
    plan, hidden = case.plan(num_threads=2), case.hidden(1000)
    want = plan.encode(hidden)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_child, args=(plan, hidden, queue))
    worker.start()
    np.testing.assert_array_equal(queue.get(timeout=HANGS), want)
    worker.join(HANGS)
    assert worker.exitcode == 0
