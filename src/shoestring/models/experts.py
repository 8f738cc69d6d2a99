"""Expert-choice feed-forward: each expert picks its tokens, within each image.

    scores = softmax over experts of router(x)                        (B, N, E)
    expert e takes its k = capacity N / E highest-scoring tokens     gather   (B, k, D)
    out[token] += score * expert_e(token)                            scatter-add

A token may be taken by several experts or by none (the block's residual carries it on). Gathering costs
O(k N) copies where the published one-hot product costs O(k N D) multiplications an expert; the results
are the same.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.models.layers import round_up


class Expert(nn.Module):
    """Linear, GELU, Linear. Linear modules, so that quantisers, LoRA and Muon reach the weights."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(tokens)))


class ExpertChoice(nn.Module):
    """`num_experts` feed-forwards that each take `capacity / num_experts` of an image's tokens."""

    def __init__(
        self, size: int, mlp_ratio: float, multiple_of: int, num_experts: int, capacity: float
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self.router = nn.Linear(size, num_experts, bias=False)
        hidden_size = round_up(int(size * mlp_ratio), multiple_of)
        self.experts = nn.ModuleList(Expert(size, hidden_size) for _ in range(num_experts))

    def tokens_per_expert(self, num_tokens: int) -> int:
        """k: how many of an image's tokens each expert takes; at least one, at most all."""
        return min(num_tokens, max(1, int(self.capacity * num_tokens / len(self.experts))))

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, num_tokens, size = hidden_states.shape
        scores = self.router(hidden_states).softmax(dim=-1)  # (B, N, E)
        weights, chosen = scores.topk(self.tokens_per_expert(num_tokens), dim=1)  # (B, k, E)
        out = hidden_states.new_zeros(hidden_states.shape)
        for number, expert in enumerate(self.experts):
            index = chosen[:, :, number, None].expand(-1, -1, size)  # (B, k, D)
            result = expert(hidden_states.gather(1, index)) * weights[:, :, number, None]
            out = out.scatter_add(1, index, result.to(out.dtype))
        return out
