"""Training from shards: killed anywhere, it goes on with the same samples; several ranks share those of one."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shard_files import NUMBERS, jpeg, numbers, write_shards
from train.ranked import equal

from evaclip.cli import main
from evaclip.models import configure
from evaclip.train.log import read_metrics
from evaclip.train.recipe import Mixed, Recipe, RecipeError, load_recipe
from evaclip.train.source import open_source
from evaclip.train.trainer import Trainer

WORDS = "words:" + " ".join(NUMBERS.words)


def recipe(source: str, cache: Path, **data) -> Recipe:
    """A tiny model on shards."""
    base = load_recipe("digits")
    data = {"batch_size": 8, "tokenizer": WORDS, "workers": 0, "cache": str(cache), "patch_drop": 0.5} | data
    return dataclasses.replace(
        base,
        name="shards",
        model=dataclasses.replace(base.model, name="EVA02-CLIP-tiny", vision={"layers": 1}, text={"layers": 1}),
        data=dataclasses.replace(base.data, source=source, **data),
        schedule=dataclasses.replace(base.schedule, steps=14, warmup=2),
        run=dataclasses.replace(base.run, log_every=1, save_every=3, tensorboard=False, output=str(cache / "runs")),
    )


def config(of: Recipe):
    return configure(of.model.name, vision=of.model.vision, text=of.model.text)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("mode", ["epoch", "resampled"])
def test_the_batches_of_all_ranks_are_that_of_one(tmp_path, mode, world):
    mixture = (Mixed(source=write_shards(tmp_path / "a", [9, 12, 5]), weight=3),)
    mixture += (Mixed(source=write_shards(tmp_path / "b", [8], first=100)),)
    given = recipe("digits", tmp_path, mixture=mixture, mode=mode)
    whole = open_source(given, config(given))
    ranks = [open_source(given, config(given), rank, world) for rank in range(world)]
    for step in range(5):
        images, ids = whole.batch(step)
        parts = [rank.batch(step) for rank in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), ids)
        assert sum(number >= 100 for number in numbers(ids)) == 2


@pytest.mark.parametrize("world", [2, 4])
def test_digits_and_folders_are_shared_too(tmp_path, world):
    for n in range(20):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n))
        (tmp_path / f"{n}.txt").write_text(str(n))
    digits = load_recipe("digits")
    for given in (recipe(str(tmp_path), tmp_path, workers=2), digits):
        whole, ranks = (
            open_source(given, config(given)),
            [open_source(given, config(given), r, world) for r in range(world)],
        )
        for step in range(3):
            images, ids = whole.batch(step)
            parts = [rank.batch(step) for rank in ranks]
            assert torch.equal(torch.cat([part[0] for part in parts]), images)
            assert torch.equal(torch.cat([part[1] for part in parts]), ids)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixture": (Mixed(source="digits"),)}, r"data\.mixture is made of \.tar shards, which 'digits' is not"),
        ({"source": "nowhere"}, r"'nowhere' does not exist; give .* or \.tar shards"),
        ({"source": "{0..3}.tar"}, r"4 of the 4 shards"),
        ({"batch_size": 64}, r"has 26 samples .* but a batch of 64 takes 64 of it"),
    ],
)
def test_data_that_does_not_fit_is_an_error(tmp_path, changes, sentence):
    given = recipe(write_shards(tmp_path, [9, 12, 5]), tmp_path)
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, **changes))
    with pytest.raises(ValueError, match=sentence):
        open_source(given, config(given))
    with pytest.raises(RecipeError, match=r"a video source is made of \.tar shards"):
        table = dataclasses.replace(given, data=dataclasses.replace(given.data, source="table.csv", mixture=()))
        open_source(table, config(given), frames=8)


def test_mixtures_are_read_from_toml_and_checked(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('[data]\nmixture = [{source = "a.tar", weight = 4}, {source = "b.tar"}]')
    assert load_recipe(str(path)).data.mixture == (Mixed(source="a.tar", weight=4.0), Mixed(source="b.tar", weight=1.0))
    for mixture, sentence in (
        ('{source = "a.tar", weight = 0}', "weights above 0"),
        ('{source = "a.tar"}, {source = "a.tar"}', "each set once"),
        ('{sauce = "a.tar"}', r"mixture\[0\]\.sauce is no field of a recipe; did you mean source"),
        ('"a.tar"', r"mixture\[0\] is 'a\.tar'"),
    ):
        path.write_text(f"[data]\nmixture = [{mixture}]")
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(str(path))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_anywhere_goes_on_with_the_same_samples(tmp_path, seed):
    """Killed by SIGKILL with two readers; then continued with three. Weights, moments and the log of samples are those
    of a run that was never interrupted, and had no readers at all."""
    source = write_shards(tmp_path / "shards", [9, 4, 12, 5], broken=[7])
    options = [
        "train",
        "digits",
        *SMALL,
        "--data.source",
        source,
        "--data.tokenizer",
        WORDS,
        "--data.cache",
        str(tmp_path),
    ]
    options += ["--run.seed", str(seed), "--run.sample-log", "True"]
    assert main([*options, "--run.output", str(tmp_path / "whole"), "--data.workers", "0"]) == 0

    run = tmp_path / "killed" / "digits"
    command = [sys.executable, "-m", "evaclip.cli", *options, "--run.output", str(run.parent), "--data.workers", "2"]
    after = random.Random(seed).randrange(3, 24)
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process:
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < after:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert main(["train", str(run), "--data.workers", "3"]) == 0

    whole = tmp_path / "whole" / "digits"
    last = "checkpoints/step-00000030"
    assert (whole / last / "model.safetensors").read_bytes() == (run / last / "model.safetensors").read_bytes()
    assert equal(*(torch.load(folder / last / "trainer.pt", weights_only=True) for folder in (whole, run)))
    assert losses(whole / "metrics.jsonl") == losses(run / "metrics.jsonl")
    samples = whole / "samples-0.jsonl"
    assert samples.read_bytes() == (run / "samples-0.jsonl").read_bytes()
    rows = read_metrics(samples)
    assert [row["step"] for row in rows] == list(range(30)) and {len(row["names"]) for row in rows} == {8}
    assert len({name for row in rows for name in row["names"]}) == 29  # of 30, one of which cannot be read


SMALL = (
    *("--model.name", "EVA02-CLIP-tiny", "--model.vision", "layers", "1", "--model.text", "layers", "1"),
    *("--data.batch-size", "8", "--schedule.steps", "30", "--schedule.warmup", "2", "--run.save-every", "3"),
    *("--run.log-every", "1", "--run.tensorboard", "False", "--compute.threads", "1"),
)


def losses(metrics: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(metrics)]


def test_a_dead_reader_ends_the_run_with_its_name_and_a_checkpoint(tmp_path):
    given = recipe(write_shards(tmp_path / "shards", [9, 12, 5]), tmp_path, workers=2)
    trainer = Trainer(given, tmp_path / "run")
    step, readers = trainer.train_step, list(trainer.source._readers.values())

    def step_and_kill():
        metrics = step()
        if trainer.step == 4:
            os.kill(readers[0].pid, signal.SIGKILL)
        return metrics

    trainer.train_step = step_and_kill
    assert "evaclip-reader-0 of rank 0" in trainer.run()
    assert 4 <= trainer.step < 14
    resumed = Trainer(given, tmp_path / "run", resume=True)
    assert resumed.step == trainer.step and resumed.run() == "finished"


def test_from_a_folder_of_images_through_shards_to_a_trained_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for n in range(40):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(jpeg(n))
        (tmp_path / "images" / f"{n}.txt").write_text(f"{n}\n{n + 100}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "pack", "images", "shards", "--max-samples", "16"]) == 0
    assert main(["data", "check", "shards", "--workers", "1"]) == 0
    options = ["--data.source", "shards", "--data.tokenizer", WORDS, "--data.workers", "1", "--data.cache", "cache"]
    assert main(["train", "digits", *SMALL, *options, "--schedule.steps", "4"]) == 0
    assert "trained 4 steps" in capsys.readouterr().out
    assert main(["eval", "runs/digits"]) == 2
    assert "not for the digits" in capsys.readouterr().err


def test_a_mixture_is_trained_on_to_the_end(tmp_path, monkeypatch, capsys):
    """The recipe of a mixture names no source, so the digits' name stands there."""
    monkeypatch.chdir(tmp_path)
    sets = [write_shards(tmp_path / name, [9, 8]) for name in ("a", "b")]
    mixture = ", ".join(f'{{source = "{source}"}}' for source in sets)
    (tmp_path / "mixed.toml").write_text(f"[data]\nmixture = [{mixture}]")
    told = ["--data.tokenizer", WORDS, "--data.workers", "0", "--data.cache", "cache", "--schedule.steps", "2"]
    assert main(["train", "mixed.toml", *SMALL, *told]) == 0
    assert "trained 2 steps. Next: evaclip eval" in capsys.readouterr().out
