"""The optimiser's step on unit rows of a weight, each row read once: projection, Adam, renormalisation."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmsae.kernels.triton.launch import launch, next_power_of_2, warps


@triton.jit
def _adam_kernel(
    weight_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    d,
    rate,
    root,
    decay,
    new,
    new_square,
    eps,
    TANGENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < d
    at = tl.program_id(0).to(tl.int64) * d + column
    weight = tl.load(weight_ptr + at, mask=inside, other=0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + at, mask=inside, other=0)
    square = tl.load(square_ptr + at, mask=inside, other=0)
    if TANGENT:
        grad -= tl.sum(grad * weight, 0) / tl.maximum(tl.sum(weight * weight, 0), 1e-24) * weight
    mean += (grad - mean) * new
    square = square * decay + grad * grad * new_square
    weight -= rate * tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), root) + eps)
    weight = tl.div_rn(weight, tl.maximum(tl.sqrt_rn(tl.sum(weight * weight, 0)), 1e-12))
    tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)


def adam_rows_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    tangent: bool,
) -> None:
    """One step of Adam (``torch.optim.Adam`` without weight decay), in place, on rows that stay on norm 1.

    A row is held in registers from its gradient to its new norm: d up to 16,384 without spilling. A row of zeros that
    has no gradient stays one.

    Args:
        weight: ``(F, d)`` float32.
        grad: ``(F, d)``, is not changed.
        exp_avg: ``(F, d)`` float32, Adam's first moment.
        exp_avg_sq: ``(F, d)`` float32, its second.
        step: Number of this step, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second.
        eps: Added to the root of the second moment.
        tangent: Whether the component along the row is taken out of the gradient.

    Raises:
        ValueError: A tensor has another shape, or its rows are not next to each other in memory.
    """
    for name, tensor in dict(grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, weight=weight).items():
        if tensor.shape != weight.shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and {tuple(weight.shape)}, not {tuple(tensor.shape)}")
    n, d = weight.shape
    if not (n and d):
        return
    block = next_power_of_2(d)
    launch(
        _adam_kernel,
        (n,),
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        d,
        lr / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        beta2,
        1 - beta1,
        1 - beta2,
        eps,
        TANGENT=tangent,
        BLOCK=block,
        # 16 of a row's numbers a thread: four loads of 16 bytes from each of four tensors under way
        num_warps=warps(block, 16, 32),
    )
    torch.autograd.graph.increment_version([weight, exp_avg, exp_avg_sq])
