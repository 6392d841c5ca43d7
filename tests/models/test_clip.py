"""The joint model: dtypes, normalisation, checkpointing, stochastic depth, compilation."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evaclip
from evaclip.models.blocks import Stream, drop_path_scale

TINY = [name for name in evaclip.list_models() if "tiny" in name]


def inputs(model, batch=3, dropped=True, dtype=torch.float32):
    """Images, captions and, with `dropped`, ids of half the patches."""
    generator = torch.Generator().manual_seed(0)
    vision, text = model.config.vision, model.config.text
    images = torch.randn(batch, vision.channels, *vision.image, generator=generator).to(dtype)
    ids = torch.randint(text.vocabulary, (batch, text.context), generator=generator)
    order = torch.rand(batch, vision.patches, generator=generator).argsort(1)
    return images, ids, order[:, : vision.patches // 2].to(torch.int16) if dropped else None


def lively(name, **options):
    """A model whose head is not next to zero."""
    torch.manual_seed(0)
    vision = {"head_init_scale": 1.0, **options.pop("vision", {})}
    return evaclip.create_model(name, vision=vision, **options)


def loss(model, images, ids, kept):
    image_features, text_features, scale = model(images, ids, kept=kept)
    return (image_features @ text_features.T * scale).log_softmax(1).diagonal().mean().neg()


def gradients(model, *batch):
    model.zero_grad()
    torch.manual_seed(7)
    loss(model, *batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", TINY)
def test_forward_is_normalised_features_and_the_scale(name):
    model = lively(name).eval()
    images, ids, kept = inputs(model)
    image_features, text_features, scale = model(images, ids, kept=kept)
    assert torch.equal(image_features, model.encode_image(images, kept=kept, normalize=True))
    assert torch.equal(text_features, model.encode_text(ids, normalize=True))
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    raw = model.encode_image(images, kept=kept)
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), image_features)
    torch.testing.assert_close(scale, torch.tensor(1 / 0.07))


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_finite_gradient(name):
    model = lively(name)
    for key, gradient in gradients(model, *inputs(model)).items():
        assert gradient.isfinite().all() and gradient.any(), key


# parameters, autocast -> dtype of features and of normalised features
DTYPES = (
    (torch.float32, None, torch.float32, torch.float32),
    (torch.bfloat16, None, torch.bfloat16, torch.float32),
    (torch.float16, None, torch.float16, torch.float32),
    (torch.float64, None, torch.float64, torch.float64),
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
)


@pytest.mark.parametrize(("dtype", "autocast", "features", "normalized"), DTYPES)
@pytest.mark.parametrize("name", ["EVA01-CLIP-tiny-layerscale", "EVA02-CLIP-tiny", "EVA-CLIP-tiny-postnorm"])
def test_dtypes_of_features_and_gradients(name, dtype, autocast, features, normalized):
    model = lively(name, dtype=dtype, vision={"drop_path": 0.2})
    images, ids, kept = inputs(model)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        assert model.encode_image(images, kept=kept).dtype == model.encode_text(ids).dtype == features
        image_features, text_features, scale = model(images, ids, kept=kept)
    assert (image_features.dtype, text_features.dtype, scale.dtype) == (normalized, normalized, torch.float32)
    (image_features.sum() + text_features.sum() + scale).backward()
    assert image_features.isfinite().all() and text_features.isfinite().all()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_half_precision_stays_near_single(name):
    model = lively(name).eval()
    images, ids, kept = inputs(model)
    single = model(images, ids, kept=kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(images, ids, kept=kept)
    half = model.to(torch.bfloat16)(images, ids, kept=kept)
    # A bfloat16 has 8 bits: a few hundred roundings of features of length 1 leave their direction within a percent.
    for rounded in (mixed, half):
        for a, b in zip(rounded[:2], single[:2], strict=True):
            assert ((a.float() * b).sum(-1) > 0.99).all()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("how", [True, "selective"])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(name, how):
    model = lively(name, vision={"drop_path": 0.4})
    batch = inputs(model, batch=5)
    plain = gradients(model, *batch)
    model.set_checkpointing(how)
    assert model.visual.checkpointing == model.text.checkpointing == ("block" if how is True else how)
    again = gradients(model, *batch)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    model.set_checkpointing(False)
    assert model.visual.checkpointing == model.text.checkpointing == "none"


def test_checkpointed_blocks_keep_one_tensor_each():
    def kept_bytes(layers, checkpointing):
        model = lively("EVA01-CLIP-tiny", vision={"layers": layers})
        model.set_checkpointing(checkpointing)
        images, _, kept = inputs(model, batch=8)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.visual.features(images, kept)
        return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in weights)

    stream = 8 * 9 * 64 * 4  # batch, class token and kept patches, width, bytes of a float32
    assert kept_bytes(6, True) - kept_bytes(2, True) == 4 * stream
    assert kept_bytes(6, False) - kept_bytes(2, False) > 4 * 10 * stream


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def sum(self, *names):
        return sum(self.counts[name] for name in names)


def test_selective_checkpointing_repeats_norms_but_neither_products_nor_attention():
    def backward(how):
        """How often the backward pass runs attention forward, norms forward, and matrix products."""
        model = lively("EVA02-CLIP-tiny")
        model.set_checkpointing(how)
        images, ids, kept = inputs(model)
        with Calls() as forward:
            image, text, _ = model(images, ids, kept=kept)
        layers = len(model.visual.blocks) + len(model.text.transformer.resblocks)
        assert forward.sum("attention_qkvpacked") == layers
        with Calls() as calls:
            (image.square().sum() + text.square().sum()).backward()
        return calls.sum("attention_qkvpacked"), calls.sum("norm", "add_norm"), calls.sum("mm", "addmm"), layers

    attentions, norms, products, layers = backward("none")
    assert (attentions, norms) == (0, 0)
    # Of the four products of a block the last is what nothing in the block reads.
    attentions, norms, more, _ = backward("block")
    assert (attentions, more) == (layers, products + 3 * layers) and norms >= 2 * layers
    assert backward("selective") == (0, norms, products, layers)


def test_an_unknown_way_of_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"checkpointing is 'some'; allowed are \"none\", \"block\""):
        lively("EVA02-CLIP-tiny").set_checkpointing("some")


def test_two_forwards_before_a_backward_keep_their_own_patches():
    model = lively("EVA02-CLIP-tiny")
    model.set_checkpointing()
    images, _, kept = inputs(model)
    other = (kept + 1) % model.visual.patches

    def gradient(*calls):
        model.zero_grad()
        sum(model.encode_image(images, kept=ids).square().sum() for ids in calls).backward()
        return model.visual.pos_embed.grad

    both, first, second = gradient(kept, other), gradient(kept), gradient(other)
    torch.testing.assert_close(both, first + second)


def test_drop_path_scales_are_0_or_1_over_keep_probability_with_mean_1():
    torch.manual_seed(0)
    scale = drop_path_scale(torch.empty(100_000, 1), 0.3, training=True)
    assert scale.dtype == torch.float32
    assert set(scale.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((scale > 0).double().mean() - 0.7) < 5 * (0.3 * 0.7 / 100_000) ** 0.5
    assert drop_path_scale(torch.empty(2, 1), 0.3, training=False) is None
    assert drop_path_scale(torch.empty(2, 1), 0.0, training=True) is None


def test_drop_path_rises_with_depth_and_is_off_in_eval():
    model = lively("EVA01-CLIP-tiny", vision={"layers": 5, "drop_path": 0.4})
    torch.testing.assert_close([block.drop_path for block in model.visual.blocks], [0.0, 0.1, 0.2, 0.3, 0.4])
    plain = lively("EVA01-CLIP-tiny", vision={"layers": 5})
    images, _, _ = inputs(model)
    assert torch.equal(model.eval().encode_image(images), plain.encode_image(images))


@pytest.mark.parametrize("name", ["EVA01-CLIP-tiny-layerscale", "EVA-CLIP-tiny-postnorm"])
def test_drop_path_drops_whole_branches_of_whole_samples(name):
    model = lively(name, dtype=torch.float64, vision={"drop_path": 0.5})
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64).expand(400, -1, -1, -1)
    torch.manual_seed(0)
    features = model.train().encode_image(images)
    # The first of two blocks has rate 0, the second 0.5 for each of its two branches: four outcomes, equally likely.
    outcomes, counts = (features * 1e6).round().unique(dim=0, return_counts=True)
    assert len(outcomes) == 4
    assert ((counts - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()
    with torch.no_grad():
        stream = model.visual.blocks[0](Stream(embedded(model.visual, images[:1])), None)
        neither = model.visual.head(model.visual.norm(stream.sum()[:, 0]))
    assert any(torch.allclose(outcome / 1e6, neither[0], atol=1e-5) for outcome in outcomes)


def embedded(tower, images):
    tokens = tower.patch_embed(images, None)
    return torch.cat([tower.cls_token, tokens], 1) + tower.pos_embed


@pytest.mark.parametrize("name", ["EVA02-CLIP-tiny-digits", "EVA-CLIP-tiny-postnorm"])
def test_compiled_equals_eager_forward_and_backward(name):
    model = lively(name, dtype=torch.float64, vision={"drop_path": 0.0})
    images, ids, kept = inputs(model, dtype=torch.float64)
    for function, batch in ((model.encode_image, {"images": images, "kept": kept}), (model.encode_text, {"ids": ids})):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = []
        for run in (function, compiled):
            model.zero_grad()
            features = run(**batch, normalize=True)
            features.sin().sum().backward()
            results.append((features, [p.grad for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_repeats_are_bitwise_equal():
    model = lively("EVA02-CLIP-tiny", dtype=torch.bfloat16)
    batch = inputs(model)
    first, second = gradients(model, *batch), gradients(model, *batch)
    assert all(torch.equal(first[key], second[key]) for key in first)
