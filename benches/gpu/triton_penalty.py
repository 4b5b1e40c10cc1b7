"""The penalty as one would write it in Triton: a peer for the benchmark, not a part of the library.

The rows are split into TERMS bf16 terms as ours are, so that one kernel serves both accuracies: one term is what a
bf16 trainer gets, three give z the accuracy of float32. Dots on tensor cores, loss by partial sums: no atomics.
"""

import torch
import triton
import triton.language as tl


def split(weight: torch.Tensor, terms: int) -> torch.Tensor:
    """[K, d] float32 as [terms, K rounded up to 16, d] bf16 whose sum it is, nearly."""
    count, width = weight.shape
    parts = weight.new_zeros(terms, -(-count // 16) * 16, width, dtype=torch.bfloat16)
    left = weight.clone()
    for part in parts:
        part[:count] = left.bfloat16()
        left -= part[:count].float()
    return parts


@triton.autotune(
    [
        triton.Config({"BT": bt, "BD": bd}, num_warps=warps, num_stages=stages)
        for bt in (16, 32, 64, 128)
        for bd in (64, 128)
        for warps in (4, 8)
        for stages in (3, 5)
    ],
    key=["T", "D", "KP", "TERMS"],
)
@triton.jit
def _forward(hidden, weight, bias, sign_weight, reference, mask, coef, partial, T, D, K, KP,
             TERMS: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    latent = tl.program_id(1) * BK + tl.arange(0, BK)
    kept = tl.load(mask + token, mask=token < T, other=0) != 0
    dot = tl.zeros((BT, BK), tl.float32)
    for start in range(0, D, BD):
        column = start + tl.arange(0, BD)
        inside = column < D
        h = tl.load(hidden + token[:, None].to(tl.int64) * D + column[None, :],
                    mask=kept[:, None] & inside[None, :], other=0.0)  # fmt: skip
        for term in tl.static_range(TERMS):
            w = tl.load(weight + (TERMS - 1 - term) * KP * D + latent[None, :] * D + column[:, None],
                        mask=inside[:, None] & (latent[None, :] < KP), other=0.0)  # fmt: skip
            dot = tl.dot(h, w, dot)
    inside = kept[:, None] & (latent[None, :] < K)
    at = token[:, None].to(tl.int64) * K + latent[None, :]
    pre = dot + tl.load(bias + latent, mask=latent < K, other=0.0)[None, :]
    sw = tl.load(sign_weight + latent, mask=latent < K, other=0.0)[None, :]
    z = tl.where(pre <= 0, 0.0, pre)
    gap = z - tl.load(reference + at, mask=inside, other=0.0)
    gap = tl.where(sw < 0, -gap, gap)
    rise = tl.where((gap <= 0) | ~inside, 0.0, gap)
    c = tl.where(pre <= 0, 0.0, 2 * sw * rise)
    tl.store(coef + at, c, mask=(token[:, None] < T) & (latent[None, :] < K))
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + program, tl.sum(tl.abs(sw) * rise * rise))


@triton.autotune(
    [
        triton.Config({"BT": bt, "BD": bd}, num_warps=warps)
        for bt in (32, 64, 128)
        for bd in (64, 128)
        for warps in (4, 8)
    ],
    key=["T", "D", "K", "ADD"],
    restore_value=["grad"],
)
@triton.jit
def _backward(coef, weight, grad, T, D, K, KP,
              ADD: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    out = tl.zeros((BT, BD), tl.float32)
    for start in range(0, K, BK):
        latent = start + tl.arange(0, BK)
        c = tl.load(coef + token[:, None].to(tl.int64) * K + latent[None, :],
                    mask=(token[:, None] < T) & (latent[None, :] < K), other=0.0)  # fmt: skip
        w = tl.load(weight + latent[:, None] * D + column[None, :],
                    mask=(latent[:, None] < KP) & (column[None, :] < D), other=0.0)  # fmt: skip
        out = tl.dot(c.to(tl.bfloat16), w, out)
    at = grad + token[:, None].to(tl.int64) * D + column[None, :]
    inside = (token[:, None] < T) & (column[None, :] < D)
    if ADD:
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, out.to(grad.dtype.element_ty), mask=inside)


class Penalty:
    """relu latents, bf16 hidden states."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, sign_weight: torch.Tensor, terms: int) -> None:
        self.parts = split(weight, terms)
        self.bias, self.sign_weight, self.count, self.terms = bias, sign_weight, len(weight), terms

    def __call__(self, hidden: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor,
                 grad: torch.Tensor, add: bool) -> torch.Tensor:  # fmt: skip
        """loss_sum; writes or adds to grad."""
        tokens, width = hidden.shape
        block = min(64, self.parts.shape[1])
        block = 1 << (block - 1).bit_length()
        coef = torch.empty(tokens, self.count, device=hidden.device)
        columns = triton.cdiv(self.parts.shape[1], block)
        partial = torch.zeros(triton.cdiv(tokens, 16) * columns, device=hidden.device)
        _forward[lambda meta: (triton.cdiv(tokens, meta["BT"]), columns)](
            hidden, self.parts, self.bias, self.sign_weight, reference, mask, coef, partial,
            tokens, width, self.count, self.parts.shape[1], TERMS=self.terms, BK=block,
        )  # fmt: skip
        _backward[lambda meta: (triton.cdiv(tokens, meta["BT"]), triton.cdiv(width, meta["BD"]))](
            coef, self.parts[0], grad, tokens, width, self.count, self.parts.shape[1], ADD=add, BK=block,
        )  # fmt: skip
        return partial.sum()
