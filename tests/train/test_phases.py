"""A run in phases: what a step sees follows from the step, and a run continued in any phase is the same run."""

import dataclasses

import pytest
import torch
from PIL import Image

from evaclip.train.recipe import Data, Mixed, Phase, Recipe, RecipeError, Schedule, load_recipe
from evaclip.train.scale import tiny
from evaclip.train.source import Tokenized
from evaclip.train.trainer import Trainer


def of(*phases, steps=0, samples=0, **data) -> Recipe:
    return Recipe(data=Data(batch_size=10, **data), schedule=Schedule(steps=steps, samples=samples), phase=phases)


def spans(recipe):
    return [(stage.first, stage.end) for stage in recipe.stages()]


def test_steps_follow_from_samples():
    assert of(samples=95).steps == 10
    assert of(samples=95, steps=3).steps == 3
    assert Recipe().steps == 1000
    assert of(Phase(samples=30), Phase(samples=61)).steps == 10


def test_phases_follow_each_other_without_a_gap():
    assert spans(of(Phase(samples=30), Phase(samples=60), Phase(samples=10))) == [(0, 3), (3, 9), (9, 10)]
    assert spans(of(Phase(share=1), Phase(share=3), steps=8)) == [(0, 2), (2, 8)]
    assert spans(of(Phase(samples=30), Phase(samples=70), steps=100)) == [(0, 30), (30, 100)]
    assert spans(of(steps=7)) == [(0, 7)]


def test_a_phase_changes_what_it_names_and_nothing_else():
    first, second, third = of(
        Phase(share=1), Phase(share=1, patch_drop=0.25, undropped_tail=0.5), Phase(share=1, source="b", patch_drop=0.0),
        steps=12, source="digits", mixture=(Mixed(source="a", weight=4),), patch_drop=0.5, undropped_tail=0.25,
    ).stages()  # fmt: skip
    assert [first.patch_drop(step) for step in range(0, 4)] == [0.5, 0.5, 0.5, 0]
    assert [second.patch_drop(step) for step in range(4, 8)] == [0.25, 0.25, 0, 0]
    assert [third.patch_drop(step) for step in range(8, 12)] == [0] * 4
    assert first.data.mixture == second.data.mixture == (Mixed(source="a", weight=4),)
    assert (third.data.source, third.data.mixture) == ("b", ())


def test_a_phase_is_divided_into_its_own_micro_batches(tmp_path, monkeypatch):
    phases = Phase(share=1), Phase(share=1, micro_batches=4), Phase(share=1, micro_batches=1)
    recipe = phased(phase=phases)
    recipe = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, micro_batches=2))
    assert [stage.micro_batches for stage in recipe.stages()] == [2, 4, 1]
    trainer = Trainer(recipe, tmp_path)
    sizes = []
    trainer.model.visual.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    trainer.run()
    assert sizes == 2 * [8] * 4 + 2 * [4] * 8 + 2 * [16]  # every part twice, unless it is the batch


