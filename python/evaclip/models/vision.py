"""The EVA vision tower: every published variant of the block, by the fields of its configuration."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.models.blocks import (
    Checkpointing,
    Norm,
    Stream,
    drop_path_scale,
    init_linear,
    init_normal,
    init_uniform,
    run_blocks,
)
from evaclip.models.config import VisionConfig
from evakernels import Rope2d, gather_tokens, patchify
from evakernels.nn import Attention, SwiGLU


def _norm(config: VisionConfig, width: int) -> Norm:
    return Norm(width, config.eps, rms=config.norm == "rms")


class PatchEmbed(nn.Module):
    """Cut patches and project them; only kept patches are cut out. `proj` holds the weights of a convolution."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch = config.patch
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)

    def forward(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """(B, channels, height, width) -> (B, patches or kept ones, width)."""
        weight = self.proj.weight
        rows = patchify(images, self.patch, kept).to(weight.dtype)
        return F.linear(rows, weight.flatten(1), self.proj.bias)


class GeluMlp(nn.Module):
    """fc2(gelu(fc1 x)), with the exact GELU."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP in their residuals, pre-norm or res-post-norm."""

    def __init__(self, config: VisionConfig, rope: Rope2d | None, drop_path: float):
        super().__init__()
        self.post_norm, self.drop_path = config.post_norm, drop_path
        self.norm1 = _norm(config, config.width)
        self.attn = Attention(
            config.width,
            config.heads,
            qkv_fused=config.qkv_fused,
            qkv_bias=config.qkv_bias,
            inner_norm=config.inner_norm,
            rope=rope,
            eps=config.eps,
        )
        self.norm2 = _norm(config, config.width)
        self.mlp = (
            SwiGLU(config.width, config.mlp_width, norm=config.ffn_norm, eps=config.eps)
            if config.mlp == "swiglu"
            else GeluMlp(config)
        )
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.empty(config.width)) if config.layer_scale is not None else None for _ in range(2)
        )

    def forward(self, stream: Stream, kept: Tensor | None) -> Stream:
        """Pass the stream (B, N, width) on; after a pre-norm block the MLP's output is still to be added."""
        if self.post_norm:
            x = stream.sum()
            x = self.norm1.before(Stream(x, self.attn(x, kept), self.gamma_1, self.drop(x)))
            return Stream(self.norm2.before(Stream(x, self.mlp(x), self.gamma_2, self.drop(x))))
        x, y = self.norm1.after(stream)
        stream = Stream(x, self.attn(y, kept), self.gamma_1, self.drop(x))
        x, y = self.norm2.after(stream)
        return Stream(x, self.mlp(y), self.gamma_2, self.drop(x))

    def drop(self, x: Tensor) -> Tensor | None:
        """The (B,) scale of a branch under stochastic depth, drawn anew at each call."""
        return drop_path_scale(x, self.drop_path, self.training)


class VisionTower(nn.Module):
    """Images to features: patches and a class token through the blocks, the class token normalised and projected."""

    def __init__(self, config: VisionConfig, embed_dim: int):
        super().__init__()
        self.config, self.grid, self.patches = config, config.grid, config.patches
        self.checkpointing: Checkpointing = "none"
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.patches, config.width))
        rates = [config.drop_path * i / max(1, config.layers - 1) for i in range(config.layers)]
        rope = Rope2d(config.grid, config.head_dim) if config.rope else None
        self.blocks = nn.ModuleList(Block(config, rope, rate) for rate in rates)
        self.norm = _norm(config, config.width)
        self.head = nn.Linear(config.width, embed_dim, bias=config.head_bias)
        self.reset_parameters()

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, channels, height, width) -> (B, embed_dim); `kept` (B, K) patch ids: compute with these patches alone."""
        _, class_token = self.norm.after(self.run(images, kept).each(lambda x: x[:, 0]))
        return self.head(class_token)

    def features(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """All tokens after the last block, (B, 1 + patches or K, width), neither normalised nor projected."""
        return self.run(images, kept).sum()

    def run(self, images: Tensor, kept: Tensor | None) -> Stream:
        """Embed the images and pass them through the blocks."""
        expected = (self.config.channels, *self.config.image)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"images have shape {tuple(images.shape)}; this tower takes (batch, {sizes})")
        batch = images.shape[0]
        x = torch.cat([self.cls_token.expand(batch, -1, -1), self.patch_embed(images, kept)], 1)
        pos_embed = self.pos_embed if kept is None else gather_tokens(self.pos_embed.expand(batch, -1, -1), kept)
        return run_blocks(self.blocks, x + pos_embed, kept, checkpointing=self.checkpointing)

    def reset_parameters(self) -> None:
        """Draw initial values: normals of std `init_std`, each branch's last projection shrunk with depth."""
        config = self.config
        for parameter in self.patch_embed.proj.parameters():  # as PyTorch's convolutions
            init_uniform(parameter, (config.channels * config.patch**2) ** -0.5)
        init_normal(self.cls_token, config.init_std, truncated=True)
        init_normal(self.pos_embed, config.position_init_std, truncated=True)
        for module in self.blocks.modules():
            if isinstance(module, Norm | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                init_linear(module, config.init_std, truncated=True)
        for depth, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            last = block.mlp.w3 if isinstance(block.mlp, SwiGLU) else block.mlp.fc2
            for projection in (block.attn.proj, last):
                init_normal(projection.weight, config.init_std / math.sqrt(2 * depth), truncated=True)
            for bias in (block.attn.q_bias, block.attn.v_bias):
                if bias is not None:
                    nn.init.zeros_(bias)
            for gamma in (block.gamma_1, block.gamma_2):
                if gamma is not None and config.layer_scale is not None:
                    nn.init.constant_(gamma, config.layer_scale)
        self.norm.reset_parameters()
        init_linear(self.head, config.init_std * config.head_init_scale, truncated=True)
