"""The loop: exact accumulation, exact resume, and what happens when numbers or machines fail."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from train.ranked import as_pixels, equal, tiny, weights

from evaclip.data import DataError
from evaclip.data.preprocess import normalized
from evaclip.train import checkpoint
from evaclip.train.recipe import RecipeError, load_recipe
from evaclip.train.step import forward_backward
from evaclip.train.trainer import Trainer


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), [n for n in a if not torch.equal(a[n], b[n])]


@pytest.mark.parametrize("parts", [1, 2])
def test_pixels_are_normalised_part_by_part(parts, tmp_path):
    recipe, gradients, shapes = tiny(), [], []
    for prepare in (lambda images: images, normalized):
        trainer = Trainer(recipe, tmp_path)
        images, ids = as_pixels(*trainer.source.batch(0))
        trainer.model.visual.register_forward_pre_hook(
            lambda module, args: shapes.append((len(args[0]), args[0].dtype))
        )
        forward_backward(trainer.model, prepare(images), ids, None, recipe, micro_batches=parts)
        gradients.append([p.grad for p in trainer.model.parameters()])
    assert equal(*gradients)
    assert set(shapes) == {(len(images) // parts, torch.float32)}


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(parts, tmp_path):
    gradients = []
    for micro_batches in (1, parts):
        recipe = tiny(compute__micro_batches=micro_batches)
        trainer = Trainer(recipe, tmp_path)
        images, ids = trainer.source.batch(0)
        metrics = forward_backward(trainer.model, images, ids, trainer._kept(len(images)), recipe)
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters()} | {"loss": metrics["loss"]})
    whole, in_parts = gradients
    for name in whole:
        error = (in_parts[name] - whole[name]).norm() / whole[name].norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_micro_batches_replay_stochastic_depth(tmp_path):
    """The second pass must drop the same branches as the first: the features' loss is that of the gradients."""
    recipe = tiny(compute__micro_batches=2, model__vision={"layers": 2, "drop_path": 0.5})
    trainer = Trainer(recipe, tmp_path)
    seen = []
    trainer.model.train()
    trainer.model.visual.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    images, ids = trainer.source.batch(0)
    forward_backward(trainer.model, images, ids, None, recipe)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_every_precision_learns(precision, optimizer, tmp_path):
    recipe = tiny(compute__precision=precision, optimizer__name=optimizer, schedule__steps=30)
    if optimizer == "adamw" and precision in ("bf16", "fp16"):
        with pytest.raises(RecipeError, match="float32 masters"):
            Trainer(recipe, tmp_path)
        return
    trainer = Trainer(recipe, tmp_path)
    assert trainer.run() == "finished"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert trainer.model.logit_scale.dtype == torch.float32
    assert ("loss_scale" in rows[-1]) == ("fp16" in precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(precision, tmp_path):
    recipe = tiny(compute__precision=precision, run__save_every=3, model__vision={"layers": 2, "drop_path": 0.3})
    whole = Trainer(recipe, tmp_path / "whole")
    assert whole.run() == "finished"

    broken = Trainer(recipe, tmp_path / "broken")
    original = broken.train_step

    def step_then_die():
        if broken.step == 4:
            raise OSError("the machine went away")
        return original()

    broken.train_step = step_then_die
    with pytest.raises(OSError, match="went away"):
        broken.run()
    torch.manual_seed(123)  # a new process has another generator state
    resumed = Trainer(recipe, tmp_path / "broken", resume=True)
    assert resumed.step == 3
    resumed.run()
    assert_same(weights(whole), weights(resumed))
    for folder in ("whole", "broken"):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(6))


