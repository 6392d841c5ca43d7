"""Recipes: read strictly, written back equal, refused in sentences."""

import dataclasses

import pytest

from evaclip.recipes import recipe_files
from evaclip.train.recipe import Mixed, Phase, Recipe, RecipeError, load_recipe, save_recipe


@pytest.mark.parametrize("name", recipe_files())
def test_every_shipped_recipe_loads_and_survives_writing(name, tmp_path):
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(str(tmp_path / "recipe.json")) == recipe


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[optimizer]\nlearning_rate = 1.0", r"my.toml: optimizer.learning_rate is no field"),
        ("[optimizer]\nvisual_lrr = 1.0", r"did you mean visual_lr"),
        ('[optimizer]\nvisual_lr = "fast"', r"my.toml: optimizer.visual_lr is 'fast' \(str\); allowed: float"),
        ("[schedule]\nsteps = 1.5", r"my.toml: schedule.steps is 1.5 \(float\); allowed: int"),
        ("[schedule]\nsteps = true", r"schedule.steps is True \(bool\)"),
        ('[optimizer]\nname = "sgd"', r"allowed: 'lamb' or 'adamw'"),
        ("[optimizer]\nbetas = [0.9]", r"optimizer.betas"),
        ("[data]\nbatch_size = 1", r"my.toml: data.batch_size is 1; allowed: at least 2"),
        ("[data]\nbatch_size = 10\n[compute]\nmicro_batches = 4", r"a divisor of data.batch_size = 10"),
        ("[data]\npatch_drop = 1.0", r"data.patch_drop is 1.0"),
        ("[model]\nname = 'EVA02-CLIP-B16'", r"my.toml: no model is called"),
        ("[model.vision]\nlayer = 2", r"my.toml: the vision tower has no field 'layer'"),
        ("[model.vision]\nheads = 0", r"my.toml: heads is 0"),
        (
            "[compute]\ncompile = true\nactivation_checkpointing = 'selective'",
            r"'none' or 'block' with compute.compile",
        ),
        ("[compute]\nactivation_checkpointing = 'some'", r"activation_checkpointing is 'some'"),
        ("[compute]\nshard = 8", r"compute.shard is 8; allowed: 0, or with compute.parallel 'fsdp'"),
        ("[compute]\nloss_scale = 0.5", r"compute.loss_scale is 0.5; allowed: at least 1"),
        ("[run]\nseed = -1", r"run.seed is -1"),
        ("[loss]\nfixed_logit_scale = 0.0", r"loss.fixed_logit_scale is 0.0"),
        ("model = 3", r"my.toml: model is 3"),
        ("what = ", r"my.toml: not readable as .toml"),
    ],
)
def test_a_wrong_recipe_names_file_key_and_type(toml, sentence, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(toml)
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(str(path))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="no recipe 'digit', and no file of that name; did you mean digits"):
        load_recipe("digit")


def test_a_folder_that_is_no_run_is_told_apart(tmp_path):
    with pytest.raises(RecipeError, match=r"is a folder, but none of a run: there is no .*recipe.json"):
        load_recipe(str(tmp_path))


def test_types_are_converted_where_nothing_is_lost(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[optimizer]\nvisual_lr = 1\nbetas = [0, 0.5]\n[model]\nvision = {layers = 2, mlp = 'swiglu'}")
    recipe = load_recipe(str(path))
    assert (recipe.optimizer.visual_lr, recipe.optimizer.betas) == (1.0, (0.0, 0.5))
    assert recipe.model.vision == {"layers": 2, "mlp": "swiglu"}


def test_every_field_is_explained():
    import inspect

    sections = (f.default_factory for f in dataclasses.fields(Recipe) if f.name not in ("name", "phase"))
    for cls in (Recipe, Phase, Mixed, *sections):
        lines = [line.strip() for line in inspect.getsource(cls).splitlines()]
        for field in dataclasses.fields(cls):
            if cls is Recipe and field.name not in ("name", "phase"):
                continue
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
            assert lines[at + 1].startswith('"""'), f"{cls.__name__}.{field.name} has no explanation"
