"""A stand-in for a GPU: Triton compiles kernels for it, and what would be launched is written down instead.

With it `jit.launch` and Triton's own launch take the path that they take on a GPU, up to the driver's launch. It needs
a process in which Triton compiles (no TRITON_INTERPRET).
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from evakernels import jit

_devices = itertools.count()


class Driver:
    """What Triton asks of its active driver, and of the driver's `utils`."""

    def __init__(self, capability: int, remember: bool):
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self
        self.device = next(_devices)  # new to each kernel, which then knows nothing that was compiled before
        self.loaded: list[str] = []  # the name of each kernel that was loaded: a compiled one is loaded once
        self.launched: list[tuple] = []  # the arguments of each launch
        self.remember = self.launched.append if remember else lambda _: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 163 << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        self.loaded.append(name)
        return object(), len(self.loaded), 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *arguments: self.remember(arguments)


@contextmanager
def active(capability: int = 80, *, remember: bool = True) -> Iterator[Driver]:
    """Nothing is launched; without a GPU, tensors on the CPU pass as tensors on one.

    Args:
        capability: for which Triton compiles, 10 times major plus minor.
        remember: what was launched, as long as this lasts.
    """
    assert not jit.INTERPRETED, "Triton interprets here: start Python without TRITON_INTERPRET"
    driver = Driver(capability, remember)
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        patched.enter_context(mock.patch.dict(jit._compiled, clear=True))
        if not torch.cuda.is_available():
            on_cpu = torch.empty(0).get_device()
            patched.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: on_cpu))
            patched.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        yield driver


# fmt: off
@jit.kernel
def of_fifteen(a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, none_ptr, rows, stride_a, stride_b, eps,
               A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    """As many parameters as kernels have."""
    tl.store(a_ptr, rows * eps)
