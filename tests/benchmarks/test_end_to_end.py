"""Both trainers' steps are of the same model, and train it."""

import pytest
import torch

from benchmarks import end_to_end, harness
from evaclip.train.ranks import Ranks


@pytest.fixture
def case():
    return end_to_end.QUICK[0]._replace(batch=2)


@pytest.mark.parametrize("of", [end_to_end.evaclips, end_to_end.open_clips])
def test_a_step_changes_the_loss(of, case):
    step = of(case, Ranks())
    first, second = step(), step()
    assert torch.isfinite(first) and torch.isfinite(second) and first != second


def test_open_clip_trains_as_many_parameters_and_drops_as_many_patches(case):
    from evaclip import create_model

    open_clip = harness.peer("open_clip")
    peer = end_to_end.open_clip_model(open_clip, case)
    own = create_model(case.model, **case.shrunk(), device="meta")
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in own.parameters())
    kept, _ = peer.visual.trunk.patch_drop(torch.zeros(1, 197, 1))
    assert kept.shape[1] == own.config.vision.tokens(case.drop)


def test_what_no_peer_has_is_absent_in_words():
    case = end_to_end.ON_GPU[-1]
    assert end_to_end.providers(case, Ranks())["open_clip"] == "open_clip has no such model"
