"""Modules with the interface of EVA-CLIP's original code (`eva_clip`, rei's and shinji's), written anew for the tests.

Names of classes, attributes, parameters and globals, shapes and conventions are the original's, as far as the
integration touches them: text towers take the sequence first, kept patches come from a CPU draw, their ids reach the
rotary embedding by the environment variable RoPE and an exchanged `rope.forward`, `xops` and `FusedLayerNorm` are
globals that may be missing. What it is not: the original code, and a proof that this integration serves that. The tests
run against the original too, where `--eva-code` says where it lies.
"""

import os
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VARIABLE = "RoPE"
xops = None  # the original's `import xformers.ops as xops`, None where that fails


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


FusedLayerNorm = LayerNorm  # the original's `from apex.normalization import FusedLayerNorm`, where that fails


NORM = partial(FusedLayerNorm, eps=1e-6)


class RMSnorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, hidden_states):
        y = hidden_states * (hidden_states.float().square().mean(-1, True) + self.variance_epsilon).rsqrt()
        return self.weight * (y if self.weight.dtype == torch.float32 else y.to(self.weight.dtype))


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob)
        return x * kept / (1 - self.drop_prob)


class LayerScale(nn.Module):
    def __init__(self, dim, init_values):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class PatchDropout(nn.Module):
    def __init__(self, prob, exclude_first_token=True):
        super().__init__()
        self.prob, self.exclude_first_token = prob, exclude_first_token

    def forward(self, x):
        if not self.training or not self.prob:
            return x
        patches = x.shape[1] - 1
        ids = torch.randn(len(x), patches).topk(max(1, int(patches * (1 - self.prob)))).indices
        x = torch.cat([x[:, :1], x[torch.arange(len(x))[:, None], ids + 1]], 1)
        return (x, ids) if os.getenv(VARIABLE) == "1" else x


class VisionRotaryEmbeddingFast(nn.Module):
    def __init__(self, dim, pt_seq_len, ft_seq_len=None):
        super().__init__()
        side = pt_seq_len if ft_seq_len is None else ft_seq_len
        t = torch.arange(side) / side * pt_seq_len
        angles = (t[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)).repeat_interleave(2, 1)
        rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
        angles = torch.cat([rows, columns], -1).flatten(0, 1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, t, patch_indices_keep=None):
        cos, sin = self.freqs_cos, self.freqs_sin
        if patch_indices_keep is not None:
            cos, sin = cos[patch_indices_keep][:, None], sin[patch_indices_keep][:, None]
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)
        return t * cos + turned * sin


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.GELU, subln=False):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.ffn_ln = nn.LayerNorm(hidden_features) if subln else nn.Identity()
        self.fc2, self.drop = nn.Linear(hidden_features, in_features), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.ffn_ln(self.act(self.fc1(x)))))


class SwiGLU(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.SiLU, drop=0.0, norm_layer=LayerNorm, subln=False):
        super().__init__()
        self.w1, self.w2 = (nn.Linear(in_features, hidden_features) for _ in range(2))
        self.act, self.ffn_ln = act_layer(), norm_layer(hidden_features) if subln else nn.Identity()
        self.w3, self.drop = nn.Linear(hidden_features, in_features), nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.w3(self.ffn_ln(self.act(self.w1(x)) * self.w2(x))))