def test_a_source_given_by_hand_replaces_the_mixture():
    (stage,) = of(steps=2, source="folder", mixture=(Mixed(source="a"),)).stages()
    assert (stage.data.source, stage.data.mixture) == ("folder", ())


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[[phase]]\nshare = 1\n[[phase]]\nsamples = 100", r"phase 1: samples is 0; allowed: given by all"),
        ("[[phase]]\npatch_drop = 0.5", r"phase 1: share is 0.0; allowed: above 0, or else"),
        ("[[phase]]\nshare = 1\nsamples = 3", r"phase 1: share is 1.0"),
        ("[[phase]]\nshare = 1\npatch_drop = 1.0", r"phase 1: patch_drop is 1.0"),
        ("[[phase]]\nshare = 1\nframes = 0", r"phase 1: frames is 0"),
        ("[[phase]]\nshare = 1\nmicro_batches = 0", r"phase 1: micro_batches is 0; allowed: a div"),
        ("[[phase]]\nshare = 1\nmicro_batches = 3", r"phase 1: micro_batches is 3; allowed: a divisor of .* = 128"),
        ("[compute]\ncuda_graph = true\n[[phase]]\nshare = 1\nmicro_batches = 2", r"compute.cuda_graph is True"),
        ("[[phase]]\nshare = 1\nkind = 'audio'", r"my.toml: phase\[0\].kind is 'audio'"),
        ("[[phase]]\nshare = 1\npatchdrop = 1.0", r"my.toml: phase\[0\].patchdrop is no field.*did you mean"),
        ("[[phase]]\nshare = 1\nmixture = [{source = 'a', wieght = 2}]", r"phase\[0\].mixture\[0\].wieght is no field"),
        ("[data]\nmixture = [{weight = 2}]", r"my.toml: data.mixture\[0\].source is missing"),
        ("[schedule]\nsteps = 3\n[[phase]]\nshare = 9\n[[phase]]\nshare = 1", r"phase 2 has none of the 3 steps"),
        ("[optimizer]\ntrust = ['shard', 0]", r"optimizer.trust is \('shard', 0\)"),
        ("[optimizer]\ntrust = ['slice', 2]", r"optimizer.trust is \['slice', 2\]"),
        ("[data]\ncrop_scale = [0.9, 0.5]", r"data.crop_scale is \(0.9, 0.5\)"),
    ],
)  # fmt: skip
def test_a_wrong_phase_is_named(toml, sentence, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(toml)
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(str(path))


def phased(**changes) -> Recipe:
    """Digits with half the patches, whole, and as videos: two, two and two steps."""
    recipe = tiny(load_recipe("EVA-CLIP-18B"))
    return dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, steps=6), **changes)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_run_continued_in_any_phase_is_the_uninterrupted_one(at, tmp_path):
    run = dataclasses.replace(phased().run, save_every=100)
    whole = Trainer(phased(run=run), tmp_path / "whole")
    whole.run()
    broken = Trainer(phased(run=run), tmp_path / "broken")
    step = broken.train_step

    def stopping():
        broken.stop = "enough" if broken.step == at - 1 else None
        return step()

    broken.train_step = stopping
    assert broken.run() == "enough"
    torch.manual_seed(123)
    resumed = Trainer(phased(run=run), tmp_path / "broken", resume=True)
    assert resumed.step == at
    assert resumed.run() == "finished"
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_each_step_gets_the_batch_of_its_phase(tmp_path):
    trainer = Trainer(phased(), tmp_path)
    shapes = [tuple(trainer.source.batch(step)[0].shape) for step in (5, 0, 4, 3, 2, 1)]  # in any order
    assert shapes == [(16, 8, 1, 8, 24), (16, 1, 8, 24), (16, 8, 1, 8, 24)] + 3 * [(16, 1, 8, 24)]
    kept = []
    for trainer.step in range(6):
        ids = trainer._kept(16)
        kept.append(None if ids is None else tuple(ids.shape))
    assert kept == [(16, 6), (16, 6), None, None, (16, 6), (16, 6)]


def test_phases_of_one_data_set_share_it(tmp_path):
    """An epoch goes on where one phase ends and the next begins."""
    for i in range(20):
        Image.new("L", (24, 8), 12 * i).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text("one two three")
    recipe = phased()
    data = dataclasses.replace(recipe.data, source=str(tmp_path), batch_size=5)
    phases = (Phase(share=1), Phase(share=1, patch_drop=0.0))
    schedule = dataclasses.replace(recipe.schedule, steps=4)
    trainer = Trainer(dataclasses.replace(recipe, data=data, phase=phases, schedule=schedule), tmp_path / "run")
    assert isinstance(trainer.source, Tokenized)
    shades = torch.cat([trainer.source.batch(step)[0].amax((1, 2, 3)) for step in range(4)])
    assert len(shades.unique()) == 20


def test_a_video_of_real_data_is_refused_in_a_sentence(tmp_path):
    recipe = phased(phase=(Phase(share=1, kind="video", source=str(tmp_path)),))
    with pytest.raises(RecipeError, match=r"a video source is made of \.tar shards, which"):
        Trainer(recipe, tmp_path)


def test_micro_batches_of_videos_are_the_whole_batch(tmp_path):
    features = []
    for parts in (1, 2):
        recipe = phased(phase=(Phase(share=1, kind="video", frames=3),))
        compute = dataclasses.replace(recipe.compute, micro_batches=parts, precision="fp32")
        trainer = Trainer(dataclasses.replace(recipe, compute=compute), tmp_path)
        features.append(trainer.train_step()["loss"])
    assert features[0] == pytest.approx(features[1], rel=1e-5)


def test_a_video_of_a_number_shows_it_in_several_hands():
    from evaclip.data import Digits

    images, captions = Digits(4, seed=1).video(3, 5)
    again, same = Digits(4, seed=1).video(3, 5)
    assert images.shape == (4, 5, 1, 8, 24) and torch.equal(images, again) and captions == same
    assert not torch.equal(images[:, 0], images[:, 1])
    assert captions != Digits(4, seed=1).video(4, 5)[1]
