"""The ceilings of this device: its properties, what a copy, a matrix product and two instructions reach now.

`python -m benchmarks.roofline` prints them; the benchmarks print them first and keep them in provenance.json.
"""

import functools
import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import harness
from benchmarks import rates as instructions

# Here -> in CUDA's driver API, in torch's properties (of newer versions), and what to divide by.
ATTRIBUTES = {
    "multiprocessors": ("MULTIPROCESSOR_COUNT", "multi_processor_count", 1),
    "cache_mb": ("L2_CACHE_SIZE", "L2_cache_size", 1e6),
    "clock_mhz": ("CLOCK_RATE", "clock_rate", 1e3),
    "memory_clock_mhz": ("MEMORY_CLOCK_RATE", "memory_clock_rate", 1e3),
    "memory_bus_bits": ("GLOBAL_MEMORY_BUS_WIDTH", "memory_bus_width", 1),
}
STATE = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def properties() -> dict:
    """What the device and its software say of themselves; on the CPU, of what it has."""
    found: dict = {"device": harness.device_name(), "python": platform.python_version(), "torch": torch.__version__}
    triton = harness.peer("triton")
    found["triton"] = f"absent: {triton}" if isinstance(triton, str) else triton.__version__
    if not torch.cuda.is_available():
        return found
    major, minor = torch.cuda.get_device_capability()
    found |= {"cuda": torch.version.cuda, "architecture": f"sm_{major}{minor}"}
    found["driver"] = harness.where_and_when()["driver"]
    driver = harness.peer("cuda.bindings.driver")
    attributes = {} if isinstance(driver, str) else from_driver(driver, torch.cuda.current_device())
    found["attributes_by"] = "cuda-python" if attributes else f"torch ({driver})"
    found |= attributes or from_torch(torch.cuda.get_device_properties(torch.cuda.current_device()))
    return found | theoretical(found)


def from_driver(driver: ModuleType, index: int) -> dict:
    """The attributes by cuda-python's `cuda.bindings.driver`; none where the driver does not answer."""
    (error,) = driver.cuInit(0)
    if int(error):
        return {}
    error, device = driver.cuDeviceGet(index)
    found = {}
    for name, (attribute, _, unit) in ATTRIBUTES.items():
        which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
        error, value = driver.cuDeviceGetAttribute(which, device)
        if not int(error):
            found[name] = _in(value, unit)
    return found


def from_torch(device) -> dict:
    """The attributes by `torch.cuda.get_device_properties`, as far as this torch has them."""
    values = {name: (getattr(device, attribute, None), unit) for name, (_, attribute, unit) in ATTRIBUTES.items()}
    return {name: _in(value, unit) for name, (value, unit) in values.items() if value}


def theoretical(found: dict) -> dict:
    """The memory's bandwidth by its clock, two transfers a tick, and its width."""
    if not (found.get("memory_clock_mhz") and found.get("memory_bus_bits")):
        return {}
    return {"theoretical_gb_s": round(2e6 * found["memory_clock_mhz"] * found["memory_bus_bits"] / 8 / 1e9, 1)}


def _in(value: float, unit: float) -> float:
    return value if unit == 1 else round(value / unit, 1)


def state() -> dict[str, str]:
    """Clocks, power limit and temperature as nvidia-smi reads them now."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(STATE, answer.split(", "), strict=False))


def rates(quick: bool = False) -> dict[str, float]:
    """GB/s that a copy moves, read and written, and TFLOP/s of a matrix product, in bfloat16 on a GPU."""
    on_gpu = harness.device().type == "cuda"
    moved = (1 << 30) if on_gpu else (16 << 20) if quick else (256 << 20)
    n = 8192 if on_gpu else 256 if quick else 1024
    a, b = torch.randn(2, n, n, device=harness.device(), dtype=torch.bfloat16 if on_gpu else torch.float32)
    copy, copies = harness.copy_of(moved)
    timings = harness.measure({"copy": copy, "matmul": functools.partial(torch.mm, a, b)}, quick=quick)
    seconds = {name: timing.quantile(0.5) / 1e6 for name, timing in timings.items()}
    return {
        "copy_gb_s": round(moved / (seconds["copy"] * copies) / 1e9, 1),
        "matmul_tflop_s": round(2 * n**3 / seconds["matmul"] / 1e12, 3),
    }


def ceilings(quick: bool = False) -> dict:
    """`properties`, `rates`, those of instructions, and the `state` of the GPU just after them."""
    known = instructions.measured(quick)
    found = properties() | rates(quick) | ({"mma_sync, ex2": f"absent: {known}"} if isinstance(known, str) else known)
    return found | ({"state": state()} if harness.device().type == "cuda" else {})


def show(found: dict) -> None:
    """Print what `ceilings` has found."""
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {text}" for key, text in value.items())
        print(f"  {name:<18} {value}")


def record(folder: Path, family: str, found: dict) -> None:
    """Keep in folder/provenance.json where, when and by which command a family's rows were measured."""
    path = folder / "provenance.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    when = datetime.now(UTC).isoformat(timespec="seconds")
    kept[family] = {"command": command, "date": when, "commit": harness.where_and_when()["commit"]} | found
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    show(ceilings())