class VisionAttention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias, norm_layer, window_size=None, xattn=False, rope=None, subln=False):
        super().__init__()
        self.num_heads, self.scale, self.subln, self.xattn, self.rope = (
            *(num_heads, (dim // num_heads) ** -0.5, subln, xattn, rope),
        )
        if subln:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) if qkv_bias else None for _ in range(2))
        self.relative_position_bias_table = self.relative_position_index = None
        if window_size:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(4, num_heads))
        self.attn_drop, self.xattn_drop = nn.Dropout(0.0), 0.0
        self.inner_attn_ln = norm_layer(dim) if subln else nn.Identity()
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, rel_pos_bias=None, attn_mask=None):
        weights = (self.q_proj, self.k_proj, self.v_proj) if self.subln else (self.qkv,)
        y = torch.cat([F.linear(x, w.weight) for w in weights], -1)
        if self.q_bias is not None:
            y = y + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(y.dtype)
        q, k, v = y.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rope:
            q, k = (torch.cat([x[:, :, :1], self.rope(x[:, :, 1:])], 2).type_as(v) for x in (q, k))
        if self.xattn:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            y = xops.memory_efficient_attention(q, k, v, p=self.xattn_drop, scale=self.scale)
        else:
            scores = q * self.scale @ k.transpose(-2, -1)
            if rel_pos_bias is not None:
                scores = scores + rel_pos_bias.type_as(scores)
            if attn_mask is not None:
                scores = scores.masked_fill(~attn_mask.bool()[:, None, None], float("-inf"))
            y = (self.attn_drop(scores.softmax(-1)) @ v).transpose(1, 2)
        return self.proj_drop(self.proj(self.inner_attn_ln(y.flatten(2))))


VisionAttention.__name__ = "Attention"  # in the original both attentions have this name, in two files


class Block(nn.Module):
    def __init__(
        self, dim, num_heads, mlp_ratio, qkv_bias, drop_path, init_values, norm_layer, postnorm, naiveswiglu, subln,
        **attention,
    ):  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = VisionAttention(dim, num_heads, qkv_bias, norm_layer, subln=subln, **attention)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, hidden, norm_layer=norm_layer, subln=subln) if naiveswiglu else Mlp(dim, hidden)
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(init_values * torch.ones(dim)) if init_values else None for _ in range(2)
        )
        self.postnorm = postnorm

    def forward(self, x, rel_pos_bias=None, attn_mask=None):
        def attend(y):
            return self.attn(y, rel_pos_bias=rel_pos_bias, attn_mask=attn_mask)

        for norm, gamma, branch in ((self.norm1, self.gamma_1, attend), (self.norm2, self.gamma_2, self.mlp)):
            y = norm(branch(x)) if self.postnorm else branch(norm(x))
            x = x + self.drop_path(y if gamma is None else gamma * y)
        return x


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, embed_dim):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, x, **kwargs):
        assert x.shape[2:] == self.img_size
        return self.proj(x).flatten(2).transpose(1, 2)


class RelativePositionBias(nn.Module):
    def __init__(self, tokens, num_heads):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(num_heads, tokens, tokens))

    def forward(self):
        return self.relative_position_bias_table