def train_in_a_process(folder, *arguments):
    command = [sys.executable, "-m", "evaclip.cli", "train", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_metrics(path, lines):
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never had {lines} lines")


SMALL = (
    *("--model.vision", "layers", "1", "--model.text", "layers", "1", "--data.batch-size", "16"),
    *("--run.log-every", "1", "--run.tensorboard", "False", "--compute.threads", "1", "--schedule.warmup", "2"),
)


def test_signals_save_before_leaving_and_the_run_continues_bitwise(tmp_path):
    run, told = tmp_path / "runs/digits", ("digits", *SMALL, "--schedule.steps", "60")
    for number, lines in ((signal.SIGINT, 5), (signal.SIGTERM, 20)):
        process = train_in_a_process(tmp_path, *told)
        wait_for_metrics(run / "metrics.jsonl", lines)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + number, output
        assert "To continue: evaclip train runs/digits" in output
        stopped = checkpoint.load_trainer(checkpoint.latest(run))["step"]
        assert lines <= stopped < 60
        told = ("runs/digits",)
    process = train_in_a_process(tmp_path, *told)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"continues at step {stopped}" in output

    whole = Trainer(load_recipe(str(run / "recipe.json")), tmp_path / "whole")
    whole.run()
    assert_same(weights(whole), weights(Trainer(whole.recipe, run, resume=True)))


def test_a_killed_run_leaves_whole_checkpoints(tmp_path):
    process = train_in_a_process(tmp_path, "digits", *SMALL, "--schedule.steps", "500", "--run.save-every", "1")
    wait_for_metrics(tmp_path / "runs/digits/metrics.jsonl", 8)
    process.kill()
    process.communicate(timeout=60)
    resumed = Trainer(load_recipe(str(tmp_path / "runs/digits/recipe.json")), tmp_path / "runs/digits", resume=True)
    assert resumed.step >= 6
    resumed.train_step()


def test_non_finite_steps_are_skipped_counted_and_finally_stop_the_run(tmp_path, capsys):
    trainer = Trainer(tiny(run__max_skipped=3, schedule__steps=50), tmp_path)
    batch = trainer.source.batch

    def poisoned(step):
        images, ids = batch(step)
        return (images * float("nan") if step == 2 or step >= 5 else images), ids

    trainer.source.batch = poisoned
    outcome = trainer.run()
    assert "3 steps in a row were not finite" in outcome
    assert (trainer.step, trainer.skipped) == (8, 4)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path))["step"] == 8
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "skipped" in r] == [2, 5, 6, 7]
    assert "step 2 skipped: loss and grad_norm not finite" in capsys.readouterr().out


def test_a_non_finite_gradient_changes_nothing(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    trainer.train_step()
    before, state = weights(trainer), trainer.optimizer.state_dict()["state"]
    before_state = [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in state.values()]
    trainer.model.visual.head.weight.register_hook(lambda gradient: gradient / 0)
    assert trainer.train_step()["skipped"] == "grad_norm not finite"
    assert_same(before, weights(trainer))
    after = trainer.optimizer.state_dict()["state"]
    for old, new in zip(before_state, after.values(), strict=True):
        assert_same(old, {k: torch.as_tensor(v) for k, v in new.items()})


def test_changed_options_hold_when_a_run_is_continued(tmp_path):
    Trainer(tiny(schedule__steps=2), tmp_path).run()
    changed = tiny(
        schedule__steps=4, optimizer__visual_lr=0.5, optimizer__weight_decay=0.3, optimizer__betas=(0.5, 0.6)
    )
    resumed = Trainer(changed, tmp_path, resume=True)
    group = next(g for g in resumed.optimizer.param_groups if g["weight_decay"] and g["lr_scale"] == 1)
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.5, 0.6))
    assert 0.5 in {g["initial_lr"] for g in resumed.optimizer.param_groups}


def test_a_second_signal_does_not_break_the_checkpoint_at_hand(tmp_path, monkeypatch):
    trainer = Trainer(tiny(schedule__steps=50), tmp_path)
    write, step = checkpoint.save, trainer.train_step

    def interrupted_write(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return write(*arguments)

    def interrupted_step():
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(checkpoint, "save", interrupted_write)
    trainer.train_step = interrupted_step
    assert trainer.run() == "SIGINT"
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path))["step"] == 4
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_that_comes_again_from_a_scheduler_saves_all_the_same(numbers, tmp_path):
    """SLURM signals every process of a job, and torchrun its own once more."""
    trainer = Trainer(tiny(schedule__steps=50), tmp_path)
    step = trainer.train_step

    def signalled():
        if trainer.step == 3:
            for number in numbers:
                os.kill(os.getpid(), number)
        return step()

    trainer.train_step = signalled
    assert trainer.run() == numbers[0].name
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path))["step"] == 4


