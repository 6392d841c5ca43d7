"""Triton's interpreter, where it computes otherwise than a GPU, and where it is slower than it need be."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from packaging.version import Version


def runs() -> bool:
    """Whether Triton is there and its interpreter runs: that of 3.6 fails with NumPy 2.4 and later."""
    try:
        return Version(version("triton")) >= Version("3.7") or Version(np.__version__) < Version("2.4")
    except PackageNotFoundError:
        return False


def round_bfloat16(monkeypatch) -> None:
    """To nearest even, as a GPU does: the interpreter cuts float32 off, or rounds up without a carry."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def mend(monkeypatch) -> None:
    """Products of bfloat16 are those of their values, not of their bits, and float32 is rounded to it, not cut off.

    A kernel's functions are called without patching Triton's language anew at every call, which takes most of the time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    dot, patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang
    patched = set()

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def called(function, *args, **kwargs):
        if id(function.fn.__globals__) not in patched:
            patched.add(id(function.fn.__globals__))
            patch(function.fn)
        return function.rewrite()(*args, **kwargs)

    round_bfloat16(monkeypatch)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)
