"""Muon on several processes: the iteration needs whole matrices, so they share the matrices out.

    momentum of a matrix, in place (a shard stays a shard)
    gathered whole, in bfloat16 --> process k of W iterates on matrices k, k + W, ... --> its result to all
    each process applies the result to what it holds of the matrix

torch's Muon would run the same iteration on every process, or on sharded matrices product by product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from shoestring.processes import World
from shoestring.training.parallel import whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


class SharedMuon(torch.optim.Muon):
    """`torch.optim.Muon` on one process; on several, the same update with the iteration shared out.

    A convolution's kernel (out, in, h, w) is stepped as the matrix (out, in h w), as Muon's author does; its
    momentum has that shape. `kernels` pairs such matrices, which share the kernels' memory, with them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, world: World) -> None:
        self.kernels: list[tuple[nn.Parameter, Tensor]] = []
        groups = [{**group, "params": [self._matrix(each) for each in group["params"]]} for group in groups]
        super().__init__(groups, lr=1.0, momentum=momentum)
        self.world = world

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter that is optimised, kernels as they are in the network."""
        kernels = {id(matrix): kernel for matrix, kernel in self.kernels}
        for group in self.param_groups:
            yield from (kernels.get(id(parameter), parameter) for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for matrix, kernel in self.kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        loss = super().step(closure) if self.world.size == 1 else self._step_shared(closure)
        for matrix, _ in self.kernels:
            matrix.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for _, kernel in self.kernels:
            kernel.grad = None

    def _matrix(self, parameter: Tensor) -> Tensor:
        if parameter.ndim == 2:
            return parameter
        matrix = nn.Parameter(parameter.detach().view(parameter.shape[0], -1))
        self.kernels.append((matrix, parameter))
        return matrix

    def _step_shared(self, closure: Callable[[], float] | None) -> float | None:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for start in range(0, len(matrices), self.world.size):
                self._step_together(matrices[start : start + self.world.size], group)
        return loss

    def _step_together(self, matrices: Sequence[Tensor], group: dict[str, Any]) -> None:
        """One update of as many matrices as there are processes, or fewer: each iterates on one."""
        results = [torch.empty(m.shape, dtype=torch.bfloat16, device=m.device) for m in matrices]
        for number, matrix in enumerate(matrices):
            update = whole(self._with_momentum(matrix, group).bfloat16())
            if number == self.world.rank:
                results[number] = orthogonalised(update)
        sent = [
            dist.broadcast(result, src=number, group=self.world.group, async_op=True)
            for number, result in enumerate(results)
        ]
        for matrix, result, arrival in zip(matrices, results, sent, strict=True):
            arrival.wait()
            rows, columns = matrix.shape
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(_like(result, matrix), alpha=-rate)

    def _with_momentum(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """The averaged gradient with Nesterov's step ahead; the average is updated in place."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None, "matrices without a gradient are left out"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(average, group["momentum"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Newton-Schulz towards the nearest matrix with singular values 1: (m, n) bfloat16 -> the same.

    Each iteration is X <- a X + (b X X' + c (X X')^2) X, on the wider side's transpose.
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).contiguous()


def _like(tensor: Tensor, matrix: Tensor) -> Tensor:
    """What a process holds of a whole tensor that lies as `matrix` does."""
    if not isinstance(matrix, DTensor):
        return tensor
    mesh = matrix.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, matrix.placements)
