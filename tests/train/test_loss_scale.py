"""float16: the gradient is the same at any loss scale, and an overflow costs a step and nothing else."""

import dataclasses

import distributed
import pytest
import torch
from train import ranked
from train.ranked import tiny, weights

from evaclip.train.log import read_metrics
from evaclip.train.loss_scale import LossScale
from evaclip.train.trainer import Trainer

OVERFLOWING = 2.0**100  # of any float16 gradient


def test_the_scale_is_that_of_the_published_runs():
    """DeepSpeed's DynamicLossScaler with window 4, hysteresis 2 and a least scale of 1, written down by hand."""
    scale, values = LossScale(4.0, 4), []
    for overflow in [True, True, False, False, False, False, True, True, False, True, True, True]:
        scale.update(overflow)
        values.append(scale.value)
    assert values == [4, 2, 2, 2, 2, 4, 4, 2, 2, 1, 1, 1]
    assert scale.overflows == 7 and not scale.can_shrink


@pytest.mark.parametrize("precision", ["amp_fp16", "fp16"])
def test_a_power_of_two_more_changes_no_step(precision, tmp_path):
    """Where nothing over- or underflows a power of two cancels; the norm that clips is that of the true gradients."""
    results = []
    for scale in (2.0**8, 2.0**9):
        recipe = tiny(compute__precision=precision, compute__loss_scale=scale, optimizer__clip_grad_norm=0.1)
        trainer = Trainer(recipe, tmp_path)
        metrics = [trainer.train_step() for _ in range(2)]
        results.append((weights(trainer), metrics))
    assert metrics[0]["grad_norm"] > 0.1
    (few, before), (more, after) = results
    for name in few:
        torch.testing.assert_close(few[name], more[name], rtol=2e-3, atol=2e-4)
    assert [row["grad_norm"] for row in before] == pytest.approx([row["grad_norm"] for row in after], rel=1e-3)


def test_the_norm_of_float16_gradients_is_summed_in_float32(tmp_path):
    """Scaled gradients may have a norm beyond 65504, each of them being far below."""
    trainer = Trainer(tiny(compute__precision="fp16", compute__loss_scale=2.0**15), tmp_path)
    exact = Trainer(tiny(), tmp_path)
    exact.model.load_state_dict({k: v.float() for k, v in trainer.model.state_dict().items()})
    metrics, expected = trainer.train_step(), exact.train_step()
    assert metrics["grad_norm"] * 2.0**15 > 65504
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.02)


@pytest.mark.parametrize("precision", ["amp_fp16", "fp16"])
def test_an_overflow_changes_nothing_but_the_scale(precision, tmp_path):
    trainer = Trainer(tiny(compute__precision=precision, compute__loss_scale=256.0), tmp_path)
    trainer.train_step()
    before, state = weights(trainer), trainer.optimizer.state_dict()["state"]
    before_state = [{k: v.clone() for k, v in s.items()} for s in state.values()]
    trainer.scale.value = OVERFLOWING
    for expected in (OVERFLOWING, OVERFLOWING / 2):  # one is forgiven
        metrics = trainer.train_step()
        assert "skipped" not in metrics and "grad_norm" not in metrics
        assert trainer.scale.value == expected
    assert (trainer.step, trainer.skipped, trainer.skipped_in_a_row, metrics["overflows"]) == (3, 0, 0, 2)
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for old, new in zip(before_state, trainer.optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    trainer.scale.value = 256.0
    assert "grad_norm" in trainer.train_step()


def test_gradients_that_no_scale_mends_are_broken_steps(tmp_path):
    trainer = Trainer(tiny(compute__precision="amp_fp16", compute__loss_scale=2.0, run__max_skipped=2), tmp_path)
    trainer.model.visual.head.weight.register_hook(lambda gradient: gradient / 0)
    assert "2 steps in a row were not finite" in trainer.run()
    assert (trainer.step, trainer.skipped, trainer.scale.overflows, trainer.scale.value) == (4, 2, 2, 1)


@pytest.mark.parametrize("precision", ["amp_fp16", "fp16"])
def test_a_resumed_run_has_the_scale_too_and_is_bitwise_the_same(precision, tmp_path):
    recipe = tiny(
        compute__precision=precision, compute__loss_scale=2.0**30, compute__loss_scale_window=2, schedule__steps=24
    )
    whole = Trainer(recipe, tmp_path / "whole")
    whole.run()
    first = Trainer(dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, save_every=17)), tmp_path / "part")
    step = first.train_step

    def stopping():
        metrics = step()
        first.stop = "enough" if first.step == 17 else None
        return metrics

    first.train_step = stopping
    assert first.run() == "enough"
    resumed = Trainer(recipe, tmp_path / "part", resume=True)
    assert resumed.scale == first.scale and 0 < resumed.scale.value < 2.0**30
    resumed.run()
    assert resumed.scale == whole.scale
    expected, actual = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    scales = [
        [row["loss_scale"] for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "part")
    ]
    assert scales[0] == scales[1] and scales[0][0] == 2.0**30 and len(set(scales[0])) > 3


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "lamb"), ("fsdp", "lamb"), ("fsdp", "adamw")])
def test_an_overflow_in_one_process_is_one_in_all(parallel, optimizer, tmp_path):
    changes = {"compute__precision": "amp_fp16", "compute__parallel": parallel, "optimizer__name": optimizer}
    for scale, unchanged, learned in distributed.run(ranked.overflow, 2, str(tmp_path), changes):
        assert scale == {"value": 65536.0, "window": 1000, "good": 1, "forgiven": True, "overflows": 1}
        assert unchanged and learned