def test_a_second_ctrl_c_after_a_while_does_not_wait(tmp_path):
    trainer = Trainer(tiny(schedule__steps=50), tmp_path)

    def hanging():
        os.kill(os.getpid(), signal.SIGINT)
        trainer.asked -= 2  # so long ago
        os.kill(os.getpid(), signal.SIGINT)

    trainer.train_step = hanging
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def test_a_caption_the_tokenizer_refuses_stops_the_run_with_a_checkpoint(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    batch = trainer.source.batches.batch
    trainer.source.batches.batch = lambda step: (batch(step)[0], ["eleven"] * 16) if step == 2 else batch(step)
    assert "'eleven'" in trainer.run()
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path))["step"] == 2


def test_unusable_data_stops_the_run_with_a_checkpoint(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    batch = trainer.source.batch

    def spoilt(step):
        if step == 3:
            raise DataError("12 of 40 images are unreadable")
        return batch(step)

    trainer.source.batch = spoilt
    assert trainer.run() == "12 of 40 images are unreadable"
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path))["step"] == 3


def test_logit_scale_stays_within_its_bounds_or_fixed(tmp_path):
    trainer = Trainer(tiny(loss__max_logit_scale=10.0, optimizer__logit_scale_lr=10.0), tmp_path)
    for _ in range(3):
        trainer.train_step()
        assert 1 <= trainer.model.logit_scale.exp() <= 10.001
    fixed = Trainer(tiny(loss__fixed_logit_scale=50.0), tmp_path)
    assert fixed.train_step()["logit_scale"] == 50
    assert fixed.model.logit_scale.exp().item() == pytest.approx(50)  # what a loaded model will use


def test_half_the_patches_are_dropped_until_the_tail(tmp_path):
    trainer = Trainer(tiny(data__undropped_tail=0.5), tmp_path)
    kept = []
    for trainer.step in range(6):
        ids = trainer._kept(4)
        kept.append(None if ids is None else ids.shape[1])
    assert kept == [6, 6, 6, None, None, None]


def test_activation_checkpointing_changes_no_bit(tmp_path):
    results = []
    for how in (False, True, "selective"):
        trainer = Trainer(
            tiny(compute__activation_checkpointing=how, model__vision={"layers": 2, "drop_path": 0.5}), tmp_path
        )
        trainer.train_step()
        results.append(weights(trainer))
    assert_same(*results[:2])
    assert_same(results[0], results[2])


def test_a_truncated_checkpoint_is_named_and_changes_nothing(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    trainer.run()
    folder = checkpoint.latest(tmp_path)
    model, state = folder / "model.safetensors", folder / "trainer.pt"
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors: truncated.*; an older one may be whole"):
        Trainer(tiny(), tmp_path, resume=True)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(checkpoint.CheckpointError, match=r"trainer\.pt cannot be read.*; an older one may be whole"):
        Trainer(tiny(), tmp_path, resume=True)
    import evaclip

    with pytest.raises(ValueError, match=r"model\.safetensors"):
        evaclip.load(tmp_path)


def test_the_files_of_a_checkpoint_may_be_read_by_whoever_may_read_new_ones(tmp_path):
    Trainer(tiny(), tmp_path).run()
    (tmp_path / "new").touch()
    files = [path for path in checkpoint.latest(tmp_path).rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode} and len(files) == 3


def test_old_checkpoints_are_dropped_and_the_newest_kept(tmp_path):
    Trainer(tiny(run__save_every=1, run__keep=2), tmp_path).run()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]
