"""A model and its replaced copy: both must compute the same, as exactly, and look the same from outside."""

import contextlib
import copy

import numerics
import torch


def scrambled(model, seed=0):
    """The model with its vectors random: no weight of one and no bias of zero hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def images(size, batch=2, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def results(model, call, *inputs, autocast=False):
    """Outputs, and the gradients of all parameters for gradients of the outputs that no dtype rounds."""
    model.zero_grad()
    torch.manual_seed(1)  # the same draws of stochastic depth and of the patches to keep
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        outputs = call(model, *inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(2)
    dys = [torch.randint(-8, 9, y.shape, generator=generator).to(y.dtype) / 8 for y in outputs]
    torch.autograd.backward(outputs, dys)
    return [y.detach() for y in outputs], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def together(gradients, oracle):
    """All gradients in one row, each in units of the largest element of its oracle.

    A bias of keys has gradient zero, the softmax being blind to it: what is found there is the rounding of what
    cancels, and its unit is the largest gradient of all.
    """
    largest = max(g.abs().max() for g in oracle.values())
    units = {
        name: largest if g.abs().max() < 1e-12 * largest else g.abs().max() + 1e-4 * largest
        for name, g in oracle.items()
    }
    return torch.cat([(gradients[name] / units[name]).flatten() for name in oracle])


def assert_same(untouched, replaced, call, *inputs, autocast=False):
    """Outputs and gradients of the replaced twin are as near to float64 as the untouched one's, in the same dtypes."""
    actual = results(replaced, call, *inputs, autocast=autocast)
    peer = results(untouched, call, *inputs, autocast=autocast)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    oracle = results(copy.deepcopy(untouched).double(), call, *exact)
    assert all(y.any() for y in (*oracle[0], *oracle[1].values())), "zeros are the same whatever computes them"
    assert [y.dtype for y in actual[0]] == [y.dtype for y in peer[0]]
    assert {n: g.dtype for n, g in actual[1].items()} == {n: g.dtype for n, g in peer[1].items()}
    for place, triple in enumerate(zip(actual[0], peer[0], oracle[0], strict=True)):
        numerics.assert_as_exact_as(*triple, numerics.OUTPUTS, f"output {place}")
    rows = (together(of[1], oracle[1]) for of in (actual, peer, oracle))
    numerics.assert_as_exact_as(*rows, numerics.GRADIENTS, "gradients")


def assert_looks_the_same(untouched, replaced):
    """Parameters, state dict, classes by name and `isinstance`."""
    mine, theirs = replaced.state_dict(), untouched.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [n for n, _ in replaced.named_parameters()] == [n for n, _ in untouched.named_parameters()]
    modules = dict(replaced.named_modules())
    for name, module in untouched.named_modules():
        assert isinstance(modules[name], type(module)) and type(modules[name]).__name__ == type(module).__name__


def state(model):
    """What undo must restore: each module's class and attributes, by identity."""
    return {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}


def assert_compiles_alike(replaced, call, *inputs):
    """Compiled without a graph break, it gives what it gives eagerly, forward and backward."""
    expected = results(replaced, call, *inputs)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = results(replaced, compiled, *inputs)
    for mine, theirs in ((found[0], expected[0]), (list(found[1].values()), list(expected[1].values()))):
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y)