class EVAVisionTransformer(nn.Module):
    def __init__(
        self, img_size=24, patch_size=8, num_classes=16, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.7,
        qkv_bias=True, drop_path_rate=0.0, norm_layer=NORM, init_values=None,
        patch_dropout=0.0, use_rel_pos_bias=False, use_shared_rel_pos_bias=False, rope=False, use_mean_pooling=False,
        xattn=False, postnorm=False, pt_hw_seq_len=16, intp_freq=True, naiveswiglu=False, subln=False,
    ):  # fmt: skip
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim)
        patches, side = self.patch_embed.num_patches, img_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(0.0)
        self.rel_pos_bias = RelativePositionBias(patches + 1, num_heads) if use_shared_rel_pos_bias else None
        half = embed_dim // num_heads // 2
        self.rope = VisionRotaryEmbeddingFast(half, pt_hw_seq_len, side if intp_freq else None) if rope else None
        window = (side, side) if use_rel_pos_bias else None
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, qkv_bias, drop_path_rate * i / max(1, depth - 1), init_values,
                norm_layer, postnorm, naiveswiglu, subln, window_size=window, xattn=xattn, rope=self.rope,
            )
            for i in range(depth)
        )  # fmt: skip
        self.norm = nn.Identity() if use_mean_pooling else norm_layer(embed_dim)
        self.fc_norm = norm_layer(embed_dim) if use_mean_pooling else None
        self.head = nn.Linear(embed_dim, num_classes)
        self.patch_dropout = PatchDropout(patch_dropout) if patch_dropout > 0 else nn.Identity()
        self.grad_checkpointing = False

    def forward_features(self, x, return_all_features=False):
        x = self.patch_embed(x)
        x = self.pos_drop(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)
        ids, drops = None, self.training and not isinstance(self.patch_dropout, nn.Identity)
        if os.getenv(VARIABLE) == "1" and drops:
            x, ids = self.patch_dropout(x)
        else:
            x = self.patch_dropout(x)
        if os.getenv(VARIABLE) == "1":
            self.rope.forward = partial(self.rope.forward, patch_indices_keep=ids)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, (bias,), use_reentrant=False)  # a tuple, which only xattn survives
            else:
                x = block(x, rel_pos_bias=bias)
        if return_all_features:
            return x
        x = self.norm(x)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(x.mean(1))

    def forward(self, x, return_all_features=False):
        x = self.forward_features(x, return_all_features)
        return x if return_all_features else self.head(x)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, xattn=False, scaled_cosine=False):
        super().__init__()
        self.num_heads, self.scale, self.xattn = num_heads, (dim // num_heads) ** -0.5, xattn
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.randn(3 * dim, dim)),
            nn.Parameter(torch.zeros(3 * dim)),
        )
        self.logit_scale = nn.Parameter(torch.ones(num_heads, 1, 1)) if scaled_cosine else None
        self.head_scale, self.xattn_drop = None, 0.0
        self.attn_drop, self.out_proj, self.out_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(0, 1).unbind(2)
        bias = xops.LowerTriangularMask() if attn_mask is not None else None
        y = xops.memory_efficient_attention(q, k, v, p=self.xattn_drop, scale=self.scale, attn_bias=bias)
        return self.out_drop(self.out_proj(y.flatten(2).transpose(0, 1)))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, d_model, n_head, ls_init_value=None, norm_layer=LayerNorm, xattn=False):
        super().__init__()
        self.ln_1, self.ln_2 = norm_layer(d_model), norm_layer(d_model)
        self.attn = Attention(d_model, n_head, xattn=True) if xattn else nn.MultiheadAttention(d_model, n_head)
        self.ls_1, self.ls_2 = (
            LayerScale(d_model, ls_init_value) if ls_init_value else nn.Identity() for _ in range(2)
        )
        c_fc, c_proj = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=nn.GELU(), c_proj=c_proj))
        self.xattn = xattn

    def attention(self, x, attn_mask=None):
        attn_mask = None if attn_mask is None else attn_mask.to(x.dtype)
        if self.xattn:
            return self.attn(x, attn_mask=attn_mask)
        return self.attn(x, x, x, need_weights=False, attn_mask=attn_mask)[0]

    def forward(self, x, attn_mask=None):
        x = x + self.ls_1(self.attention(self.ln_1(x), attn_mask=attn_mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, **block):
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, **block) for _ in range(layers))

    def forward(self, x, attn_mask=None):
        for block in self.resblocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x


class TextTransformer(nn.Module):
    def __init__(self, context_length=7, vocab_size=20, width=64, heads=2, layers=2, output_dim=16, **block):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, width))
        self.transformer = Transformer(width, layers, heads, **block)
        self.ln_final = block.get("norm_layer", LayerNorm)(width)
        self.text_projection = nn.Parameter(torch.zeros(width, output_dim))
        mask = torch.full((context_length, context_length), float("-inf")).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, text, return_all_features=False):
        dtype = self.transformer.resblocks[0].mlp.c_fc.weight.dtype
        x = (self.token_embedding(text) + self.positional_embedding).to(dtype)
        x = self.ln_final(self.transformer(x.transpose(0, 1), attn_mask=self.attn_mask).transpose(0, 1))
        if return_all_features:
            return x
        return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection


class CustomCLIP(nn.Module):
    def __init__(self, vision=None, text=None):
        super().__init__()
        self.visual, self.text = EVAVisionTransformer(**(vision or {})), TextTransformer(**(text or {}))
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    def encode_image(self, image, normalize=False):
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text, normalize=False):
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image, text):
        return self.encode_image(image, True), self.encode_text(text, True), self.logit_scale.exp()
