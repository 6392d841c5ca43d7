"""What a run tells of itself: how fast it was, what it held, and a picture of it."""

import dataclasses
import json
import re
import sys
import types

import pytest
import torch
from PIL import Image

from evaclip import flops
from evaclip.cli import main
from evaclip.train.recipe import load_recipe
from evaclip.train.scale import tiny
from evaclip.train.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    Trainer(tiny(load_recipe("EVA02-CLIP-L-14")), folder).run()
    return folder


def test_metrics_tell_speed_waiting_and_memory(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["samples_per_second"] > 0
        assert 0 < row["data_wait"] < 1
        assert 0.05 < row["memory_gb"] < 64
        assert "mfu" not in row  # nobody has rated this CPU


def test_metrics_tell_the_range_of_the_trust_ratios(run, tmp_path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0.0099 < row["trust_ratio_min"] < row["trust_ratio_max"] < 10.1 for row in rows)  # 0.01 to 10
    trainer = Trainer(tiny(load_recipe("EVA02-CLIP-L-14")), tmp_path)
    metrics = trainer.train_step()
    assert [metrics["trust_ratio_min"], metrics["trust_ratio_max"]] == trainer.optimizer.trust_ratios.tolist()


def test_mfu_is_model_flop_over_time_and_rate(tmp_path, monkeypatch):
    trainer = Trainer(tiny(load_recipe("EVA-CLIP-18B")), tmp_path)
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    config, trainer.waited = trainer.model.config, 0.1
    for step, tokens, frames in ((0, 7, 1), (4, 13, 1), (8, 7, 8)):
        speed = trainer._speed(step, 0.5)
        assert speed["mfu"] == pytest.approx(16 * flops.training(config, tokens, frames) / 0.5 / 312e12)
        assert speed["memory_gb"] == 3
        assert speed["data_wait"] == pytest.approx(0.2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an unknown one")
    assert "mfu" not in trainer._speed(0, 0.5)


def test_weights_and_biases_get_the_metrics_and_a_continued_run_goes_on_there(tmp_path, monkeypatch):
    sent, begun = [], []

    class Run:
        def __init__(self, id=None, **options):
            self.id = id or "made-up"
            begun.append((id, options))

        def log(self, values, step):
            sent.append((step, values["loss"]))

        def finish(self):
            sent.append("finished")

    recipe = tiny(load_recipe("EVA02-CLIP-L-14"))
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, wandb=True))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"run\.wandb needs wandb: pip install wandb"):
        Trainer(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    Trainer(recipe, tmp_path / "run").run()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sent == [*((row["step"], row["loss"]) for row in rows), "finished"]
    longer = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, steps=recipe.steps + 1))
    Trainer(longer, tmp_path / "run", resume=True).run()
    assert [id for id, _ in begun] == [None, "made-up"] and sent[-2][0] == recipe.steps
    assert begun[0][1]["config"]["optimizer"]["name"] == "lamb" and begun[0][1]["name"] == "run"


def test_the_samples_of_each_step_are_logged_by_name(tmp_path):
    """Files by their paths, also where the next batch is read ahead; digits by their captions."""
    recipe = tiny(load_recipe("EVA02-CLIP-L-14"))
    for n in range(20):
        Image.new("L", (24, 8), n).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("one two three")
    for source, expected in (
        ("digits", "one|two|three|four|five|six|seven|eight|nine|zero"),
        (str(tmp_path), r"\.png$"),
    ):
        data = dataclasses.replace(recipe.data, source=source, batch_size=8)
        of_source = dataclasses.replace(recipe, data=data, run=dataclasses.replace(recipe.run, sample_log=True))
        Trainer(of_source, tmp_path / "run").run()
        rows = [json.loads(line) for line in (tmp_path / "run/samples-0.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(recipe.steps))
        assert all(len(row["names"]) == 8 and all(re.search(expected, name) for name in row["names"]) for row in rows)
        trainer = Trainer(of_source, tmp_path / "again")
        trainer.source.batch(1)
        assert trainer.source.names == rows[1]["names"]


def test_runs_are_drawn_side_by_side(run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{"step": row["step"], "loss": row["loss"]} for row in rows] + [{"step": 9, "skipped": "loss not finite"}]
    (tmp_path / "other" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "two.png"
    assert main(["plot", str(run), str(tmp_path / "other"), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert f"written to {picture}" in capsys.readouterr().out
