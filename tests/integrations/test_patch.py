"""Plans and reports: all or nothing, and back again exactly."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from evakernels.integrations import Plan, bare, original


def doubled_forward(self, x):
    return 2 * original(self).forward(self, x)


def replaced(model, integration="integrations.some"):
    plan = Plan(integration, model)
    for name, module in plan.modules():
        if type(module) is nn.Linear:
            plan.replace(name, module, "twice itself", forward=doubled_forward)
            plan.add(name, module, "evakernels_mark", nn.Identity())
        elif type(module) is nn.ReLU:
            plan.leave(name, "it is positive enough")
    return plan.carry_out("a model with Linear")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def everything(model):
    return [(type(m), dict(m.__dict__), dict(m._modules), dict(m._forward_hooks)) for m in model.modules()]


def test_undo_restores_everything_even_twice(model):
    x, before = torch.randn(2, 4), everything(model)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before, expected = everything(model), model(x)
    report = replaced(model)
    assert torch.equal(model[2](x), 2 * nn.Linear.forward(model[2], x)) and not torch.equal(model(x), expected)
    assert len(calls) == 2  # a hook goes on to be called
    report.undo()
    report.undo()
    assert everything(model) == before and torch.equal(model(x), expected)


def test_a_replaced_model_can_be_copied_and_pickled(model):
    x = torch.randn(2, 4)
    report = replaced(model)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x)) and type(other[0]) is type(model[0]) and other[0] is not model[0]
    copied = copy.deepcopy(model)
    report.undo()
    assert type(model[0]) is nn.Linear and type(copied[0]) is not nn.Linear


def test_a_failure_half_way_leaves_nothing_changed(model):
    class Stubborn(nn.ReLU):
        def __setattr__(self, name, value):
            if name == "evakernels_mark":
                raise RuntimeError("I will not")
            super().__setattr__(name, value)

    model[1] = Stubborn()
    before = everything(model)
    plan = Plan("integrations.some", model)
    plan.replace("0", model[0], "twice itself", forward=doubled_forward)
    plan.add("1", model[1], "evakernels_mark", 1)
    with pytest.raises(RuntimeError, match="I will not"):
        plan.carry_out("a model")
    assert everything(model) == before


def test_undo_changes_nothing_where_something_has_changed_since(model):
    report = replaced(model)
    kept, before = type(model[0]), type(model[2])
    model[0].__class__ = type("FSDPLinear", (kept,), {})
    with pytest.raises(RuntimeError, match=r"integrations\.some: 0 changed after replace\(\); take back"):
        report.undo()
    assert type(model[2]) is before
    model[0].__class__ = kept
    report.undo()
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_what_is_bypassed_must_be_bare(model):
    assert bare(model[0], model[2]) and not bare(model[1])
    replaced(model)
    assert bare(model[0])
    handle = model[0].register_forward_pre_hook(lambda *_: None)
    assert not bare(model[2], model[0])
    handle.remove()
    assert bare(model[0])
    assert not bare(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    model[0].forward = model[0].forward
    assert bare(model[2]) and not bare(model[0])


def test_the_report_is_a_table(model):
    assert str(replaced(model)).splitlines() == [
        "evakernels.integrations.some: 2 replaced, 1 left as they were",
        "",
        "  replaced  now computed by",
        "  * (2)     twice itself",
        "",
        "  left  because",
        "  1     it is positive enough",
    ]


def test_a_module_whose_forward_somebody_set_is_left(model):
    model[0].forward = lambda x: x
    report = replaced(model)
    assert report.left["0"] == "somebody else has replaced its forward, on the instance"
    assert list(report.replaced) == ["2"]


def test_a_module_decided_twice_is_changed_once_and_undone(model):
    before = everything(model)
    plan = Plan("integrations.some", model)
    for name, mark in (("first", 1), ("second", 2)):
        assert plan.replace(name, model[0], "twice itself", forward=doubled_forward)
        plan.add(name, model[0], "evakernels_mark", mark)
    report = plan.carry_out("a model")
    assert list(report.replaced) == ["first", "second"] and model[0].evakernels_mark == 1
    report.undo()
    assert everything(model) == before


def test_wrong_uses_are_explained(model):
    with pytest.raises(TypeError, match=r"integrations\.some: the model is a str; give a torch\.nn\.Module"):
        replaced("model")
    with pytest.raises(TypeError, match="nothing in this Tanh is known to it; give a model with Linear"):
        replaced(nn.Tanh())
    with pytest.raises(ValueError, match=r"nothing could be replaced in this model:\n  \(the model\): it is positive"):
        replaced(nn.ReLU())
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device.*materialise the model"):
        replaced(nn.Sequential(nn.ReLU(), nn.Linear(2, 2, device="meta")))
    replaced(model)
    for twice in (model, model[0], nn.Sequential(model)):
        with pytest.raises(ValueError, match=r"has been replaced before; call undo\(\) of the report of that time"):
            replaced(twice)
    plan = Plan("integrations.some", model := nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model already has an attribute 'weight'"):
        plan.add("", model, "weight", 1)
