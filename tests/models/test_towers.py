"""The towers against other people's code with the same random weights, and against the plain formula."""

import open_clip.transformer
import pytest
import timm
import torch
import torch.nn.functional as F

import evaclip
from evaclip.models.config import CONFIGS
from evaclip.models.text import TextTower
from evaclip.models.vision import VisionTower
from evaclip.weights import dialects
from evaclip.weights.lazy import lazy


def randomize(module, seed=0):
    """Weights that keep activations near 1, norms near the identity, and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("weight", "gamma_1", "gamma_2")) and p.dim() == 1:
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
            elif p.dim() > 1 and "embed" not in name and "token" not in name:
                fan_in = p.shape[0] if name.endswith("text_projection") else p[0].numel()
                p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
            else:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return module


def for_timm(tensors):
    """An image tower's tensors by timm's names."""
    written, homeless = dialects.write(dialects.read({key: lazy(x) for key, x in tensors.items()}), "timm")
    assert not homeless
    return {key: tensor.read() for key, tensor in written.items()}


class DropTo(torch.nn.Module):
    """In place of timm's patch dropout: in training it keeps the ids it is given, and says so."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, x):
        if not self.training:
            return x, None
        patches = x[:, 1:].gather(1, self.kept[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :1], patches], 1), self.kept


@pytest.mark.parametrize(
    ("name", "timm_model", "grid"),
    [
        ("EVA02-CLIP-B-16", "eva02_base_patch16_clip_224", 7),
        ("EVA02-CLIP-L-14", "eva02_large_patch14_clip_224", 5),
        ("EVA01-CLIP-g-14", "eva_giant_patch14_clip_224", 4),
        ("EVA02-CLIP-bigE-14", "eva02_enormous_patch14_clip_224", 3),
    ],
)
def test_vision_tower_is_timms_in_eval_and_in_training_with_dropped_patches(name, timm_model, grid):
    # Width, heads and hidden width are the published ones; depth and image are small.
    size = grid * CONFIGS[name].vision.patch
    config = evaclip.models.configure(name, vision={"layers": 2, "image_size": size, "drop_path": 0.0})
    with torch.device("meta"):
        ours = VisionTower(config.vision, config.embed_dim)
    randomize(ours.to_empty(device="cpu"))
    theirs = timm.create_model(timm_model, depth=2, img_size=size, num_classes=config.embed_dim)
    report = theirs.load_state_dict(for_timm(ours.state_dict()), strict=True)
    assert not report.missing_keys and not report.unexpected_keys

    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)

    kept = torch.stack([torch.randperm(grid * grid, generator=torch.Generator().manual_seed(s)) for s in (2, 3)])
    kept = kept[:, : grid * grid // 2]
    theirs.patch_drop = DropTo(kept)
    dout = torch.randn(2, config.embed_dim, generator=torch.Generator().manual_seed(4))
    mine, peer = ours.train()(images, kept), theirs.train()(images)
    torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-5)
    mine.backward(dout)
    peer.backward(dout)
    gradients = dict(theirs.named_parameters())
    for key, gradient in for_timm({key: parameter.grad for key, parameter in ours.named_parameters()}).items():
        expected = gradients[key].grad
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), key


@pytest.mark.parametrize("name", ["EVA02-CLIP-B-16", "EVA-CLIP-8B"])
def test_text_tower_is_open_clips(name):
    config = evaclip.models.configure(name, text={"layers": 2, "vocabulary": 1000})
    text = config.text
    ours = randomize(TextTower(text, config.embed_dim))
    theirs = open_clip.transformer.TextTransformer(
        context_length=text.context,
        vocab_size=text.vocabulary,
        width=text.width,
        heads=text.heads,
        layers=text.layers,
        output_dim=config.embed_dim,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = captions(3, text)
    dout = torch.randn(3, config.embed_dim, generator=torch.Generator().manual_seed(4))
    mine, peer = ours(ids), theirs(ids)
    torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-5)
    mine.backward(dout)
    peer.backward(dout)
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        expected = gradients[key].grad
        assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max(), key


