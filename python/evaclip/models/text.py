"""CLIP's causal text tower."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.models.blocks import Checkpointing, Norm, Stream, init_linear, init_normal, run_blocks
from evaclip.models.config import TextConfig
from evakernels import attention_qkvpacked, gather_tokens


class Attention(nn.Module):
    """Causal self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        return self.out_proj(attention_qkvpacked(qkv, causal=True).flatten(-2))


class Mlp(nn.Module):
    """c_proj(gelu(c_fc x)), with the exact GELU."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP in their pre-norm residuals."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.ln_1 = Norm(config.width, config.eps)
        self.attn = Attention(config)
        self.ln_2 = Norm(config.width, config.eps)
        self.mlp = Mlp(config)

    def forward(self, stream: Stream) -> Stream:
        """Pass the stream (B, N, width) on; the MLP's output is still to be added."""
        x, y = self.ln_1.after(stream)
        x, y = self.ln_2.after(Stream(x, self.attn(y)))
        return Stream(x, self.mlp(y))


class Transformer(nn.Module):
    """The blocks, under the name that checkpoints give them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))


class TextTower(nn.Module):
    """Token ids to features: the token of the largest id (end of text), normalised and projected."""

    def __init__(self, config: TextConfig, embed_dim: int):
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = "none"
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.transformer = Transformer(config)
        self.ln_final = Norm(config.width, config.eps)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self.reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) int32 or int64, N at most the context -> (B, embed_dim)."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.config.context:
            raise ValueError(
                f"ids have shape {tuple(ids.shape)}; this tower takes (batch, 1 to {self.config.context} tokens)"
            )
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        stream = run_blocks(self.transformer.resblocks, x, checkpointing=self.checkpointing)
        end = ids.argmax(-1, keepdim=True)
        _, end_token = self.ln_final.after(stream.each(lambda x: gather_tokens(x, end, prefix_tokens=0)))
        return end_token[:, 0] @ self.text_projection

    def reset_parameters(self) -> None:
        """Draw initial values, those of CLIP: std by width, each branch's last projection by depth too."""
        config = self.config
        width_std, depth_std = config.width**-0.5, (2 * config.layers) ** -0.5
        init_normal(self.token_embedding.weight, config.token_init_std)
        init_normal(self.positional_embedding, config.position_init_std)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            block.ln_1.reset_parameters()
            block.ln_2.reset_parameters()
            init_normal(block.attn.in_proj_weight, width_std)
            nn.init.zeros_(block.attn.in_proj_bias)
            init_linear(block.attn.out_proj, width_std * depth_std)
            init_linear(block.mlp.c_fc, (2 * config.width) ** -0.5)
            init_linear(block.mlp.c_proj, width_std * depth_std)
        self.ln_final.reset_parameters()
        init_normal(self.text_projection, width_std)
