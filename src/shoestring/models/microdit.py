"""MicroDiT: a diffusion transformer cheap to train (arXiv 2407.15811).

    latents (B, C, H, W) --patches--> (B, N, D) --+ positions--> patch mixer (all N tokens, its own width)
                                                                      |
    text (B, L, C_text) --project, text blocks--> (B, L, D)       masking: keep K of N tokens  (training)
             |                                     |                  |
             +--mean--> pooled --+                 +--cross-attention--> backbone, `depth` blocks, layer-wise
    c_noise (B,) --> time -------+--> conditioning ------modulates---->  scaled, experts in every second
                                                                      |
    (B, C, H, W) <--unpatchify, dropped patches zero-- output layer --+

The defaults are the published network. Arguments that depart from it (`positions`, `qk_norm`,
`text_positions`) are explained in docs/microdit.md, with what was measured in docs/LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from shoestring.errors import CheckpointError, UserError
from shoestring.models.experts import Expert, ExpertChoice
from shoestring.models.layers import (
    Attention,
    KeyValue,
    Modulation,
    ProjectionMlp,
    Resize,
    SwiGLU,
    TextBlock,
    TimeEmbedding,
    grid_positions,
    layer_norm,
    modulate,
    rotary_angles,
    round_up,
    sincos_positions,
)
from shoestring.models.microdit_published import (
    check_publishable,
    config_from_published,
    state_from_published,
    state_to_published,
    stored_buffers,
)

Ratios = float | Sequence[float]
ExpertBlocks = int | Sequence[int]


@dataclass(frozen=True)
class ProjectedText:
    """Text after all that depends on the prompt alone; computed once a prompt, used at every step.

    pooled      (B, D)      added to the time embedding
    tokens      (B, L, D)   what the backbone attends to, and `mixer_tokens` the mixer
    mask        (B, 1, 1, L) bool, or None when every token counts
    key_values  for the mixer's and then the backbone's blocks, or None: computed in the block
    """

    pooled: Tensor
    tokens: Tensor
    mixer_tokens: Tensor
    mask: Tensor | None
    key_values: tuple[KeyValue, ...] | None = None


def spaced(ratios: Ratios, depth: int) -> list[float]:
    """One ratio a block: a number is shared, two are ends of a linear spacing, `depth` are taken as is."""
    if isinstance(ratios, (int, float)):
        return [float(ratios)] * depth
    if len(ratios) == depth:
        return [float(ratio) for ratio in ratios]
    if len(ratios) == 2:
        first, last = ratios
        return [first + (last - first) * i / max(depth - 1, 1) for i in range(depth)]
    raise UserError(f"{len(ratios)} ratios for {depth} blocks: give 1, 2 (the ends) or {depth}.")


def expert_positions(blocks: ExpertBlocks, depth: int, *, last: bool) -> frozenset[int]:
    """Which blocks have experts: every n-th (0: none), the last only if allowed; or the positions given."""
    if isinstance(blocks, int):
        stop = depth if last else depth - 1
        return frozenset(range(blocks - 1, stop, blocks)) if blocks else frozenset()
    if beyond := [i for i in blocks if not 0 <= i < depth]:
        raise UserError(f"Expert blocks {beyond} do not exist: there are {depth} blocks, 0 to {depth - 1}.")
    return frozenset(blocks)


class MicroDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated and gated."""

    def __init__(
        self,
        size: int,
        conditioning_size: int,
        head_dim: int,
        *,
        qkv_ratio: float,
        mlp_ratio: float,
        multiple_of: int,
        num_experts: int,
        expert_capacity: float,
        use_bias: bool,
        qk_norm: str,
    ) -> None:
        super().__init__()
        inner = size if qkv_ratio == 1 else round_up(int(size * qkv_ratio), 2 * head_dim)
        self.norm1 = layer_norm(size)
        self.attn = Attention(size, inner, head_dim, bias=use_bias, qk_norm=qk_norm)
        self.norm2 = layer_norm(size)
        self.cross_attn = Attention(size, size, head_dim, context_size=size, bias=use_bias, qk_norm=qk_norm)
        self.norm3 = layer_norm(size)
        self.ff: nn.Module = (
            ExpertChoice(size, mlp_ratio, multiple_of, num_experts, expert_capacity)
            if num_experts
            else SwiGLU(size, mlp_ratio, multiple_of, bias=use_bias)
        )
        self.modulation = Modulation(conditioning_size, size, 6)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Tensor,
        text_mask: Tensor | None = None,
        rotary: Tensor | None = None,
        text_key_value: KeyValue | None = None,
    ) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(conditioning)
        attended = self.attn(modulate(self.norm1(hidden_states), shift_msa, scale_msa), rotary=rotary)
        hidden_states = torch.addcmul(hidden_states, gate_msa[:, None], attended)
        hidden_states = hidden_states + self.cross_attn(
            self.norm2(hidden_states),
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=text_mask,
            key_value=text_key_value,
        )
        fed = self.ff(modulate(self.norm3(hidden_states), shift_mlp, scale_mlp))
        return torch.addcmul(hidden_states, gate_mlp[:, None], fed)


