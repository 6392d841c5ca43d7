"""Triton kernels: how they are declared, launched with little of the host's time, and run on a CPU.

What every `evakernels/ops/<family>/triton.py` uses. `kernel` declares one, `launch` launches it. On a CPU a kernel runs
where Triton interprets it (TRITON_INTERPRET=1 when this module is first imported), or it is written down unrun by
`recorded`, to be compiled for a GPU that is not there.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """What `launch` was called with: enough to compile the kernel for any GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors by their dtype
    constants: dict[str, Any]
    warps: int
    stages: int


_PLAIN = frozenset((float, bool, type(None)))
_compiled: dict[tuple, tuple[Any, list]] = {}  # what Triton made of a kernel, and its constants in their order
_record: list[Launch] | None = None


def kernel(function: Callable) -> Any:
    """Declare a Triton kernel: run-time parameters first, `tl.constexpr` ones last.

    No value of an integer recompiles it; pointers, whose names end in `_ptr`, keep their alignment to 16 bytes as
    something that the compiler knows.
    """
    numbers = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation is not tl.constexpr and not name.endswith("_ptr")
    ]
    return triton.jit(function, do_not_specialize=numbers)


def launch(
    kernel: Any, grid: tuple[int, ...], /, *arguments: Any, warps: int = 4, stages: int = 1, **constants
) -> None:
    """Launch a kernel in the current stream of its first tensor's device.

    Args:
        kernel: declared with `kernel`.
        grid: up to three numbers of programs; where one is 0 nothing is launched.
        arguments: tensors, Python's numbers or None for the run-time parameters, in their order.
        warps, stages: of a program; of its pipelined loops.
        constants: the constexpr parameters.
    """
    grid = (*grid, 1, 1)[:3]
    if not all(grid):
        return
    if _record is not None:
        kinds = tuple(a.dtype if isinstance(a, Tensor) else a for a in arguments)
        _record.append(Launch(kernel, grid, kinds, constants, warps, stages))
        return
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    device = _device(arguments)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, *arguments, warps=warps, stages=stages, **constants)
    # Triton's own look-up formats the options and the arguments' types into a string at each call.
    key = (id(kernel), device, warps, stages, *constants, *constants.values(), *_kinds(arguments))
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants, **options(warps, stages))
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]
        return
    compiled, values = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    if _hooked():
        compiled[grid](*arguments, *values, stream=stream)
    else:  # what that does, without a description for hooks
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *values)


def options(warps: int, stages: int) -> dict[str, Any]:
    """What Triton is told beside arguments: that a * b + c may be rounded once is no default from 3.10 on."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _device(arguments: tuple[Any, ...]) -> int:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.get_device()
    raise TypeError("a kernel wants a tensor among its arguments")


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """What Triton compiles a kernel for: pointers' dtypes and alignment, integers' width, of all else the type."""
    found: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            found.append(-(2**31) <= argument < 2**31)
        elif kind in _PLAIN:
            found.append(kind)
        else:
            found.append(argument.dtype)
            found.append(argument.data_ptr() & 15 == 0)
    return found


def _hooked() -> bool:
    """Whether a profiler wants to be told of launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Write launches down instead of running them; kernels then serve CPU tensors, which keep what they hold."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def refusal(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels cannot serve these tensors (their device, a dtype), in a sentence; None when they can."""
    given = [t for t in tensors if t is not None]
    if given[0].device.type != "cuda" and not INTERPRETED and _record is None:
        return (
            f"Triton compiles kernels for GPUs, not for {given[0].device.type}; on a CPU its interpreter runs them,"
            " slowly, where TRITON_INTERPRET=1 was set before"
        )
    if wrong := {t.dtype for t in given} - set(DTYPES):
        return f"its kernels take float32, bfloat16 and float16, not {', '.join(map(str, wrong))}"
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; that of an A100 where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
