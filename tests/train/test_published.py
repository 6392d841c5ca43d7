"""The published runs as recipes: what they say, and that each runs through all its phases when shrunk."""

import itertools
import json
import math
import re
import tomllib

import pytest
import torch

from evaclip.cli import main
from evaclip.models import configure, list_models
from evaclip.recipes import recipe_files
from evaclip.train.recipe import load_recipe
from evaclip.train.resolved import resolved
from evaclip.train.scale import tiny
from evaclip.train.trainer import Trainer

PUBLISHED = {name: path for name, path in recipe_files().items() if name.startswith("EVA")}
# model: global batch, steps, peak rate of the vision and of the text tower, their layer decays, patches dropped
RUNS = {
    "EVA01-CLIP-g-14": (40960, 268555, 2e-4, 2e-5, 0.85, 0.75, 0),
    "EVA01-CLIP-g-14-plus": (114688, 95913, 4e-4, 4e-5, 0.85, 0.75, 0.5),
    "EVA02-CLIP-B-16": (131072, 64000, 2e-4, 2e-5, 0.75, 0.75, 0),
    "EVA02-CLIP-L-14": (131072, 32000, 4e-4, 4e-5, 0.85, 0.75, 0),
    "EVA02-CLIP-L-14-336": (61440, 32800, 4e-4, 4e-5, 0.75, 0.65, 0),
    "EVA02-CLIP-bigE-14": (115200, 35200, 4e-4, 4e-5, 0.9, 0.75, 0.5),
    "EVA02-CLIP-bigE-14-plus": (144000, 62500, 4e-4, 4e-5, 0.9, 0.75, 0.5),
    "EVA-CLIP-8B": (178176, 50512, 4e-4, 4e-5, 0.9, 0.75, 0.5),
    "EVA-CLIP-8B-448": (24576, 32553, 2e-4, 2e-5, 0.85, 0.75, 0),
    "EVA-CLIP-18B": (108000, 55963, 4e-4, 4e-5, 0.9, 0.75, 0.5),
    "EVA-CLIP-18B-336": (23040, 17362, 2e-4, 2e-5, 0.85, 0.75, 0),
}


def test_every_published_run_is_there():
    assert set(PUBLISHED) == set(RUNS) <= set(list_models())


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_says_what_was_published(name):
    recipe = load_recipe(name)
    data, optimizer = recipe.data, recipe.optimizer
    rates = (optimizer.visual_lr, optimizer.text_lr, optimizer.visual_layer_decay, optimizer.text_layer_decay)
    assert (data.batch_size, recipe.steps, *rates, data.patch_drop) == RUNS[name]
    large = name.startswith("EVA-CLIP")
    assert optimizer.betas == (0.9, 0.95 if large else 0.98)
    assert (optimizer.eps, optimizer.weight_decay) == (1e-6, 0.0 if large else 0.05)
    assert (optimizer.bias_correction, optimizer.trust_ratio_bounds) == ("step_size", (0.01, 10.0))
    assert optimizer.adapt_excluded
    assert recipe.loss.fixed_logit_scale == (100 if large else None)
    config = configure(recipe.model.name, vision=recipe.model.vision)
    assert config.vision.drop_path == (0.4 if name == "EVA01-CLIP-g-14" else 0)
    assert recipe.schedule.warmup == 2000
    if large:
        assert optimizer.trust == "group"
    else:  # the batch is divided among the ranks whose slices have trust ratios
        assert optimizer.trust[0] == "shard"
        assert data.batch_size % optimizer.trust[1] == 0


@pytest.mark.parametrize("name", RUNS)
def test_merged_2b_is_four_to_one(name):
    weights = {part.source.split("/")[1]: part.weight for part in load_recipe(name).data.mixture}
    assert weights in ({"laion-2b": 4, "coyo-700m": 1}, {"laion-2b": 1}, {"laion-400m": 1})
    assert len(weights) == (1 if name == "EVA01-CLIP-g-14" or "bigE" in name else 2)


@pytest.mark.parametrize("name", RUNS)
def test_every_field_has_its_source_beside_or_above_it(name):
    lines = PUBLISHED[name].read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        field = re.match(r"\s*\{?(\w+) = ", line)
        if field and field[1] not in ("name", "save_every") and not line.endswith("["):
            assert "#" in line or above.startswith("#"), line


