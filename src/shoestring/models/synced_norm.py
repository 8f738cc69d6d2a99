"""Batch normalisation whose statistics come from the whole batch, whatever processes share it.

    x of each process --mean, squared deviations, count--> all_gather --> statistics of all --> y
    grad of each      --sum of dy and of dy * x_hat------> all_reduce -----------------------> dx

torch's `SyncBatchNorm` does this on GPUs alone; this one runs wherever collectives do (gloo, NCCL).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, same arguments and keys; in training its statistics are those of all processes.

    On one process, and in evaluation, it is `nn.BatchNorm2d` itself. On several, processes may bring
    different numbers of values (none too); statistics and normalisation are float32 for half precision.
    Each process must call it as often as the others: it waits for them, forward and backward.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(B, C, H, W) -> the same shape and type."""
        if not self.training or not _many():
            return super().forward(input)
        self._check_input_dim(input)
        with torch.no_grad():
            mean, variance, count = _statistics(input)
            self._remember(mean, variance, count)
        normalised: Tensor = _Normalise.apply(
            input, self.weight, self.bias, mean, torch.rsqrt(variance + self.eps), count
        )
        return normalised

    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics; their variance is the unbiased one, as in torch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        # A cumulative average where momentum is None, as in torch.
        rate = 1 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_((1 - rate) * running + rate * new)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / std * weight + bias with statistics that depend on the inputs of all processes.

    dx = weight / std * (dy - mean(dy) - x_hat * mean(dy * x_hat)), the means over all processes' values;
    d weight and d bias are this process's own sums, which data parallelism averages like any others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inverse_std: Tensor,
        count: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        y = (x.to(mean.dtype) - _wide(mean)) * _wide(inverse_std)
        if weight is not None and bias is not None:
            y = y * _wide(weight.to(y.dtype)) + _wide(bias.to(y.dtype))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        x_hat = (x.to(mean.dtype) - _wide(mean)) * _wide(inverse_std)
        dy = grad.to(mean.dtype)
        own = torch.stack([dy.sum((0, 2, 3)), (dy * x_hat).sum((0, 2, 3))])  # (2, C)
        grad_bias, grad_weight = own.clone()
        dist.all_reduce(own)
        average_dy, average_product = own / count
        dx = (dy - _wide(average_dy) - x_hat * _wide(average_product)) * _wide(inverse_std)
        if weight is None:
            return dx.to(x.dtype), None, None, None, None, None
        dx = dx * _wide(weight.to(dx.dtype))
        return dx.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and number of values () of all processes' x (B, C, H, W).

    Each brings its own mean and squared deviations from it: a sum of squares would lose small variances
    around large means.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    channels, own_count = x.shape[1], x.numel() // x.shape[1]
    own_mean = x.sum((0, 2, 3)) / max(1, own_count)
    own_deviations = (x - _wide(own_mean)).square().sum((0, 2, 3))
    own = torch.cat([own_mean, own_deviations, own_mean.new_full((1,), own_count)])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    means, deviations, counts = torch.stack(everyone).split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    total = deviations.sum(0) + ((means - mean).square() * counts).sum(0)
    return mean, total / count, count


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _wide(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
