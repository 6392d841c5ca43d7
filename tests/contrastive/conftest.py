"""How Triton's kernels of the losses are run in tests: interpreted or on a GPU, in small tiles, between canaries."""

import pytest
import torch
from contrastive.peers import INTEGER_CANARY


@pytest.fixture
def quick_interpreter(monkeypatch):
    """Triton's interpreter patches its language at the call of each helper, which takes longer than the rest: once per
    kernel is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function):
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if languages <= patched:
            return interpreter._LangPatchScope()
        scope, outermost = patch(function), not patched
        patched.update(languages)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    if hasattr(interpreter, "_LangPatchScope"):
        monkeypatch.setattr(interpreter, "_patch_lang", once)


@pytest.fixture
def device(triton_kernels, quick_interpreter):
    return triton_kernels


@pytest.fixture
def small_tiles(monkeypatch):
    """Small tiles, chunks that end within one, and W one block of rows at a time."""
    from evakernels.ops.contrastive import triton

    monkeypatch.setattr(triton, "config", lambda *_: triton.Config(32, 64, 32, warps=4, gradient_warps=4, stages=1))
    monkeypatch.setattr(triton, "chunk", lambda ranks, features: 40)
    monkeypatch.setattr(triton, "BYTES", 1)


@pytest.fixture(params=["small tiles", "its own tiles"])
def tile(request):
    if request.param == "small tiles":
        request.getfixturevalue("small_tiles")


@pytest.fixture
def guarded(monkeypatch):
    """Every tensor that a kernel is given lies between canaries: they are NaN to who reads them, and kept."""
    from evakernels import jit

    original, margin = jit.launch, 512

    def launch(kernel, grid, *arguments, **options):
        between = []
        for x in arguments:
            if isinstance(x, torch.Tensor):
                assert x.is_contiguous()
                canary = torch.nan if x.is_floating_point() else INTEGER_CANARY
                memory = x.new_full((x.numel() + 2 * margin,), canary)
                inside = memory[margin : margin + x.numel()].view(x.shape)
                between.append((x, memory, inside.copy_(x)))
        views = iter(between)
        original(kernel, grid, *(next(views)[2] if isinstance(x, torch.Tensor) else x for x in arguments), **options)
        for x, memory, inside in between:
            for canaries in (memory[:margin], memory[margin + x.numel() :]):
                kept = canaries.isnan() if x.is_floating_point() else canaries == INTEGER_CANARY
                assert kept.all(), f"{kernel.fn.__name__} writes out of bounds"
            x.copy_(inside)

    def switch(on: bool) -> None:
        monkeypatch.setattr(jit, "launch", launch if on else original)

    return switch
