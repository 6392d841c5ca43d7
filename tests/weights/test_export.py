"""Folders to publish: what they hold, and what evaclip reads out of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights.small import same, small

import evaclip
from evaclip.cli import main
from evaclip.train.recipe import Data, Model, Recipe, load_recipe, save_recipe
from evaclip.weights.dialects import read, write
from evaclip.weights.export import exported, identified
from evaclip.weights.lazy import full

WORDS = "words:zero one two three four five six seven eight nine"


@pytest.mark.parametrize("name", ["EVA-CLIP-8B", "EVA-CLIP-18B", "EVA01-CLIP-B-16"])
def test_what_open_clip_does_not_have_is_exported_with_native_keys(name, tmp_path):
    model = small(name, vocabulary=49408)
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
    save_file(model.state_dict(), folder / "model.safetensors")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    words = capsys.readouterr().out
    assert "config.json, model.safetensors, recipe.json" in words and "open_clip cannot load it" in words
    loaded, tokenizer, _ = evaclip.load(tmp_path / "out")
    assert same(loaded.state_dict(), model.state_dict()) and not loaded.training
    assert loaded.config == model.config
    assert tokenizer(["two one"]).tolist() == [[1, 4, 3, 12, 0]]
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("- data: `digits`", "batches of 128", "| tokenizer | words:zero one", "started from random values"):
        assert line in card
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "out")]) == 2
    assert "written by `evaclip export` and is no run" in capsys.readouterr().err


def test_what_a_recipe_leaves_out_is_its_default(tmp_path):
    model = evaclip.create_model("EVA02-CLIP-tiny")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    recipe = {"name": "short", "model": {"name": "EVA02-CLIP-tiny"}, "data": {"tokenizer": "words:a b"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    evaclip.export(tmp_path / "model.safetensors", tmp_path / "out")
    assert load_recipe(str(tmp_path / "out" / "recipe.json")) == load_recipe(str(tmp_path / "recipe.json"))
    assert exported(tmp_path / "out") == (model.config, "words:a b")


def test_a_configuration_that_export_did_not_write_is_named(tmp_path):
    model = small("EVA-CLIP-8B", vocabulary=49408)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    evaclip.export(tmp_path / "w.pt", tmp_path / "out", model=model)
    content = (tmp_path / "out" / "config.json").read_text()
    for old, new, words in (
        ("{", '{"later": 1,', "later is no field"),
        ('"image_size": 28', '"image_size": "x"', "vision.image_size is 'x'"),
    ):
        (tmp_path / "config.json").write_text(content.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"config.json: {words}"):
            exported(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert exported(tmp_path) is None


def test_a_vocabulary_that_is_not_clips_needs_the_run(tmp_path):
    torch.save(evaclip.create_model("EVA02-CLIP-tiny-digits").state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"a vocabulary of 13, CLIP's has 49408; export the run that trained it"):
        evaclip.export(tmp_path / "w.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


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
