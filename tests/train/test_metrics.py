"""What a run tells of itself: how fast it was, what it held, and a picture of it."""

import json

import pytest
import torch

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


def test_runs_are_drawn_side_by_side(run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{"step": row["step"], "loss": row["loss"]} for row in rows] + [{"step": 9, "skipped": "loss not finite"}]
    (tmp_path / "other" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "two.png"
    assert main(["plot", str(run), str(tmp_path / "other"), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert f"written to {picture}" in capsys.readouterr().out
