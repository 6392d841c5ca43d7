"""The tables of dialects: against names written out here, and from each dialect into each and back, bit for bit."""

from itertools import product

import pytest
import torch
from weights.small import PUBLISHED, same, small

from evaclip.weights import dialects
from evaclip.weights.lazy import lazy


def in_dialect(weights, dialect):
    tensors, homeless = dialects.write(dialects.read({key: lazy(x) for key, x in weights.items()}), dialect)
    return {key: tensor.read() for key, tensor in tensors.items()}, homeless


WHOLE = ("native", "open_clip", "hf")
HAVE_HF = [name for name in PUBLISHED if name != "EVA01-CLIP-B-16"]


@pytest.mark.parametrize("name", HAVE_HF)
def test_from_each_dialect_into_each_and_back_bit_for_bit(name):
    native = {key: value.half() for key, value in small(name).state_dict().items()}
    for first, second in product(WHOLE, WHOLE):
        weights = native
        for dialect in (first, second, "native"):
            weights, homeless = in_dialect(weights, dialect)
            assert not homeless
            assert dialects.detect(weights) == dialect
        assert same(weights, native), (first, second)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_image_tower_alone_goes_to_timm_and_back_bit_for_bit(name):
    native = small(name).state_dict()
    tower = {key: value for key, value in native.items() if key.startswith("visual.")}
    timm, homeless = in_dialect(native, "timm")
    assert set(homeless) >= {"logit_scale", "text.ln_final.weight"}
    assert all(not piece.startswith("visual.") for piece in homeless)
    assert same(in_dialect(timm, "native")[0], tower)
    bare = {key.removeprefix("visual."): value for key, value in tower.items()}  # as masked image models' files
    assert same(in_dialect(bare, "native")[0], tower)


def test_huggingface_has_no_place_for_layer_scale():
    _, homeless = in_dialect(small("EVA01-CLIP-B-16").state_dict(), "hf")
    assert homeless == [f"visual.blocks.{i}.gamma_{n}" for i in (0, 1) for n in (1, 2)]