def captions(batch, text):
    """Random captions of different lengths: the largest id ends each, zeros follow."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, text.vocabulary - 1, (batch, text.context), generator=generator)
    for row, end in enumerate(torch.randint(1, text.context, (batch,), generator=generator).tolist()):
        ids[row, end], ids[row, end + 1 :] = text.vocabulary - 1, 0
    return ids


def test_a_caption_needs_no_padding():
    tower = randomize(evaclip.create_model("EVA-CLIP-tiny").text)
    ids = torch.tensor([[500, 3, 7, 511] + 12 * [0]])
    torch.testing.assert_close(tower(ids[:, :4]), tower(ids))
    torch.testing.assert_close(tower(ids[:, :4].int()), tower(ids))


def vision_formula(p, images, config, kept=None):
    """The tower without rotary embedding, as in the papers, from a state dict."""

    def norm(x, name):
        if config.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], config.eps)
        return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * p[f"{name}.weight"]

    def attention(x, name):
        qkv = x @ p[f"{name}.qkv.weight"].T
        if config.qkv_bias:
            q_bias, v_bias = p[f"{name}.q_bias"], p[f"{name}.v_bias"]
            qkv = qkv + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        q, k, v = (t.unflatten(-1, (config.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        weights = (q @ k.mT / config.head_dim**0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(-2) @ p[f"{name}.proj.weight"].T + p[f"{name}.proj.bias"]

    def mlp(x, name):
        hidden = F.gelu(x @ p[f"{name}.fc1.weight"].T + p[f"{name}.fc1.bias"])
        return hidden @ p[f"{name}.fc2.weight"].T + p[f"{name}.fc2.bias"]

    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=config.patch)
    x = x.flatten(2).mT + p["pos_embed"][:, 1:]
    if kept is not None:
        x = torch.stack([patches[ids] for patches, ids in zip(x, kept, strict=True)])
    x = torch.cat([(p["cls_token"] + p["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)
    for i in range(config.layers):
        for branch, name, n in ((attention, "attn", 1), (mlp, "mlp", 2)):
            block = f"blocks.{i}"
            if config.post_norm:
                y = norm(branch(x, f"{block}.{name}"), f"{block}.norm{n}")
            else:
                y = branch(norm(x, f"{block}.norm{n}"), f"{block}.{name}")
            x = x + y * p.get(f"{block}.gamma_{n}", 1.0)
    features = norm(x, "norm")[:, 0] @ p["head.weight"].T
    return features + p["head.bias"] if config.head_bias else features


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "EVA01-CLIP-tiny",
        "EVA01-CLIP-tiny-layerscale",
        "EVA02-CLIP-tiny-postnorm",
        "EVA-CLIP-tiny",
        "EVA-CLIP-tiny-postnorm",
    ],
)
def test_vision_tower_is_its_formula_with_its_gradient(name, dropped):
    tower = randomize(evaclip.create_model(name, dtype=torch.float64, vision={"layers": 3}).visual)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    kept = torch.tensor([[3, 0, 15, 7], [8, 2, 1, 14]]) if dropped else None
    parameters = {key: value.detach().clone().requires_grad_() for key, value in tower.state_dict().items()}
    dout = torch.randn(2, 64, generator=generator, dtype=torch.float64)

    actual = tower(images, kept)
    expected = vision_formula(parameters, images, tower.config, kept)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual, tower.parameters(), dout)
    keys = [key for key, _ in tower.named_parameters()]
    for key, gradient, other in zip(
        keys, gradients, torch.autograd.grad(expected, [parameters[key] for key in keys], dout), strict=True
    ):
        torch.testing.assert_close(gradient, other, msg=lambda text, key=key: f"{key}: {text}")


def test_features_are_the_tokens_before_the_last_norm():
    tower = randomize(evaclip.create_model("EVA02-CLIP-tiny").visual)
    images = torch.randn(2, 3, 32, 32)
    tokens = tower.features(images)
    assert tokens.shape == (2, 17, 64)
    torch.testing.assert_close(tower.head(tower.norm(tokens))[:, 0], tower(images))


def test_the_order_of_kept_patches_is_of_no_account():
    tower = randomize(
        evaclip.create_model("EVA02-CLIP-tiny-digits", dtype=torch.float64, vision={"drop_path": 0.0}).visual
    )
    images = torch.randn(1, 1, 8, 24, dtype=torch.float64)
    kept = torch.tensor([[9, 1, 4]])
    torch.testing.assert_close(tower(images, kept), tower(images, kept.sort().values.short()))
    torch.testing.assert_close(tower(images, torch.randperm(12)[None]), tower(images))
    assert not torch.allclose(tower(images, kept), tower(images, torch.tensor([[9, 1, 5]])))


def test_dropped_patches_are_never_read():
    tower = randomize(evaclip.create_model("EVA02-CLIP-tiny").visual)
    images = torch.randn(1, 3, 32, 32)
    kept = torch.tensor([[0, 1, 2, 3, 5]])
    spoilt = images.clone()
    spoilt[..., 16:, :] = torch.nan  # the rows of patches 8 to 15
    assert torch.equal(tower(images, kept), tower(spoilt, kept))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda m: m.encode_image(torch.zeros(2, 3, 32, 24)),
            r"shape \(2, 3, 32, 24\); this tower takes \(batch, 3, 32, 32\)",
        ),
        (lambda m: m.encode_image(torch.zeros(2, 3, 32, 32), kept=torch.tensor([[0], [16]])), "16"),
        (
            lambda m: m.encode_text(torch.zeros(2, 17, dtype=torch.long)),
            r"\(2, 17\); this tower takes \(batch, 1 to 16 ",
        ),
        (lambda m: m.encode_text(torch.zeros(2, dtype=torch.long)), r"\(2,\); this tower takes"),
    ],
)
def test_errors_say_what_the_tower_takes(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(evaclip.create_model("EVA02-CLIP-tiny"))
