"""Run calls with their arguments made beforehand: what a C++ trainer does, without Python's share of the time."""

from __future__ import annotations

import ctypes

import torch

from blockem import _arrays, _ffi
from blockem._core import Plan
from blockem._library import check, library


class Call:
    """One function of the library on fixed tensors, on the stream that is current when it is called."""

    def __init__(self, function: str, plan: Plan, args: ctypes.Structure, owners: tuple) -> None:
        self.function = getattr(library, function)
        self.handle, self.args, self.owners = plan._handle.pointer, ctypes.byref(args), (plan, args, owners)
        on_gpu = plan.device.startswith("cuda")
        self.stream = (lambda: ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)) if on_gpu else lambda: None

    def __call__(self) -> None:
        check(self.function(self.handle, self.args, self.stream()))


def encode(plan: Plan, hidden: torch.Tensor, latents: torch.Tensor) -> Call:
    address, size, workspace = _workspace(plan, hidden)
    args = _ffi.EncodeArgs(hidden=_rows(hidden), latents=_rows(latents), workspace=address, workspace_size=size)
    return Call("blockem_encode", plan, args, (workspace, hidden, latents))


def penalty(
    function: str,
    plan: Plan,
    hidden: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor | None = None,
    coef: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    latent_loss: torch.Tensor | None = None,
    scale_tensor: torch.Tensor | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
) -> Call:
    """blockem_penalty_forward, blockem_penalty_backward or blockem_penalty; sums is [2]: loss_sum, token_count."""
    address, size, workspace = _workspace(plan, hidden)
    args = _ffi.PenaltyArgs(accumulate=accumulate, scale=scale, workspace=address, workspace_size=size)
    tensors = {"hidden": hidden, "reference": reference, "coef": coef, "grad_hidden": grad}
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(args, name, _rows(tensor))
    vectors = {"mask": mask, "latent_loss": latent_loss, "scale_tensor": scale_tensor}
    if sums is not None:
        vectors |= {"loss_sum": sums[:1], "token_count": sums[1:]}
    for name, tensor in vectors.items():
        if tensor is not None:
            setattr(args, name, _arrays.tensor(name, tensor, tuple(tensor.shape), tuple(tensor.stride())))
    return Call(function, plan, args, (workspace, *tensors.values(), *vectors.values()))


def _workspace(plan: Plan, hidden: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """Address, size and owner."""
    size = ctypes.c_size_t()
    check(library.blockem_plan_workspace_size(plan._handle.pointer, len(hidden), ctypes.byref(size)))
    memory = torch.empty(size.value + 64, dtype=torch.uint8, device=hidden.device)
    return memory.data_ptr() + -memory.data_ptr() % 64, size.value, memory


def _rows(tensor: torch.Tensor) -> _ffi.Tensor:
    return _arrays.tensor("tensor", tensor, tuple(tensor.shape), tuple(tensor.stride()))