def test_huggingface_names_of_the_largest_models():
    """All names of one block of EVA-CLIP-18B, and what is cut, turned round or stripped of its first axis."""
    native = small("EVA-CLIP-18B").state_dict()
    hf, _ = in_dialect(native, "hf")
    image, text = "vision_model.encoder.layers.1.", "text_model.encoder.layers.1."
    qkv = native["visual.blocks.1.attn.qkv.weight"]
    packed, bias = (native[f"text.transformer.resblocks.1.attn.in_proj_{kind}"] for kind in ("weight", "bias"))
    expected = {
        "vision_model.embeddings.class_embedding": native["visual.cls_token"][0, 0],
        "vision_model.embeddings.position_embedding.weight": native["visual.pos_embed"][0],
        "vision_model.embeddings.patch_embedding.weight": native["visual.patch_embed.proj.weight"],
        "vision_model.embeddings.patch_embedding.bias": native["visual.patch_embed.proj.bias"],
        image + "layer_norm1.weight": native["visual.blocks.1.norm1.weight"],
        image + "layer_norm2.weight": native["visual.blocks.1.norm2.weight"],
        image + "self_attn.q_proj.weight": qkv[:64],
        image + "self_attn.k_proj.weight": qkv[64:128],
        image + "self_attn.v_proj.weight": qkv[128:],
        image + "self_attn.out_proj.weight": native["visual.blocks.1.attn.proj.weight"],
        image + "self_attn.out_proj.bias": native["visual.blocks.1.attn.proj.bias"],
        image + "mlp.fc1.weight": native["visual.blocks.1.mlp.fc1.weight"],
        image + "mlp.fc1.bias": native["visual.blocks.1.mlp.fc1.bias"],
        image + "mlp.fc2.weight": native["visual.blocks.1.mlp.fc2.weight"],
        image + "mlp.fc2.bias": native["visual.blocks.1.mlp.fc2.bias"],
        "vision_model.post_layernorm.weight": native["visual.norm.weight"],
        "visual_projection.weight": native["visual.head.weight"],
        "text_model.embeddings.token_embedding.weight": native["text.token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": native["text.positional_embedding"],
        text + "self_attn.q_proj.weight": packed[:64],
        text + "self_attn.k_proj.bias": bias[64:128],
        text + "self_attn.v_proj.weight": packed[128:],
        text + "mlp.fc1.weight": native["text.transformer.resblocks.1.mlp.c_fc.weight"],
        text + "mlp.fc2.bias": native["text.transformer.resblocks.1.mlp.c_proj.bias"],
        text + "layer_norm2.bias": native["text.transformer.resblocks.1.ln_2.bias"],
        "text_model.final_layer_norm.weight": native["text.ln_final.weight"],
        "text_projection.weight": native["text.text_projection"].T,
        "logit_scale": native["logit_scale"],
    }
    assert {key for key in hf if key.startswith(image)} == {key for key in expected if key.startswith(image)}
    for key, value in expected.items():
        assert torch.equal(hf[key], value), key


def test_huggingface_names_of_swiglu_and_biases():
    native = small("EVA02-CLIP-L-14").state_dict()
    hf, _ = in_dialect(native, "hf")
    block, layer = "visual.blocks.0.", "vision_model.encoder.layers.0."
    for ours, theirs in (
        ("mlp.w1.weight", "mlp.fc1.weight"),
        ("mlp.w2.weight", "mlp.fc2.weight"),
        ("mlp.w3.bias", "mlp.fc3.bias"),
        ("mlp.ffn_ln.weight", "mlp.ffn_ln.weight"),
        ("attn.q_bias", "self_attn.q_proj.bias"),
        ("attn.v_bias", "self_attn.v_proj.bias"),
        ("attn.inner_attn_ln.bias", "self_attn.inner_attn_ln.bias"),
    ):
        assert torch.equal(hf[layer + theirs], native[block + ours])
    assert layer + "self_attn.k_proj.bias" not in hf


@pytest.mark.parametrize("packed", ["w12", "fc1"])
def test_the_packed_mlp_of_the_smallest_image_towers_is_taken_apart(packed):
    """EVA-02 Ti and S, EVA's and timm's: w1 and w2 in one, no norm in the MLP, q, k and v in one."""
    config = {"qkv_fused": True, "ffn_norm": False, "inner_norm": False}
    native = small("EVA02-CLIP-B-16", **config).state_dict()
    tower = {key.removeprefix("visual."): value for key, value in native.items() if key.startswith("visual.")}
    down = "w3" if packed == "w12" else "fc2"
    file = {}
    for key, value in tower.items():
        if ".mlp.w1." in key:
            file[key.replace("w1", packed)] = torch.cat([value, tower[key.replace("w1", "w2")]])
        elif ".mlp.w2." not in key:
            file[key.replace("mlp.w3", f"mlp.{down}")] = value
    assert dialects.detect(file) == ("mim" if packed == "w12" else "timm")
    read, _ = in_dialect(file, "native")
    assert same(read, {f"visual.{key}": value for key, value in tower.items()})
    if packed == "fc1":
        assert same(in_dialect(read, "timm")[0], file)


def test_a_bias_of_k_must_be_zero_and_is_dropped():
    hf, _ = in_dialect(small("EVA02-CLIP-bigE-14").state_dict(), "hf")
    key = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
    pieces = dialects.read({k: lazy(x) for k, x in (hf | {key: torch.zeros(64)}).items()})
    assert pieces.unused == (key,) and not pieces.unknown
    with pytest.raises(ValueError, match=rf"{key} is not zero; EVA's image towers have no bias of k"):
        dialects.read({k: lazy(x) for k, x in (hf | {key: torch.eye(64)[0]}).items()})


def test_the_scale_that_huggingface_files_of_the_largest_do_not_store_is_100():
    hf, _ = in_dialect(small("EVA-CLIP-8B").state_dict(), "hf")
    del hf["logit_scale"]
    pieces = dialects.read({key: lazy(x) for key, x in hf.items()})
    assert pieces.computed == ("logit_scale",)
    assert pieces.tensors["logit_scale"].read().exp().item() == pytest.approx(100)
    smaller, _ = in_dialect(small("EVA02-CLIP-bigE-14").state_dict(), "hf")
    del smaller["logit_scale"]
    assert "logit_scale" not in dialects.read({key: lazy(x) for key, x in smaller.items()}).tensors


def test_a_piece_that_comes_twice_is_not_overwritten():
    tower = small("EVA02-CLIP-bigE-14").visual.state_dict()
    pieces = dialects.read({k: lazy(x) for k, x in (tower | {"fc_norm.weight": torch.zeros(64)}).items()})
    assert list(pieces.unknown) == ["fc_norm.weight"]
    assert torch.equal(pieces.tensors["visual.norm.weight"].read(), tower["norm.weight"])


def test_parts_that_do_not_make_a_whole_are_named():
    native = small("EVA02-CLIP-bigE-14").state_dict()
    hf, _ = in_dialect(native, "hf")
    del hf["vision_model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"visual.blocks.0.attn.qkv.weight needs visual.blocks.0.attn.k.weight"):
        in_dialect(hf, "native")
    native["visual.blocks.0.attn.qkv.weight"] = torch.zeros(7, 64)
    with pytest.raises(ValueError, match=r"qkv.weight has shape \(7, 64\), which is not 3 equal parts"):
        in_dialect(native, "native")
