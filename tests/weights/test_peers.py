"""Weights exchanged with open_clip, timm and transformers: whatever they load or save computes the same features."""

import json
from dataclasses import replace
from functools import partial

import open_clip
import pytest
import timm
import torch
from timm.models._registry import _model_entrypoints
from weights.small import same, small

import evaclip
from evaclip.models.config import CONFIGS
from evaclip.weights.export import TIMM, _open_clip, timm_name

# open_clip's own name of each model that it has, whose configuration the exported one must agree with.
OPEN_CLIP = {
    "EVA01-CLIP-g-14": "EVA01-g-14",
    "EVA01-CLIP-g-14-plus": "EVA01-g-14-plus",
    "EVA02-CLIP-B-16": "EVA02-B-16",
    "EVA02-CLIP-L-14": "EVA02-L-14",
    "EVA02-CLIP-L-14-336": "EVA02-L-14-336",
    "EVA02-CLIP-bigE-14": "EVA02-E-14",
    "EVA02-CLIP-bigE-14-plus": "EVA02-E-14-plus",
}


@pytest.fixture
def shrunk(monkeypatch):
    """A function that makes a published model small, here and in timm."""

    def shrink(name):
        model = small(name, vocabulary=49408, image_size=4 * CONFIGS[name].vision.patch)
        vision, timms = model.config.vision, timm_name(CONFIGS[name].vision)
        published = next(key for key, value in TIMM.items() if value == timms)
        monkeypatch.setitem(CONFIGS, published, replace(CONFIGS[published], vision=vision))
        sizes = {"depth": vision.layers, "embed_dim": vision.width, "num_heads": vision.heads}
        make = partial(_model_entrypoints[timms], **sizes, img_size=vision.image_size)
        monkeypatch.setitem(_model_entrypoints, timms, make)
        return model

    return shrink


def captions(text):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, text.vocabulary - 1, (3, text.context), generator=generator)
    for row, end in enumerate((3, text.context - 1, 7)):
        ids[row, end], ids[row, end + 1 :] = text.vocabulary - 1, 0
    return ids


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_loads_the_folder_and_computes_the_same_features(name, shrunk, tmp_path):
    model = shrunk(name)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    evaclip.export(tmp_path / "w.pt", tmp_path / "out", model=model)
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    vision, text = model.config.vision, model.config.text
    images = torch.randn(2, 3, *vision.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for mine, peer in (
            (model.encode_image(images), theirs.encode_image(images)),
            (model.encode_text(captions(text)), theirs.encode_text(captions(text))),
        ):
            torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-5)
            assert mine.std(0).mean() > 0.03  # the samples differ
    assert torch.equal(theirs.logit_scale, model.logit_scale)
    # What open_clip saves is read back, bit for bit.
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    back = small(name, seed=1, vocabulary=49408, image_size=vision.image_size)
    assert evaclip.load_checkpoint(back, tmp_path / "theirs.pt").dialect == "open_clip"
    assert same(back.state_dict(), model.state_dict())
    size, crop, _, _, normalize = preprocess.transforms
    assert size.size == vision.image_size and crop.size == vision.image and str(size.interpolation).endswith("BICUBIC")
    ours = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (list(normalize.mean), list(normalize.std)) == (ours["image_mean"], ours["image_std"])


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_the_configuration_is_open_clips_own(name):
    config = CONFIGS[name]
    trunk = timm_name(config.vision)
    ours, theirs = _open_clip(config, trunk)["model_cfg"], open_clip.get_model_config(OPEN_CLIP[name])
    assert ours["text_cfg"].pop("mlp_ratio") == 4.0  # open_clip's default
    # For EVA01-g open_clip names the tower that pools otherwise by default, and asks for the class token.
    theirs["vision_cfg"]["timm_model_name"] = theirs["vision_cfg"]["timm_model_name"].replace(
        "eva_giant_patch14_224", "eva_giant_patch14_clip_224"
    )
    assert ours == theirs


def test_timms_smallest_tower_with_its_packed_mlp_is_read_and_computes_the_same(tmp_path):
    theirs = timm.create_model(
        "eva02_tiny_patch14_224", depth=2, img_size=56, num_classes=32, global_pool="token", pretrained=False
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    vision = {"width": 192, "heads": 3, "qkv_fused": True, "ffn_norm": False, "inner_norm": False}
    model = small("EVA02-CLIP-L-14", **vision, image_size=56)
    report = evaclip.load_checkpoint(model, tmp_path / "w.pt", part="visual", skip=("visual.head",))
    assert report.dialect == "timm" and report.kept == ("visual.head.weight", "visual.head.bias")
    images = torch.randn(2, 3, 56, 56, generator=generator)
    with torch.no_grad():
        mine = model.visual.norm(model.visual.features(images))[:, 0]
        torch.testing.assert_close(mine, theirs.forward_head(theirs.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("form", ["tower", "whole", "bare"])
def test_transformers_text_tower_is_read_and_computes_the_same(form, tmp_path):
    """CLIP's text tower in transformers, with exact GELU: alone, and in a CLIP whose image tower is none of EVA's."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = small("EVA02-CLIP-B-16")
    text = model.config.text
    config = CLIPTextConfig(
        vocab_size=text.vocabulary,
        hidden_size=text.width,
        intermediate_size=text.mlp_width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context,
        projection_dim=model.config.embed_dim,
        hidden_act="gelu",
        eos_token_id=text.vocabulary - 1,
        bos_token_id=text.vocabulary - 2,
    )
    torch.manual_seed(0)
    theirs = CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if form == "bare":
        theirs.save_pretrained(tmp_path / "w")
        path = tmp_path / "w"
    else:
        weights = theirs.state_dict()
        if form == "whole":
            weights |= {"vision_model.pre_layrnorm.weight": torch.ones(4), "visual_projection.weight": torch.ones(4, 4)}
            weights["vision_model.encoder.layers.0.self_attn.k_proj.bias"] = torch.ones(4)
        torch.save(weights, path := tmp_path / "w.pt")
    report = evaclip.load_checkpoint(model, path, part="text")
    assert report.dialect == "hf" and report.tensors == len(model.text.state_dict())
    ids = captions(text)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), theirs(ids).text_embeds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("custom", [False, True])
def test_the_text_tower_of_open_clips_own_models_is_read_and_computes_the_same(custom, tmp_path):
    """As the published runs start: a CLIP whose image tower is a plain ViT, its text keys with or without a prefix."""
    model = small("EVA02-CLIP-B-16")
    text = model.config.text
    theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(
        embed_dim=model.config.embed_dim,
        vision_cfg={"layers": 1, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 16},
        text_cfg={
            "context_length": text.context,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
        },
    ).eval()
    # As in OpenAI's files.
    torch.save(theirs.state_dict() | {"context_length": torch.tensor(text.context)}, tmp_path / "w.pt")
    report = evaclip.load_checkpoint(model, tmp_path / "w.pt", part="text")
    assert report.dialect == ("native" if custom else "clip") and "visual.conv1.weight" in report.unused
    ids = captions(text)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), theirs.encode_text(ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds no image tower of EVA-CLIP's kind"):
        evaclip.load_checkpoint(model, tmp_path / "w.pt")
