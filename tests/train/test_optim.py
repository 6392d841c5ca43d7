"""Parameter groups, layer decay and schedule are those of the published runs."""

import math

import pytest
import torch

from evaclip.models import create_model
from evaclip.train.optim import layer_id, parameter_groups, set_learning_rate, warmup_cosine
from evaclip.train.recipe import Optimizer, Schedule


def named_groups(model, recipe):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in parameter_groups(model, recipe) for p in group["params"]}


@pytest.fixture(scope="module")
def model():
    return create_model("EVA02-CLIP-bigE-14", device="meta")


def test_every_parameter_is_in_one_group(model):
    groups = parameter_groups(model, Optimizer(visual_layer_decay=0.9, text_layer_decay=0.75))
    assert sorted(map(id, (p for g in groups for p in g["params"]))) == sorted(map(id, model.parameters()))


def test_layer_decay_of_the_published_largest_model(model):
    groups = named_groups(model, Optimizer(visual_layer_decay=0.9, text_layer_decay=0.75, visual_lr=4e-4, text_lr=4e-5))
    assert groups["visual.patch_embed.proj.weight"]["lr_scale"] == pytest.approx(0.9**65)
    assert groups["visual.blocks.0.norm1.weight"]["lr_scale"] == pytest.approx(0.9**64)
    assert groups["visual.head.weight"]["lr_scale"] == 1
    assert groups["text.token_embedding.weight"]["lr_scale"] == pytest.approx(0.75**25)
    assert groups["text.transformer.resblocks.23.ln_1.weight"]["lr_scale"] == pytest.approx(0.75)
    assert groups["text.text_projection"]["lr_scale"] == 1
    assert (groups["visual.head.weight"]["initial_lr"], groups["text.text_projection"]["initial_lr"]) == (4e-4, 4e-5)
    assert groups["logit_scale"]["initial_lr"] == 5e-4


def test_what_takes_no_weight_decay(model):
    groups = named_groups(model, Optimizer(weight_decay=0.05))
    free = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert {"visual.cls_token", "visual.pos_embed", "text.positional_embedding", "logit_scale"} <= free
    assert {"visual.blocks.0.attn.q_bias", "visual.blocks.0.norm1.weight", "visual.head.bias"} <= free
    assert not {"text.token_embedding.weight", "text.text_projection", "visual.patch_embed.proj.weight"} & free
    assert all(p.ndim <= 1 or n.endswith(("pos_embed", "cls_token", "positional_embedding")) or n not in free
               for n, p in model.named_parameters())  # fmt: skip


def test_layer_ids():
    assert layer_id("visual.blocks.11.mlp.w3.weight", 12) == 12
    assert layer_id("text.transformer.resblocks.0.ln_1.weight", 12) == 1
    assert layer_id("visual.norm.weight", 12) == 13


def test_schedule_warms_up_and_ends_at_zero():
    schedule = Schedule(steps=100, warmup=10)
    assert [warmup_cosine(s, schedule) for s in (0, 9, 10, 55)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert warmup_cosine(100, schedule) == pytest.approx(0)
    assert warmup_cosine(99, schedule) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert warmup_cosine(0, Schedule(steps=1, warmup=0)) == 1


def test_learning_rate_is_peak_times_share_times_scale():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "initial_lr": 4e-4, "lr_scale": 0.9}], lr=1.0)
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4e-4 * 0.5 * 0.9)
