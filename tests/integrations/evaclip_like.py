"""Modules with the interface of EVA-CLIP's remote code for transformers (`modeling_evaclip.py`), written anew.

Names of classes and attributes, parameters, returned tuples and the masks handed down are that code's, as far as the
integration touches them; the classes are plain modules, and a config is a namespace.
"""

from types import SimpleNamespace

import torch
from integrations.eva_like import RMSnorm
from torch import nn


def config(**fields):
    common = {
        "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 20,
        "max_position_embeddings": 7, "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "q_bias": True,
        "k_bias": False, "v_bias": True, "use_rms_norm": False, "post_layernorm": False, "patches": 9,
    }  # fmt: skip
    return SimpleNamespace(**common | fields)


class RMSNorm(RMSnorm):
    """shinji's, under another name."""


def norm(config):
    return (RMSNorm if config.use_rms_norm else nn.LayerNorm)(config.hidden_size, eps=config.layer_norm_eps)


class EvaCLIPAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.num_heads, self.dropout = config, config.num_attention_heads, config.attention_dropout
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=getattr(config, f"{x}_bias")) for x in "qkv"
        )
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q * self.scale @ k.transpose(-1, -2)
        for mask in (causal_attention_mask, attention_mask):
            scores = scores if mask is None else scores + mask
        weights = scores.softmax(-1)
        y = nn.functional.dropout(weights, self.dropout, self.training) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2)), weights if output_attentions else None


class EvaCLIPMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation_fn = nn.GELU()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class EvaCLIPEncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.post_layernorm, self.self_attn, self.mlp = (
            *(config.post_layernorm, EvaCLIPAttention(config), EvaCLIPMLP(config)),
        )
        self.layer_norm1, self.layer_norm2 = norm(config), norm(config)

    def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        before, after = (nn.Identity(), self.layer_norm1) if self.post_layernorm else (self.layer_norm1, nn.Identity())
        y, weights = self.self_attn(
            hidden_states=before(hidden_states),
            attention_mask=attention_mask,
            causal_attention_mask=causal_attention_mask,
            output_attentions=output_attentions,
        )
        x = hidden_states + after(y)
        x = x + (self.layer_norm2(self.mlp(x)) if self.post_layernorm else self.mlp(self.layer_norm2(x)))
        return (x, weights) if output_attentions else (x,)


class EvaCLIPEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(EvaCLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        weights = ()
        for layer in self.layers:
            x, *more = layer(x, attention_mask, causal_attention_mask, output_attentions=output_attentions)
            weights += tuple(more)
        return (x, weights) if output_attentions else x


class EvaCLIPTextTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder, self.final_layer_norm = EvaCLIPEncoder(config), norm(config)

    def forward(self, input_ids, attention_mask=None):
        x = self.token_embedding(input_ids)
        least = torch.finfo(x.dtype).min
        causal = torch.full((len(x), 1, x.shape[1], x.shape[1]), least, dtype=x.dtype).triu(1)
        if attention_mask is not None:
            attention_mask = torch.zeros_like(causal).masked_fill(attention_mask[:, None, None] == 0, least)
        return self.final_layer_norm(self.encoder(x, attention_mask, causal))


class EvaCLIPVisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.post_layernorm = EvaCLIPEncoder(config), norm(config)
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, 8, 8)

    def forward(self, pixel_values, output_attentions=False):
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        if output_attentions:
            return self.encoder(x, output_attentions=True)
        return self.post_layernorm(self.encoder(x)[:, 0])


class EvaCLIPModel(nn.Module):
    def __init__(self, vision=None, text=None):
        super().__init__()
        self.vision_model = EvaCLIPVisionTransformer(config(**(vision or {})))
        self.text_model = EvaCLIPTextTransformer(config(layer_norm_eps=1e-5, k_bias=True, **(text or {})))
