"""torch.compile around each block: the same training, whatever surrounds the blocks."""

import distributed
import pytest
import torch
import torch._dynamo
from train import ranked
from train.ranked import tiny

from evaclip.train import parallel
from evaclip.train.trainer import Trainer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Traced, differentiated and run operator by operator: what Inductor adds is not ours."""
    monkeypatch.setattr(parallel, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_take_the_same_steps(tmp_path):
    """With and without dropped tokens and gradients; three blocks share the code of one."""
    changes = {"compute__activation_checkpointing": "block", "compute__micro_batches": 2, "data__undropped_tail": 0.5}
    changes |= {"model__vision": {"layers": 3, "drop_path": 0.0}}
    losses = []
    for enabled in (False, True):
        trainer = Trainer(tiny(**changes, schedule__steps=4, compute__compile=enabled), tmp_path)
        losses.append([trainer.train_step()["loss"] for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    counters = torch._dynamo.utils.counters
    assert 2 <= counters["stats"]["unique_graphs"] <= 8 and not counters["graph_break"]
    assert list(trainer.model.state_dict()) == list(Trainer(tiny(**changes), tmp_path).model.state_dict())


def test_blocks_of_different_stochastic_depth_are_all_compiled(tmp_path):
    """They are versions of one function: torch.compile would keep so many, and run the others as they are."""
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        trainer = Trainer(tiny(model__vision={"layers": 3, "drop_path": 0.2}, compute__compile=True), tmp_path)
        trainer.train_step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_compiled_and_sharded_processes_have_the_gradients_of_the_whole_batch(tmp_path):
    whole = ranked.gradients(str(tmp_path), {})
    for shared in distributed.run(ranked.compiled_gradients, 2, str(tmp_path), {"compute__parallel": "fsdp"}):
        for name, expected in whole.items():
            error = (shared[name] - expected).norm() / expected.norm().clamp(min=1e-30)
            assert error < 1e-5, f"{name}: {error:.1e}"
