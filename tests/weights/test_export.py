"""Folders to publish: read by evaclip, by open_clip and by transformers, each with the same features."""

import json
from dataclasses import replace
from functools import partial

import open_clip
import pytest
import timm.models
import torch
from safetensors.torch import load_file
from timm.models._registry import _model_entrypoints
from weights.small import same, small

import evaclip
from evaclip.cli import main
from evaclip.models.config import CONFIGS
from evaclip.train.checkpoint import write_weights
from evaclip.train.recipe import Data, Model, Recipe, save_recipe
from evaclip.weights.dialects import read, write
from evaclip.weights.export import TIMM, _open_clip, identified, timm_name
from evaclip.weights.lazy import full

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
        model = small(name, image_size=4 * CONFIGS[name].vision.patch)
        vision = model.config.vision
        published = next(key for key in TIMM if replace(CONFIGS[key].vision, drop_path=0.0) == _undropped(name))
        monkeypatch.setitem(CONFIGS, published, replace(CONFIGS[published], vision=vision))
        make = _model_entrypoints[TIMM[published]]
        sizes = {"depth": vision.layers, "embed_dim": vision.width, "num_heads": vision.heads}
        sizes["img_size"] = vision.image_size
        monkeypatch.setitem(_model_entrypoints, TIMM[published], partial(make, **sizes))
        monkeypatch.setattr(timm.models, TIMM[published], _model_entrypoints[TIMM[published]], raising=False)
        return model

    return shrink


def _undropped(name):
    return replace(CONFIGS[name].vision, drop_path=0.0)


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
    back = small(name, seed=1, image_size=vision.image_size)
    assert evaclip.load_checkpoint(back, tmp_path / "theirs.pt").dialect == "open_clip"
    assert same(back.state_dict(), model.state_dict())
    size, crop, _, _, normalize = preprocess.transforms
    assert size.size == vision.image_size and crop.size == vision.image and str(size.interpolation).endswith("BICUBIC")
    ours = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (list(normalize.mean), list(normalize.std)) == (ours["image_mean"], ours["image_std"])


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_the_configuration_is_open_clips_own(name, tmp_path):
    config = CONFIGS[name]
    trunk = timm_name(config.vision)
    ours, theirs = _open_clip(config, trunk)["model_cfg"], open_clip.get_model_config(OPEN_CLIP[name])
    assert ours["text_cfg"].pop("mlp_ratio") == 4.0  # open_clip's default
    # For EVA01-g open_clip names the tower that pools otherwise by default, and asks for the class token.
    theirs["vision_cfg"]["timm_model_name"] = theirs["vision_cfg"]["timm_model_name"].replace(
        "eva_giant_patch14_224", "eva_giant_patch14_clip_224"
    )
    assert ours == theirs


@pytest.mark.parametrize("name", ["EVA-CLIP-8B", "EVA-CLIP-18B", "EVA01-CLIP-B-16"])
def test_what_open_clip_does_not_have_is_exported_with_native_keys(name, tmp_path):
    model = small(name)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    files = evaclip.export(tmp_path / "w.pt", tmp_path / "out", model=model, dtype=torch.bfloat16)
    assert [file.name for file in files] == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert same(written, {k: x.bfloat16() if k != "logit_scale" else x for k, x in model.state_dict().items()})
    assert "library_name: evaclip" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_is_exported_and_loaded_with_its_tokenizer(tmp_path, capsys):
    run = tmp_path / "digits"
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    recipe = Recipe(name="digits", model=Model(name="EVA02-CLIP-tiny-digits"), data=Data(tokenizer=WORDS))
    for place in (run, folder):
        save_recipe(recipe, place / "recipe.json")
    model = evaclip.create_model("EVA02-CLIP-tiny-digits")
    write_weights(model, folder)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "config.json, model.safetensors, recipe.json" in capsys.readouterr().out
    loaded, tokenizer, _ = evaclip.load(tmp_path / "out")
    assert same(loaded.state_dict(), model.state_dict()) and not loaded.training
    assert loaded.config == model.config
    assert tokenizer(["two one"]).tolist() == [[1, 4, 3, 12, 0]]
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("- data: `digits`", "batches of 128", "| tokenizer | words:zero one", "started from random values"):
        assert line in card
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


WORDS = "words:zero one two three four five six seven eight nine"


def test_a_file_is_recognised_as_the_published_model_of_its_shapes(tmp_path):
    for name in ("EVA01-CLIP-B-16", "EVA02-CLIP-B-16", "EVA02-CLIP-L-14", "EVA02-CLIP-L-14-336", "EVA-CLIP-8B"):
        weights = evaclip.create_model(name, device="meta").state_dict()
        pieces = read({key: full(tuple(x.shape), 0.0) for key, x in weights.items()})
        assert identified(tmp_path, pieces) == name
        if name != "EVA01-CLIP-B-16":
            assert identified(tmp_path, read(write(pieces, "hf")[0])) == name
    del pieces.tensors["visual.pos_embed"]
    with pytest.raises(ValueError, match="has the shapes of no model that `evaclip models` lists"):
        identified(tmp_path, pieces)


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
        torch.save(weights, path := tmp_path / "w.pt")
    report = evaclip.load_checkpoint(model, path, part="text")
    assert report.dialect == "hf" and report.tensors == len(model.text.state_dict())
    ids = captions(text)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), theirs(ids).text_embeds, rtol=1e-5, atol=1e-5)