def test_the_largest_run_has_three_phases():
    stages = load_recipe("EVA-CLIP-18B").stages()
    assert [(s.first, s.end) for s in stages] == [(0, 50000), (50000, 55741), (55741, 55963)]
    assert [s.patch_drop(s.end - 1) for s in stages] == [0.5, 0, 0.5]
    assert [s.kind for s in stages] == ["image", "image", "video"]
    assert [len(s.data.mixture) for s in stages] == [2, 3, 0]
    assert stages[2].frames == 8


@pytest.mark.parametrize("name", recipe_files())
def test_what_print_shows_is_the_recipe(name, tmp_path, capsys):
    assert main(["train", name, "--print", "--run.seed", "7"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "printed.toml").write_text(text)
    printed = load_recipe(str(tmp_path / "printed.toml"))
    assert printed.run.seed == 7
    assert resolved(printed) == text
    assert set(tomllib.loads(text)) >= {"name", "model", "data", "optimizer", "schedule", "loss", "compute", "run"}


def test_print_names_no_source_beside_a_mixture():
    assert "\nsource" not in resolved(load_recipe("EVA-CLIP-8B")) and "\nsource" in resolved(load_recipe("digits"))


def test_a_source_on_the_command_line_takes_the_mixtures_place(capsys):
    assert (
        main(["train", "EVA02-CLIP-L-14", "--print"])
        == main(["train", "EVA02-CLIP-L-14", "--data.source", "x", "--print"])
        == 0
    )
    before = capsys.readouterr().out
    assert "mixture = [{" in before and 'source = "x"\nmixture = []' in before
    assert main(["train", "EVA02-CLIP-L-14", "--data.source=digits", "--print"]) == 0
    assert 'source = "digits"\nmixture = []' in capsys.readouterr().out


def test_print_tells_what_follows():
    text = resolved(load_recipe("EVA-CLIP-18B"))
    assert "17,630,494,720 parameters" in text
    assert "55,963 steps of 108,000 samples: 6,044,004,000 samples" in text
    assert "phase 2, steps 50,000 to 55,740: images" in text and "257 of 257 tokens" in text
    assert "videos of 8 frames of data/merged-video/*.tar; 129 of 257 tokens" in " ".join(text.split("\n#    "))
    assert "4.00e-04" in text and f"{4e-4 * 0.9**49:.2e}" in text and f"{4e-5 * 0.75**33:.2e}" in text


@pytest.mark.parametrize("name", RUNS)
def test_every_recipe_trains_through_all_its_phases_when_shrunk(name, tmp_path):
    recipe = tiny(load_recipe(name))
    trainer = Trainer(recipe, tmp_path)
    encoded = []
    forward = trainer.model.visual.forward

    def watched(images, kept=None):
        encoded.append((len(images), None if kept is None else kept.shape[1]))
        return forward(images, kept)

    trainer.model.visual.forward = watched
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    assert trainer.run() == "finished"
    expected = []
    for stage in recipe.stages():
        parts = stage.micro_batches  # each is encoded for its features, and for its gradients
        part = 16 * stage.frames // parts, 6 if stage.data.patch_drop else None
        expected += [part] * (4 if parts == 1 else 4 * 2 * parts)
    assert encoded == expected
    assert len(recipe.stages()) == (3 if recipe.phase else 1)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * len(trainer.stages) and all(math.isfinite(row["loss"]) for row in rows)
    for key, value in trainer.model.named_parameters():
        exact = trainer.optimizer.state[value].get("master", value)
        fixed = key == "logit_scale" and recipe.loss.fixed_logit_scale is not None
        assert torch.equal(exact, before[key].to(exact.dtype)) == fixed, key


def test_the_command_line_runs_a_shrunk_recipe(tmp_path, capsys):
    told = ["--run.output", str(tmp_path), "--schedule.steps", "3"]
    assert main(["train", "EVA02-CLIP-B-16", "--scale", "tiny", *told]) == 0
    assert "trained 3 steps" in capsys.readouterr().out
    assert (tmp_path / "EVA02-CLIP-B-16-tiny" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scale", "small"], "--scale is 'small'; allowed: \"tiny\""),
        (["--scale"], "--scale is ''"),
        (
            ["--model.image-checkpoint", "gone.pt"],
            "model.image_checkpoint is 'gone.pt': no checkpoint at gone.pt; give yours as --model.image-checkpoint",
        ),
    ],
)
def test_what_cannot_run_is_said_in_a_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--model.vision", "layers", "1", "--model.text", "layers", "1")
    assert main(["train", "digits", *small, *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
