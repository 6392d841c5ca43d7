"""Runs of several processes: the same training as in one, and nothing lost when one of them fails."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import distributed
import pytest
import torch
from safetensors.torch import load_file, save_file
from train import ranked

import evaclip
from evaclip.train import checkpoint
from evaclip.train.log import read_metrics
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import load_recipe, save_recipe
from evaclip.train.restart import began, mark
from evaclip.train.trainer import Trainer


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}),
        (3, {"compute__micro_batches": 2}),
        (2, {"compute__micro_batches": 4, "loss__fixed_logit_scale": 50.0}),
    ],
)
def test_processes_have_the_gradients_of_the_whole_batch(world, changes, tmp_path):
    single = {k: v for k, v in changes.items() if k != "compute__micro_batches"}
    whole = ranked.gradients(str(tmp_path), single)
    for shared in distributed.run(ranked.gradients, world, str(tmp_path), changes):
        for name, expected in whole.items():
            if expected is None:
                assert shared[name] is None
                continue
            error = (shared[name] - expected).norm() / expected.norm().clamp(min=1e-30)
            assert error < 1e-5, f"{name}: {error:.1e}"


def test_dropped_tokens_do_not_depend_on_the_number_of_processes(tmp_path):
    changes = {"data__batch_size": 10}
    kept = [distributed.run(ranked.kept, world, str(tmp_path), changes) for world in (1, 3)]
    assert torch.equal(torch.cat(kept[0]), torch.cat(kept[1]))


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    changes = {"model__vision": {"layers": 2, "drop_path": 0.3}, "run__save_every": 3}
    whole = distributed.run(ranked.run, 2, str(tmp_path / "whole"), changes)
    distributed.run(ranked.signalled, 2, str(tmp_path / "broken"), changes, 0)
    resumed = distributed.run(ranked.run, 2, str(tmp_path / "broken"), changes, True)
    for (outcome, step, expected), (_, _, actual) in zip(whole, resumed, strict=True):
        assert (outcome, step) == ("finished", 6)
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert all(torch.equal(whole[0][2][name], whole[1][2][name]) for name in whole[0][2])  # on every rank alike
    for folder in ("whole", "broken"):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(6))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(victim, tmp_path):
    for outcome, step, saved in distributed.run(ranked.signalled, 2, str(tmp_path), {}, victim):
        assert (outcome, step, saved) == ("SIGTERM", 3, 3)


def test_data_that_one_process_cannot_read_stops_all(tmp_path):
    found = distributed.run(ranked.spoilt, 2, str(tmp_path), {}, 1)
    assert found == [("12 of 40 images are unreadable", 3)] * 2
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path))["step"] == 3


@pytest.mark.parametrize(("world", "in_background"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_full_disk_leaves_the_checkpoint_before(world, in_background, tmp_path):
    changes = {"run__save_every": 2, "run__async_checkpoints": in_background}
    for words, step in distributed.run(ranked.disk_full, world, str(tmp_path), changes):
        assert "step-00000004 could not be written: [Errno 28]" in words and "checkpoints before it are whole" in words
        assert step == 2


def test_a_dead_process_ends_the_job_which_continues_from_its_checkpoint(tmp_path):
    run = tmp_path / "runs/digits"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "evaclip.cli"),
        *("train", "digits", "--model.vision", "layers", "1", "--model.text", "layers", "1", "--data.batch-size", "16"),
        *("--run.log-every", "1", "--run.tensorboard", "False", "--compute.threads", "1", "--run.save-every", "1"),
        *("--schedule.steps", "1000"),
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in range(1200):
        if run.is_dir() and len(checkpoint.checkpoints(run)) >= 2:
            break
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[2]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output  # torchrun names the dead
    before = checkpoint.load_trainer(checkpoint.latest(run))["step"]
    assert before >= 2
    told = re.findall(r"^saved runs/digits/checkpoints/step-(\d+)$", output, re.MULTILINE)
    assert before - int(told[-1]) in (0, 1)  # it may have died before the last was told
    resumed = Trainer(load_recipe(str(run / "recipe.json")), run, resume=True)
    assert resumed.step == before and math.isfinite(resumed.train_step()["loss"])


def test_a_restarted_job_goes_on_with_its_own_recipe_alone(tmp_path, monkeypatch):
    """Of two runs that jobs of one id began, it is that of the same recipe, though the other is later."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "again")
    mine, other = (ranked.tiny(run__output=str(tmp_path), run__seed=seed) for seed in (1, 2))
    for recipe, name in ((mine, "first"), (other, "second")):
        (tmp_path / name).mkdir()
        save_recipe(recipe, tmp_path / name / "recipe.json")
        mark(tmp_path / name)
        os.utime(tmp_path / name / "job", (2**31 + recipe.run.seed, 2**31 + recipe.run.seed))
    assert began(mine, Ranks(), torch.device("cpu")) is None  # not restarted
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert began(mine, Ranks(), torch.device("cpu")) == tmp_path / "first"
    assert began(other, Ranks(), torch.device("cpu")) == tmp_path / "second"
    assert began(ranked.tiny(run__output=str(tmp_path)), Ranks(), torch.device("cpu")) is None


