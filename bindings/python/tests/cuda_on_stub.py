"""What test_cuda.py runs on the stub driver: python cuda_on_stub.py CASE.

torch has no CUDA here, so tensors of a device are host tensors that say that they are one, and the
stub is told of their memory. Kernels do not run: outputs are whatever memory held.
"""

from __future__ import annotations

import ctypes
import sys
import types

import numpy as np
import torch
from oracle import Case

import blockem
import blockem.torch
from blockem import _steering

STREAM = 0


class OnDevice(torch.Tensor):
    """A host tensor that passes for one of cuda:0."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    def data_ptr(self) -> int:
        pointer = super().data_ptr()
        size = self.untyped_storage().nbytes()
        stub.stub_adopt(0, ctypes.c_void_p(pointer), ctypes.c_size_t(size))
        return pointer


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnDevice)


def pretend_cuda(stream: int) -> None:
    """torch.empty makes such tensors, and the current stream is this one."""
    host_empty = torch.empty

    def empty(*args: object, device: object = None, **options: object) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            return on_device(host_empty(*args, **options))
        return host_empty(*args, device=device, **options)

    torch.empty = empty
    torch.cuda.current_stream = lambda device=None: types.SimpleNamespace(cuda_stream=stream)


def launches() -> list[tuple[str, int]]:
    class Launch(ctypes.Structure):
        _fields_ = [("kernel", ctypes.c_char_p), ("stream", ctypes.c_void_p)]

    stub.stub_launch_at.restype = ctypes.POINTER(Launch)
    found, i = [], 0
    while launch := stub.stub_launch_at(i):
        found.append((launch.contents.kernel.decode(), launch.contents.stream))
        i += 1
    stub.stub_reset()
    return found


def calls(case: Case) -> None:
    plan = case.plan(device="cuda:0")
    assert (plan.device, plan.backend, plan.num_threads) == ("cuda:0", "cuda", 0)
    assert plan.numerics.startswith("cuda-")
    assert stub.stub_current() is None, "the current context changed"

    stub.stub_context.restype = stub.stub_stream.restype = ctypes.c_void_p
    primary = ctypes.c_void_p(stub.stub_context(0, 1))
    stream = stub.stub_stream(primary)
    pretend_cuda(stream)
    hidden = on_device(torch.zeros(5, 2, case.d_in, dtype=torch.bfloat16))
    stub.stub_reset()

    latents = plan.encode(hidden)
    assert latents.shape == (5, 2, plan.num_latents) and latents.device.type == "cuda"
    [(kernel, used)] = launches()
    # For so few latents compute capability 9.0 has a kernel that does all at once.
    sm90 = plan.numerics.endswith("-sm90")
    encode, gradient = ("resident", "resident") if sm90 else ("encode", "gradient")
    assert kernel.startswith(f"blockem_{encode}_bf16") and used == stream

    reference = on_device(torch.zeros(5, 2, plan.num_latents))
    mask = on_device(torch.ones(5, 2, dtype=torch.bool))
    found = plan.penalty(hidden, reference, mask)
    assert found.grad_hidden.dtype == torch.bfloat16
    ran = launches()
    assert ran[0][0].startswith(f"blockem_{encode}_bf16") and ran[-1][0] == "blockem_reduce_latents"
    assert {used for _, used in ran} == {stream}

    # Autograd: forward keeps coefficients, backward reads the upstream gradient on the device.
    hidden = on_device(torch.zeros(10, case.d_in)).requires_grad_()
    reference = on_device(torch.zeros(10, plan.num_latents))
    loss_sum, count = blockem.torch.penalty(plan, hidden, reference)
    assert loss_sum.device.type == count.device.type == "cuda"
    assert any(kernel.startswith(f"blockem_{encode}_f32") for kernel, _ in launches())
    loss_sum.backward(on_device(torch.ones(())))
    ran = launches()
    assert [kernel.startswith(f"blockem_{gradient}_f32") for kernel, _ in ran] == [True]
    assert {used for _, used in ran} == {stream}
    assert hidden.grad.shape == hidden.shape

    # Statistics, with their state on the device.
    stats = blockem.Stats(case.sae, device="cuda:0")
    launches()
    stats.update(hidden.detach(), on_device(torch.zeros(10, case.d_in)))
    ran = launches()
    assert [kernel for kernel, _ in ran][-1] == "blockem_stats" and len(ran) == 3
    assert {used for _, used in ran} == {stream}
    assert stats._state.device.type == "cuda" and stats._state.dtype == torch.float64

    # Steering, with its conditions on the device.
    sae = blockem.Sae.from_tensors(
        encoder_weight=np.ones((4, 3), np.float32), encoder_bias=np.zeros(4, np.float32),
        encoder_layout="f_d", decoder_weight=np.ones((4, 3), np.float32),
    )
    steering = blockem.Steering(sae, [1, 3], device="cuda:0")
    assert (steering.device, steering.backend, steering.num_threads) == ("cuda:0", "cuda", 0)
    launches()
    conditions = _steering.Conditions(on_device(torch.tensor([1, -1])), on_device(torch.ones(2)))
    pushed = on_device(torch.zeros(2, 5, 3, dtype=torch.bfloat16))
    assert steering._run(pushed, conditions, on_device(torch.ones(2, 5)), 2.0) is pushed
    assert launches() == [("blockem_steer", stream)]
    assert blockem.token_norms(pushed).shape == (2, 5)
    assert launches() == [("blockem_token_norms", stream)]

    # What lies elsewhere is refused, whatever it says.
    for bad in (torch.zeros(4, case.d_in), np.zeros((4, case.d_in), np.float32)):
        expect("DEVICE_MISMATCH", 106, lambda: plan.encode(bad))
    expect("DEVICE_MISMATCH", 106, lambda: case.plan().encode(hidden.detach()))
    expect("INVALID_ARGUMENT", 100, lambda: case.plan(device="cuda:9"))
    other = ctypes.c_void_p(stub.stub_context(0, 0))
    pretend_cuda(stub.stub_stream(other))
    expect("INVALID_ARGUMENT", 100, lambda: plan.encode(hidden.detach()))


def expect(name: str, status: int, call: object) -> None:
    try:
        call()
    except blockem.Error as error:
        assert (error.name, error.status) == (name, status), error
    else:
        raise AssertionError(f"no {name}")


def main(what: str) -> None:
    case = Case("standard", "native", 8, 3)
    if what == "calls":
        calls(case)
    else:
        name, _, status = what.partition("=")
        expect(name, int(status), lambda: case.plan(device="cuda:0"))


stub = ctypes.CDLL("libcuda.so.1")
stub.stub_stream.argtypes = [ctypes.c_void_p]
stub.stub_current.restype = ctypes.c_void_p
main(sys.argv[1])