class MicroDiT(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """The MicroDiT network; see the module's diagram.

    Args:
        sample_size: side of the latents it is trained on; sets the default size of pictures only.
        in_channels: latent channels.
        caption_channels: width of the text embeddings.
        patch_size, hidden_size, depth, head_dim: the backbone; width D = `hidden_size`.
        multiple_of: feed-forward widths are rounded up to multiples of this.
        qkv_ratio, mlp_ratio: width of attention and feed-forward relative to D for each block; two
            numbers are the ends of a linear spacing (layer-wise scaling, paper section 2.3).
        use_bias: biases in the blocks' linear layers.
        mixer_depth, mixer_size, mixer_qkv_ratio, mixer_mlp_ratio: the patch mixer (section 2.2).
        num_experts, expert_capacity: experts of an expert-choice feed-forward (section 2.3).
        expert_blocks, mixer_expert_blocks: every n-th block, never the backbone's last; or positions.
        text_depth: transformer blocks over the text alone.
        positions: "sincos" (published: added to the patches) or "sincos+rope" (2-D rotary in self-attention
            besides; alone it would leave cross-attention without places to tell apart).
        text_positions: "none" (published) or "rope" (rotary, in the text blocks).
        qk_norm: "hidden" (published) or "head"; see `Attention`.
        pos_interp_scale: grid coordinates are divided by this (2.0 at twice the training resolution).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MicroDiTBlock", "TextBlock"]
    _repeated_blocks = ["MicroDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embed", "norm", "proj_out"]
    _supports_group_offloading = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        caption_channels: int = 1024,
        patch_size: int = 2,
        hidden_size: int = 1024,
        depth: int = 28,
        head_dim: int = 64,
        multiple_of: int = 256,
        qkv_ratio: Ratios = (0.5, 1.0),
        mlp_ratio: Ratios = (0.5, 4.0),
        use_bias: bool = False,
        mixer_depth: int = 6,
        mixer_size: int = 768,
        mixer_qkv_ratio: Ratios = 1.0,
        mixer_mlp_ratio: Ratios = 4.0,
        num_experts: int = 8,
        expert_capacity: float = 2.0,
        expert_blocks: ExpertBlocks = 2,
        mixer_expert_blocks: ExpertBlocks = 2,
        text_depth: int = 1,
        positions: str = "sincos",
        text_positions: str = "none",
        qk_norm: str = "hidden",
        pos_interp_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_widths(hidden_size, mixer_size, head_dim, positions, text_positions, qk_norm)
        common: dict[str, Any] = {"multiple_of": multiple_of, "use_bias": use_bias, "qk_norm": qk_norm}

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.time_embed = TimeEmbedding(hidden_size)
        self.caption_projection = ProjectionMlp(caption_channels, hidden_size)
        self.text_blocks = nn.ModuleList(
            TextBlock(hidden_size, head_dim, **common) for _ in range(text_depth)
        )
        self.pooled_projection = ProjectionMlp(hidden_size, hidden_size)

        def blocks(size: int, count: int, qkv: Ratios, mlp: Ratios, experts: frozenset[int]) -> nn.ModuleList:
            ratios = zip(spaced(qkv, count), spaced(mlp, count), strict=True)
            return nn.ModuleList(
                MicroDiTBlock(
                    size,
                    hidden_size,
                    head_dim,
                    qkv_ratio=qkv_ratio,
                    mlp_ratio=mlp_ratio,
                    num_experts=num_experts if i in experts else 0,
                    expert_capacity=expert_capacity,
                    **common,
                )
                for i, (qkv_ratio, mlp_ratio) in enumerate(ratios)
            )

        mixer_experts = expert_positions(mixer_expert_blocks, mixer_depth, last=True)
        self.patch_mixer = blocks(mixer_size, mixer_depth, mixer_qkv_ratio, mixer_mlp_ratio, mixer_experts)
        other_width = mixer_depth > 0 and mixer_size != hidden_size

        def resize(in_size: int, out_size: int) -> nn.Module:
            return Resize(in_size, out_size, bias=use_bias) if other_width else nn.Identity()

        self.mixer_in = resize(hidden_size, mixer_size)
        self.mixer_text = resize(hidden_size, mixer_size)
        self.mixer_out = resize(mixer_size, hidden_size)

        backbone_experts = expert_positions(expert_blocks, depth, last=False)
        self.transformer_blocks = blocks(hidden_size, depth, qkv_ratio, mlp_ratio, backbone_experts)
        self.norm_out = layer_norm(hidden_size)
        self.modulation_out = Modulation(hidden_size, hidden_size, 2)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @property
    def boundary(self) -> list[nn.Module]:
        """Where signals enter and leave, and modulations: to an optimiser, no hidden matrices."""
        ends = [self.patch_embed, self.caption_projection, self.time_embed, self.proj_out]
        return [*ends, *(module for module in self.modules() if isinstance(module, Modulation))]

    def reset_parameters(self) -> None:
        """Published initialisation: truncated normal 0.02, smaller block outputs, zero modulation, output."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        depth = len(self.transformer_blocks)
        scales = [math.sqrt(2 * depth)] * len(self.patch_mixer) + [
            math.sqrt(2 * (i + 1)) for i in range(depth)
        ]
        blocks: list[Any] = [*self.patch_mixer, *self.transformer_blocks]
        for block, scale in zip(blocks, scales, strict=True):
            for weight in _output_weights(block):
                nn.init.trunc_normal_(weight, std=0.02 / scale)
            nn.init.zeros_(block.modulation.linear.weight)
        for block in self.text_blocks:
            for weight in _output_weights(block):
                nn.init.zeros_(weight)
        nn.init.zeros_(self.modulation_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> MicroDiT:
        """The network of a published checkpoint: its state dict and its configuration keys.

        Weights are the given tensors themselves where the layout is the same. Raises `CheckpointError`
        where a name or a shape does not belong to the configuration.
        """
        return cls.around(state_from_published(state_dict), config_from_published(config))

    @classmethod
    def around(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MicroDiT:
        """The network of `config` (arguments) with the tensors of `state` as its weights, not copies of them.

        Raises `CheckpointError` where a name or a shape does not belong to the configuration.
        """
        with torch.device("meta"):
            model = cls(**config)
        load_strictly(model, state, assign=True)
        return model

    def to_published(self) -> dict[str, Tensor]:
        """This network under the published names, experts in their 3-D layout, with the stored positions.

        Raises `CheckpointError` where the configuration has no place in the published layout.
        """
        check_publishable(self.config)
        return {**state_to_published(self.state_dict()), **stored_buffers(self.config)}

    def project_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        *,
        with_key_values: bool = False,
    ) -> ProjectedText:
        """All that depends on the prompt alone: text (B, L, C_text), mask (B, L) bool -> `ProjectedText`.

        `with_key_values` also projects the keys and values of every block, for sampling many steps.
        """
        tokens = self.caption_projection(encoder_hidden_states)
        mask = rotary = None
        if encoder_attention_mask is not None:
            mask = encoder_attention_mask.bool()[:, None, None]
        if self.config.text_positions == "rope":
            places = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
            rotary = rotary_angles(places[None, :, None], self.config.head_dim)
        for block in self.text_blocks:
            tokens = block(tokens, mask, rotary)
        pooled = self.pooled_projection(_masked_mean(tokens, encoder_attention_mask))
        mixer_tokens = self.mixer_text(tokens)
        key_values = None
        if with_key_values:
            users: list[tuple[Any, Tensor]] = [(block, mixer_tokens) for block in self.patch_mixer]
            users += [(block, tokens) for block in self.transformer_blocks]
            key_values = tuple(block.cross_attn.project_context(context) for block, context in users)
        return ProjectedText(pooled, tokens, mixer_tokens, mask, key_values)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        keep: Tensor | None = None,
        projected_text: ProjectedText | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Raw network output (B, C, H, W) for latents (B, C, H, W) and `timestep` = c_noise (B,).

        Text comes as `encoder_hidden_states` (B, L, C_text) with an optional mask (B, L), or as
        `projected_text`. `keep` (B, K) holds the indices of the patches that pass the masking after the
        mixer; the others come out zero. H and W must be multiples of the patch size (`ValueError`).
        """
        rows, columns = self._grid(hidden_states)
        if projected_text is None:
            if encoder_hidden_states is None:
                raise ValueError("MicroDiT needs encoder_hidden_states or projected_text.")
            projected_text = self.project_text(encoder_hidden_states, encoder_attention_mask)
        text = projected_text
        conditioning = self.time_embed(timestep.expand(hidden_states.shape[0])) + text.pooled

        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, N, D)
        positions = grid_positions(rows, columns, self.config.pos_interp_scale, tokens.device)
        tokens = tokens + sincos_positions(positions, tokens.shape[-1]).to(tokens.dtype)
        rotary = None
        if self.config.positions == "sincos+rope":
            rotary = rotary_angles(positions, self.config.head_dim)

        key_values = text.key_values or (None,) * (len(self.patch_mixer) + len(self.transformer_blocks))
        tokens = self.mixer_in(tokens)
        for block, key_value in zip(self.patch_mixer, key_values, strict=False):
            tokens = self._run(block, tokens, text.mixer_tokens, conditioning, text.mask, rotary, key_value)
        tokens = self.mixer_out(tokens)

        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))  # (B, K, D)
            if rotary is not None:
                rotary = rotary[0, keep]
        for block, key_value in zip(
            self.transformer_blocks, key_values[len(self.patch_mixer) :], strict=True
        ):
            tokens = self._run(block, tokens, text.tokens, conditioning, text.mask, rotary, key_value)

        shift, scale = self.modulation_out(conditioning)
        patches = self.proj_out(modulate(self.norm_out(tokens), shift, scale))
        if keep is not None:
            full = patches.new_zeros(patches.shape[0], rows * columns, patches.shape[-1])
            patches = full.scatter(1, keep[..., None].expand(-1, -1, patches.shape[-1]), patches)
        sample = self._unpatchify(patches, rows, columns)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        patch = self.config.patch_size
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"Latents of {height} x {width} do not divide into patches of {patch}.")
        return height // patch, width // patch

    def _unpatchify(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """(B, h w, p q C) -> (B, C, h p, w q)."""
        patch, channels = self.config.patch_size, self.config.in_channels
        grid = patches.view(-1, rows, columns, patch, patch, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * patch, columns * patch)


TransformerBlockRegistry.register(
    MicroDiTBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load `state` where names and shapes all agree, else say in one line what does not.

    `assign`: the tensors become the weights, with their number type; else they are copied.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            raise CheckpointError(
                f"{type(model).__name__}: {len(names)} tensors {problem}, such as {names[0]}. "
                "The weights do not belong to this configuration."
            )
    model.load_state_dict(dict(state), assign=assign)


def _output_weights(block: nn.Module) -> Iterator[Tensor]:
    """The matrices of a block whose products are added to the residual stream."""
    for module in block.modules():
        if isinstance(module, Attention):
            yield module.to_out[0].weight  # type: ignore[misc]
        elif isinstance(module, (SwiGLU, Expert)):
            yield module.down.weight


def _masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count: (B, L, D), (B, L) -> (B, D)."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _check_widths(
    hidden_size: int, mixer_size: int, head_dim: int, positions: str, text_positions: str, qk_norm: str
) -> None:
    for name, size in (("hidden_size", hidden_size), ("mixer_size", mixer_size)):
        if size % head_dim:
            below = size // head_dim * head_dim
            raise UserError(
                f"model.{name} {size} must be divisible by head_dim {head_dim}; "
                f"nearest: {max(below, head_dim)} or {below + head_dim}."
            )
    for name, value, allowed in (
        ("positions", positions, ("sincos", "sincos+rope")),
        ("text_positions", text_positions, ("none", "rope")),
        ("qk_norm", qk_norm, ("hidden", "head")),
    ):
        if value not in allowed:
            raise UserError(f"model.{name} {value!r}: unknown. Use {' or '.join(allowed)}.")
