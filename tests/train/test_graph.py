"""A captured step. CUDA is stood in for by a recorder of operators that keeps to a graph's rules: what Python decided
while recording is decided for ever, and nothing may be read back or come from the host's memory."""

import contextlib
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from train.ranked import as_pixels, equal, tiny, weights

from evaclip.train import graph
from evaclip.train.graph import WARM_UP, Graphed, _kind
from evaclip.train.recipe import Phase, RecipeError
from evaclip.train.trainer import Trainer

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}


class Recorder(TorchDispatchMode):
    """Runs operators and remembers them with their arguments, to run them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func.overloadpacket is aten.index and any(x is not None and x.dtype == torch.bool for x in args[1])
        if func.overloadpacket in READS or by_mask:
            raise RuntimeError(f"{func} reads from the device while a graph is captured")
        if func.overloadpacket is aten.lift_fresh:
            raise RuntimeError("a tensor is made of the host's data while a graph is captured")
        output = func(*args, **kwargs)
        self.calls.append((func, *tree_map(lambda x: x, (args, kwargs)), output))
        return output

    @torch.no_grad()
    def run(self):
        for func, args, kwargs, output in self.calls:
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def captures(monkeypatch):
    """How many recordings were made. Recording takes the first step, which with CUDA is the first replay."""
    made = []

    def captured(function, stream):
        recorder = Recorder()
        with recorder:
            outputs = function()
        made.append(recorder)
        first = [True]

        def replay():
            if not first:
                recorder.run()
            first.clear()
            return outputs

        return replay

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(graph, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return made


def graphed(recipe, folder):
    """A trainer whose steps are captured, though on a CPU."""
    trainer = Trainer(recipe, folder)
    trainer.optimizer.capturable = True
    trainer.take = Graphed(trainer.take, trainer.device)
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {"data__patch_drop": 0.5, "model__vision": {"drop_path": 0.3}},
        {"compute__precision": "amp_fp16", "compute__loss_scale_window": 2},
        {"compute__precision": "bf16", "loss__fixed_logit_scale": 50.0},
        {"optimizer__trust": ("shard", 3), "optimizer__bias_correction": "step_size"},
        {"optimizer__name": "adamw"},
    ],
    ids=["drop", "fp16", "bf16", "slices", "adamw"],
)
def test_replayed_steps_are_those_of_a_run_without_a_graph(changes, captures, monkeypatch, tmp_path):
    """Of a schedule whose learning rates differ, on batches that differ, with new random numbers in each step."""
    results = []
    for warm_up in (None, 1000, WARM_UP):  # no graph; one that is never captured; one that is
        monkeypatch.setattr(graph, "WARM_UP", warm_up)
        trainer = (graphed if warm_up else Trainer)(tiny(schedule__steps=WARM_UP + 4, **changes), tmp_path)
        metrics = [trainer.train_step() for _ in range(WARM_UP + 4)]
        results.append((metrics, weights(trainer), trainer.optimizer.state_dict()))
    assert len(captures) == 1
    plain, uncaptured, replayed = results
    assert equal(replayed, uncaptured)
    losses = [row["loss"] for row in plain[0]]
    assert len(set(losses)) == len(losses)
    assert [row["loss"] for row in replayed[0]] == pytest.approx(losses, rel=1e-4)  # learning rates are rounded


def test_pixels_are_normalised_in_the_graph(captures, tmp_path):
    losses = []
    for make in (Trainer, graphed):
        trainer = make(tiny(schedule__steps=WARM_UP + 3), tmp_path)
        batch = trainer.feed.batch
        trainer.feed.batch = lambda step, batch=batch: as_pixels(*batch(step))
        losses.append([trainer.train_step()["loss"] for _ in range(WARM_UP + 3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert [kind for _, kind in map(_kind, trainer.take.inputs[:2])] == [torch.uint8, torch.int64]


def test_an_overflow_is_found_in_a_replayed_step(captures, tmp_path):
    trainer = graphed(tiny(compute__precision="amp_fp16", schedule__steps=WARM_UP + 4), tmp_path)
    for _ in range(WARM_UP + 2):
        trainer.train_step()
    before, trainer.scale.value = weights(trainer), 2.0**100
    assert "grad_norm" not in trainer.train_step()
    assert trainer.scale.overflows == 1
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    trainer.scale.value = 256.0
    assert "grad_norm" in trainer.train_step()
    assert not all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_steps_of_another_shape_are_captured_anew(captures, tmp_path):
    """Whole images follow dropped ones; a stage that is shorter than the warm-up is not captured."""
    steps = 3 * WARM_UP + 3
    recipe = tiny(data__patch_drop=0.5, schedule__steps=steps)
    recipe = dataclasses.replace(recipe, phase=(Phase(share=1.0, undropped_tail=0.5), Phase(share=0.2)))
    plain = Trainer(recipe, tmp_path / "plain")
    expected = [plain.train_step()["loss"] for _ in range(steps)]
    trainer = graphed(recipe, tmp_path / "graph")
    assert [trainer.train_step()["loss"] for _ in range(steps)] == pytest.approx(expected, rel=1e-4)
    assert len(captures) == 2


def test_a_step_that_reads_back_cannot_be_captured(captures, tmp_path):
    """The rules of the recorder: without them these tests would prove little."""
    trainer = graphed(tiny(), tmp_path)
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: step() if float(trainer.optimizer.found_inf) == 0 else None
    for _ in range(WARM_UP):
        trainer.train_step()
    with pytest.raises(RuntimeError, match="reads from the device"):
        trainer.train_step()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"compute__micro_batches": 2}, "micro_batches is 1, that of phases"),
        ({"compute__activation_checkpointing": "block"}, "activation_checkpointing 'none'"),
        ({"compute__device": "cpu"}, "a step on cpu"),
    ],
)
def test_what_cannot_be_captured_is_refused(changes, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        Trainer(tiny(compute__cuda_graph=True, **changes), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16"])
def test_a_graph_on_a_gpu_takes_the_steps_of_a_run_without_one(precision, tmp_path):
    rows = []
    for enabled in (False, True):
        changes = {"compute__device": "cuda", "compute__precision": precision, "compute__cuda_graph": enabled}
        trainer = Trainer(tiny(data__patch_drop=0.5, schedule__steps=WARM_UP + 4, **changes), tmp_path)
        rows.append([trainer.train_step() for _ in range(WARM_UP + 4)])
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-2)
