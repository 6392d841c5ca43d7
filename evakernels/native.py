"""Finds and loads the compiled library, and calls its functions with tensors.

A library declares the device it computes on: "cuda", or "cpu" when it was compiled to be emulated there, for tests.
"""

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

MODULE = "evakernels._native"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `enum class Dtype` of csrc/launch.hpp
ID_TYPES = {torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4}  # csrc/common/kept_ids.hpp

loaded: dict[str, ModuleType] = {}  # by device type; what `load` was given goes before the installation's own


@functools.cache
def _installed() -> ModuleType | str:
    """The compiled library of this installation, or the sentence that says why there is none."""
    if importlib.util.find_spec(MODULE) is None:
        return (
            "the compiled library was not built (no nvcc when evakernels was installed, or EVAKERNELS_SKIP_CUDA=1); "
            "install the CUDA toolkit and reinstall with `pip install --force-reinstall --no-deps .`"
        )
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        return f"the compiled library was built, but does not load: {error}"


def library(device: str = "cuda") -> ModuleType | str:
    """The compiled library that computes on a device type, or the sentence that says why there is none."""
    if found := loaded.get(device):
        return found
    return _installed() if device == "cuda" else f"the compiled library does not compute on {device}"


def compiled(on: Tensor | torch.device) -> ModuleType:
    """The compiled library that computes on a device; an implementation that has not refused has one."""
    found = library(on.type if isinstance(on, torch.device) else on.device.type)
    assert not isinstance(found, str), found
    return found


def status() -> str:
    """One sentence about the compiled library, for people."""
    found = library()
    if isinstance(found, str):
        return found
    if torch.cuda.is_available() and (why := _driver_refusal(found)):
        return why
    info = found.build_info()
    return f"built with CUDA {info['cuda']} for {info['architectures']}; families: {', '.join(info['families'])}"


def load(path: str | Path) -> ModuleType:
    """Load a compiled library from a file; from now on it serves the device that it declares.

    An emulated library, which declares the CPU, is reached by `evakernels.using("cuda")` alone.

    Args:
        path: a shared library with the bindings of `csrc/bindings.cpp`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is no library of evakernels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"native.load: {path} is no file; give the path of a compiled evakernels library")
    spec = importlib.util.spec_from_file_location("_native", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"native.load: {path} is no Python extension module (its name must end in .so or .pyd)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "build_info"):
        raise ImportError(f"native.load: {path} has no build_info(), so it is no library of evakernels")
    loaded[module.build_info()["device"]] = module
    return module


def refusal(family: str, device: str) -> str | None:
    """Why the compiled library cannot serve a family on a device type, in a sentence; None when it can."""
    found = library(device)
    if isinstance(found, str):
        return found
    built = _families(found)
    if family not in built:
        return f"the compiled library has no {family}; it was built with {', '.join(built)}"
    return _driver_refusal(found) if device == "cuda" else None


@functools.cache
def _driver_refusal(found: ModuleType) -> str | None:
    """Why the machine's driver cannot run the compiled library, whose CUDA is linked into it; None when it can."""
    driver, cuda = _driver_version(), found.build_info()["cuda"]
    if driver is None or driver // 1000 >= int(cuda.split(".")[0]):
        return None
    has = f"{driver // 1000}.{driver % 1000 // 10}"
    return f"the compiled library has CUDA {cuda}, the driver that of {has}; update it, or reinstall with nvcc {has}"


@functools.cache
def _families(found: ModuleType) -> tuple[str, ...]:
    return tuple(found.build_info()["families"])


def _driver_version() -> int | None:
    """The CUDA version of the machine's driver, 13020 for 13.2; None where it does not say."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


def row_refusal(width: int, sums: int, on: Tensor) -> str | None:
    """Why a backward row kernel cannot take rows of this length, in a sentence; None when it can.

    Where registers do not hold a row, its `sums` sums over rows lie in shared memory, as float32.
    """
    longest = (shared_memory(on.device) - 1024) // (4 * sums)
    if width <= longest:
        return None
    return f"its backward kernels take rows of up to {longest} elements on this device, not {width}"


def call(name: str, on: Tensor | torch.device, *args, touches: Iterable[Tensor] = ()) -> None:
    """Call a function of the compiled library on a device, in its current stream.

    Args:
        name: of the function in `csrc/<family>/bindings.cpp`.
        on: a tensor on the device, or the device.
        args: tensors are passed as addresses and None as 0; the stream is added at the end.
        touches: tensors whose addresses the function finds in memory.

    Raises:
        RuntimeError: the launch failed; the message says why.
    """
    device = on if isinstance(on, torch.device) else on.device
    lib = compiled(device)
    plain = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args]
    function = getattr(lib, name)
    if device.type == "cpu":
        return _emulated(lib, function, plain, (*args, *touches))
    index = torch.cuda.current_device() if device.index is None else device.index
    if index == torch.cuda.current_device():
        return function(*plain, torch._C._cuda_getCurrentRawStream(index))
    with torch.cuda.device(index):
        return function(*plain, torch._C._cuda_getCurrentRawStream(index))


def _emulated(lib: ModuleType, function, plain: list, args: tuple) -> None:
    """A call in which each tensor's memory, and no other, may be touched."""
    for tensor in args:
        if isinstance(tensor, Tensor) and tensor.numel():
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            lib.track(tensor.data_ptr(), reach * tensor.element_size())
    try:
        function(*plain, 0)
    finally:
        lib.untrack_all()


def kept_ids(kept: Tensor | None, patches: int) -> tuple[Tensor | None, int, int]:
    """Patch ids (batch, count), or None for all, as kernels take them: the ids, their type's code, their count."""
    if kept is None:
        return None, len(ID_TYPES), patches
    kept = (kept if kept.dtype in ID_TYPES else kept.long()).contiguous()
    return kept, ID_TYPES[kept.dtype], kept.shape[1]


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have: 163 KiB on an A100, and where that is emulated."""
    if device.type != "cuda":
        return 163 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 2 where it is emulated."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