def test_a_job_that_torchrun_restarts_goes_on_by_itself(tmp_path):
    """The second process dies once, in the fourth step; beside the run lies that of another job."""
    script = tmp_path / "dying.py"
    script.write_text(
        """
import os, signal
from evaclip.cli import command
from evaclip.train.trainer import Trainer

step = Trainer.train_step

def dying(self):
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], self.ranks.rank, self.step) == ("0", 1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

Trainer.train_step = dying
command()
"""
    )
    (tmp_path / "runs/digits").mkdir(parents=True)
    (tmp_path / "runs/digits/job").write_text("another")
    os.utime(tmp_path / "runs/digits/job", (2**33, 2**33))  # a later one
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)),
        *("train", "digits", "--model.vision", "layers", "1", "--model.text", "layers", "1", "--data.batch-size", "16"),
        *("--schedule.steps", "5", "--run.log-every", "1", "--run.tensorboard", "False", "--run.save-every", "2"),
        *("--compute.parallel", "fsdp"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "runs/digits-2 starts" in done.stdout and "runs/digits-2 continues at step 2" in done.stdout
    assert "in the first 5" in done.stdout and "view tensor" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits", "digits-2"]
    assert [row["step"] for row in read_metrics(tmp_path / "runs/digits-2/metrics.jsonl")] == list(range(5))
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path / "runs/digits-2"))["step"] == 5


@pytest.mark.parametrize(
    ("world", "parallel", "changes"),
    [
        (2, "fsdp", {"compute__micro_batches": 2}),
        (2, "fsdp2", {}),
        (4, "fsdp", {"compute__micro_batches": 2, "compute__shard": 2}),
    ],
)
def test_sharded_processes_have_the_gradients_of_the_whole_batch(world, parallel, changes, tmp_path):
    whole = ranked.gradients(str(tmp_path), {})
    for shared in distributed.run(ranked.gradients, world, str(tmp_path), changes | {"compute__parallel": parallel}):
        for name, expected in whole.items():
            error = (shared[name] - expected).norm() / expected.norm().clamp(min=1e-30)
            assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("parallel", ["fsdp", "fsdp2"])
def test_micro_batches_of_a_sharded_model_keep_no_whole_gradients(parallel, tmp_path):
    assert distributed.run(ranked.unsharded, 2, str(tmp_path), {"compute__parallel": parallel}) == [0, 0]


def test_a_sharded_run_continues_at_another_number_of_processes(tmp_path):
    changes = {"compute__parallel": "fsdp", "run__save_every": 3, "run__async_checkpoints": True}
    whole = distributed.run(ranked.run, 2, str(tmp_path / "whole"), changes)
    distributed.run(ranked.signalled, 2, str(tmp_path / "broken"), changes, 1)
    for world in (2, 3):
        copy = tmp_path / f"at {world}"
        shutil.copytree(tmp_path / "broken", copy)
        resumed = distributed.run(ranked.run, world, str(copy), changes, True)
        assert [(outcome, step) for outcome, step, _ in resumed] == [("finished", 6)] * world
        for name, expected in whole[0][2].items():
            actual = resumed[0][2][name]
            if world == 2:
                assert torch.equal(actual, expected), name
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    model, _, _ = evaclip.load(tmp_path / "whole")  # sharded weights, in one process
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[0][2][name]), name
    evaclip.convert(tmp_path / "whole", tmp_path / "one.safetensors")
    for name, value in load_file(tmp_path / "one.safetensors").items():
        assert torch.equal(value, whole[0][2][name]), name


@pytest.mark.parametrize("changes", [{}, {"compute__precision": "bf16"}])
def test_a_model_is_sharded_before_it_takes_memory_and_starts_like_a_whole_one(changes, tmp_path):
    expected, _ = ranked.started(str(tmp_path), changes)
    image = tmp_path / "image.safetensors"
    save_file({name: value + 1 for name, value in expected.items()}, image)
    for more in ({}, {"model__image_checkpoint": str(image)}):
        expected, _ = ranked.started(str(tmp_path), changes | more)
        for actual, taken in distributed.run(
            ranked.started, 2, str(tmp_path), changes | more | {"compute__parallel": "fsdp"}
        ):
            assert not taken and ranked.equal(actual, expected)


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_a_run_goes_on_sharded_whole_and_sharded_again(optimizer, tmp_path):
    """Each for two steps, from a checkpoint of the other kind: to rounding the steps of one process."""
    for world, parallel, steps in ((1, "ddp", 2), (2, "fsdp", 4), (1, "ddp", 6), (3, "fsdp2", 8)):
        changes = {"optimizer__name": optimizer, "schedule__steps": steps}
        _, _, expected = ranked.run(str(tmp_path / "one"), changes, steps > 2)
        how = changes | {"compute__parallel": parallel}
        (outcome, step, actual), *_ = distributed.run(ranked.run, world, str(tmp_path / "many"), how, steps > 2)
        assert (outcome, step) == ("finished", steps)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


def test_copies_of_a_sharded_model_are_trained_like_a_whole_one_and_continue_in_other_shapes(tmp_path):
    """Two copies, of two shards each: the steps of one process to rounding; then on in two shards of one copy."""
    plain = {"optimizer__clip_grad_norm": 0.1, "optimizer__trust": ("shard", 3), "run__save_every": 3}
    sharded = plain | {"compute__parallel": "fsdp", "compute__shard": 2}
    _, _, expected = ranked.run(str(tmp_path / "one"), plain)
    for outcome, step, actual in distributed.run(ranked.run, 4, str(tmp_path / "copies"), sharded):
        assert (outcome, step) == ("finished", 6)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)
    shutil.rmtree(checkpoint.latest(tmp_path / "copies"))
    for outcome, step, actual in distributed.run(ranked.run, 2, str(tmp_path / "copies"), sharded, True):
        assert (outcome, step) == ("finished", 6)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


def test_shards_that_do_not_divide_the_processes_are_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"compute\.shard is 2, but 3 processes cannot be divided"):
        distributed.run(ranked.run, 3, str(tmp_path), {"compute__parallel": "fsdp", "compute__shard": 2})
