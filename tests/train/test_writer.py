"""Checkpoints written in the background: the run goes on, and they hold the step they are named by."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file
from train.ranked import equal, tiny

from evaclip.train import checkpoint
from evaclip.train.recipe import load_recipe
from evaclip.train.trainer import Trainer


def contents(run):
    return {
        folder.name: {"trainer": checkpoint.load_trainer(folder), "weights": load_file(folder / checkpoint.WEIGHTS)}
        for folder in checkpoint.checkpoints(run)
    }


def test_the_run_goes_on_and_the_checkpoint_is_of_its_step(tmp_path, monkeypatch):
    """Each is written only when the next one is asked for, which waits for it. They hold what those of a run hold that
    writes them at once."""
    options = {"run__save_every": 2, "run__keep": 9}
    Trainer(tiny(**options), tmp_path / "waiting").run()
    trainer = Trainer(tiny(**options, run__async_checkpoints=True), tmp_path / "going on")
    begun = [threading.Event() for _ in range(7)]
    save, step, start = checkpoint.save, trainer.train_step, trainer.writer.save
    asked, written = [], []

    def late(run, recipe, state, ranks):
        number = state["trainer"]["step"]
        assert begun[min(number + 1, 5)].wait(20), "training waits for the checkpoint"
        while number < 6 and asked[-1] == number:  # until the next one is asked for, and a moment longer
            time.sleep(0.01)
        time.sleep(0.2)
        save(run, recipe, state, ranks)
        written.append(number)

    def asking(run, state):
        before = list(asked)
        asked.append(state["trainer"]["step"])
        start(run, state)
        assert written == before, "one is copied while the one before is not written"

    def beginning():
        begun[trainer.step].set()
        return step()

    monkeypatch.setattr(checkpoint, "save", late)
    trainer.train_step, trainer.writer.save = beginning, asking
    assert trainer.run() == "finished"
    waiting, going_on = contents(tmp_path / "waiting"), contents(tmp_path / "going on")
    assert list(waiting) == [f"step-0000000{n}" for n in (2, 4, 6)]
    assert equal(waiting, going_on)


def test_an_error_in_the_background_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    trainer = Trainer(tiny(run__save_every=2, run__async_checkpoints=True), tmp_path)
    step = trainer.train_step

    def full(run, recipe, state, ranks):
        raise checkpoint.CheckpointError("the disk is full")

    def when_it_has_failed():
        if trainer.step == 2:
            while not trainer.writer.failed:
                time.sleep(0.01)
        return step()

    monkeypatch.setattr(checkpoint, "save", full)
    trainer.train_step = when_it_has_failed
    with pytest.raises(checkpoint.CheckpointError, match="the disk is full"):
        trainer.run()
    assert trainer.step in (2, 3)  # it may have failed before the third step began


def test_a_run_killed_while_one_is_written_continues_from_the_one_before(tmp_path):
    """The process kills itself in the middle of the second checkpoint, with its weights on the disk already."""
    script = tmp_path / "killed.py"
    script.write_text(
        """
import os, pathlib, signal, sys
from evaclip.cli import main
from evaclip.train import checkpoint

write, written = checkpoint.save_file, []

def kill(tensors, path):
    write(tensors, path)
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = kill
sys.exit(main(sys.argv[1:]))
"""
    )
    small = [
        *("--model.vision", "layers", "1", "--model.text", "layers", "1", "--data.batch-size", "16"),
        *("--run.tensorboard", "False", "--compute.threads", "1", "--schedule.steps", "9", "--run.save-every", "2"),
    ]
    command = [sys.executable, str(script), "train", "digits", *small, "--run.async-checkpoints", "True"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = tmp_path / "runs/digits"
    assert [p.name for p in (run / "checkpoints").iterdir() if p.suffix] == ["step-00000004.partial"]
    resumed = Trainer(load_recipe(str(run / "recipe.json")), run, resume=True)
    assert resumed.step == 2 and resumed.run() == "finished"
    assert not list((run / "checkpoints").glob("*.partial"))
