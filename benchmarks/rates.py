"""The rates of the two instructions that bound attention beside memory: mma.sync and ex2.approx, of rates.cu."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness

SOURCE = Path(__file__).with_name("rates.cu")
PRIMITIVES = SOURCE.parents[1] / "csrc" / "common" / "primitives.cuh"
BUILD = SOURCE.parents[1] / "build" / "rates"
ITERATIONS = 8192  # about a millisecond
UNITS = {"products": ("mma_sync_tflop_s", 1e12), "exponentials": ("ex2_g_s", 1e9)}


def nvcc() -> str | None:
    """The path of nvcc, or None where there is no CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [f"{home}/bin", os.environ.get("PATH", "")]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))


@functools.cache
def library() -> ctypes.CDLL | str:
    """rates.cu compiled for this GPU, once for each text of it; or the sentence that says why not."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    compiler = nvcc()
    if not compiler:
        return "nvcc was not found"
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    text = hashlib.sha256(SOURCE.read_bytes() + PRIMITIVES.read_bytes()).hexdigest()[:16]
    path = BUILD / f"{architecture}-{text}.so"
    try:
        if not path.exists():
            BUILD.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}")
            command = [compiler, "-std=c++17", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
            subprocess.run([*command, SOURCE, "-o", new], capture_output=True, text=True, check=True)
            new.replace(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"nvcc does not compile rates.cu: {(error.stderr or error.stdout).strip().splitlines()[-1]}"
    except OSError as error:
        return f"rates.cu does not load: {error}"


def launcher(found: ctypes.CDLL, name: str) -> tuple[Callable[[], None], float]:
    """A function that starts a kernel on every multiprocessor, and the work of one such launch."""
    blocks = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    out, work, function = torch.empty(blocks * found.threads(), device="cuda"), ctypes.c_double(), getattr(found, name)

    def run() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        address = ctypes.c_void_p(out.data_ptr())
        if code := function(blocks, ITERATIONS, address, stream, ctypes.byref(work)):
            raise RuntimeError(f"{name} of rates.cu does not run: CUDA error {code}")

    run()
    return run, work.value


@functools.cache
def measured(quick: bool = False) -> dict[str, float] | str:
    """TFLOP/s of mma.sync (m16n8k16, bf16) and 10^9 ex2.approx per second; or the reason why they are unknown."""
    found = library()
    if isinstance(found, str):
        return found
    try:
        runs = {name: launcher(found, name) for name in UNITS}
    except RuntimeError as error:
        return str(error)
    timings = harness.measure({name: run for name, (run, _) in runs.items()}, quick=quick)
    return {
        key: round(runs[name][1] / (timings[name].quantile(0.5) / 1e6) / unit, 1) for name, (key, unit) in UNITS.items()
    }


def floors(flops: float, exponentials: float, quick: bool = False) -> dict[str, float | str]:
    """The columns `products_us` and `exps_us` of a row: the time of so much work at the measured rates, or empty."""
    rates = measured(quick)
    if isinstance(rates, str):
        return {"products_us": "", "exps_us": ""}
    return {
        "products_us": round(flops / rates["mma_sync_tflop_s"] / 1e6, 2),
        "exps_us": round(exponentials / rates["ex2_g_s"] / 1e3, 2),
    }
