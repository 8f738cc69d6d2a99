"""Peak memory of a forward pass, counted on shapes alone: a network of any size is measured without memory.

    module on the meta device --runs, no numbers--> a storage is made: + bytes; it is let go: - bytes
                                                    a convolution: + its workspace, for as long as it runs

Counted is what Python frees and keeps, in the order in which it does, so skips that wait for a decoder,
tensors a block holds by name and copies that a reshape makes are all in. Weights and inputs are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def convolution_workspace(source: int, result: int, weight: int) -> int:
    """Bytes a convolution works in beside its input, result and weight (bytes of each given).

    oneDNN computes in blocked layouts: a copy of the larger side and one of the weight. That is what torch's
    allocator hands out for 3x3 kernels in float32, within 2 % (torch 2.13); fewer channels than 16 copy both
    sides, which are small then.
    """
    return max(source, result) + weight


class LiveMemory(TorchDispatchMode):
    """Within: `now` and `peak`, bytes of the storages that operations made and nobody has let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._know(storage, 0)  # a weight, an input: there before
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._know(storage, storage.nbytes())
        extra = 0
        if func is torch.ops.aten.convolution.default:
            extra = convolution_workspace(_bytes(args[0]), _bytes(result), _bytes(args[1]))
        self.peak = max(self.peak, self.now + extra)
        return result

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as kernels do it: the result alone, laid out (B, N, H, D), never the (N, N) weights.

    On the meta device torch would take its textbook path, with all weights of all heads in memory.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, _, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        batch, heads, tokens, _ = query.shape  # (B, H, N, D)
        return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


@torch.no_grad()
def forward_peak(module: nn.Module, *inputs: Any, method: str = "forward", **named: Any) -> int:
    """Peak bytes that a forward without gradients holds beside weights and inputs.

    `module` and all tensors lie on the meta device; their types and shapes are what counts. `method` is what
    to call in place of `forward`, such as "decode".
    """
    call = module if method == "forward" else getattr(module, method)
    with _FusedAttention(), LiveMemory() as live:
        call(*inputs, **named)
    return live.peak


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
