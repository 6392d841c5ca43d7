"""How everything is timed, what a row of the results holds, and where rows go.

A family's module `bench_<family>.py` exposes `rows(quick: bool) -> Iterator[dict]` and yields what `compare`
returns. Providers take turns, sample by sample, so that their ratios hold where the machine drifts, and a copy
of as many bytes as the floor takes its turn among them: the floor in microseconds comes from the same run.
"""

import csv
import functools
import importlib
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

FIELDS = (
    *("family", "shape", "dtype", "provider", "mode", "p20_us", "p50_us", "p80_us", "bytes", "flops"),
    *("share_of_clone", "peak_mb", "host_us", "device", "driver", "torch", "commit"),
)
RESULTS = Path(__file__).parent / "results"
_kept: list[torch.library.Library] = []  # what a library declares goes when it is collected
COPY_BYTES = 512 << 20  # the copy stands for more bytes than these by its rate


@dataclass
class Timing:
    """What was measured of one provider: sorted samples in microseconds, peak memory and host time."""

    samples: list[float]
    peak_mb: float | None = None
    host_us: float | None = None

    def quantile(self, q: float) -> float:
        return self.samples[round(q * (len(self.samples) - 1))]


def device() -> torch.device:
    """Where the benchmarks run: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def device_name() -> str:
    """The GPU's name, or the CPU's model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1].strip() if model else platform.machine()}, {torch.get_num_threads()} threads"


def peer(module: str) -> ModuleType | str:
    """Another library's module, or the reason why it is absent."""
    _let_torchvision_import()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"the package {error.name} is not installed"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} does not import: {str(error).splitlines()[0]}"


@functools.cache
def _let_torchvision_import() -> None:
    # Its wheel registers fakes for two operators of a CUDA library that cannot load beside a CPU torch, and fails to
    # import where they are undeclared; timm and open_clip import it.
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


def slug(name: str) -> str:
    """A device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _where_and_when() -> dict[str, str]:
    def say(*command: str) -> str:
        try:
            answer = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return answer.stdout.strip()

    driver = ""
    if torch.cuda.is_available():
        driver = say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    commit = say("git", "describe", "--always", "--dirty")
    return {"device": device_name(), "driver": driver, "torch": torch.__version__, "commit": commit}


def measure(
    providers: dict[str, Callable[[], object]], *, quick: bool = False, seconds: float | None = None
) -> dict[str, Timing]:
    """Time callables in turns: warm-up, then rounds in which each is sampled once.

    Args:
        providers: name -> callable without arguments, that runs the work once on `device()`.
        quick: a fifth of the time.
        seconds: about how long each provider is sampled; 2 by default. At least 5 samples are taken.
    """
    seconds = seconds or (0.4 if quick else 2.0)
    repeats, timings = {}, {}
    for name, run in providers.items():
        run()
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        once = time.perf_counter() - start
        # Short calls are repeated within a sample: clock and events tick in microseconds.
        repeats[name] = max(1, math.ceil(1e-3 / max(once, 1e-7)))
        for _ in range(min(repeats[name], 20)):
            run()
        timings[name] = Timing([], *_memory_and_host_time(run))
    slowest = max(_sample(run, repeats[name]) * repeats[name] for name, run in providers.items()) / 1e6
    for _ in range(max(5, min(200, round(seconds / slowest)))):
        for name, run in providers.items():
            timings[name].samples.append(_sample(run, repeats[name]))
    for timing in timings.values():
        timing.samples.sort()
    return timings


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _sample(run: Callable[[], object], repeats: int) -> float:
    """Microseconds per call."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) * 1e6 / repeats


def _memory_and_host_time(run: Callable[[], object]) -> tuple[float | None, float | None]:
    """What a call allocates at its peak beyond what was there (MB), and for how long the host is busy: GPU only."""
    if not torch.cuda.is_available():
        return None, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    run()
    host = (time.perf_counter() - began) * 1e6
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6, host


def _copy_of(moved: int) -> tuple[Callable[[], object], float]:
    """A copy that moves `moved` bytes (half of them read, half written), and how many copies those bytes are.

    `torch.clone` where the allocator keeps memory; on the CPU a copy into memory that is there, because clone
    would time the page faults of fresh memory.
    """
    size = min(moved, COPY_BYTES)
    x = torch.ones(max(size // 8, 1), device=device())
    if x.is_cuda:
        return x.clone, moved / size
    y = torch.ones_like(x)
    return lambda: y.copy_(x), moved / size


def compare(
    family: str,
    shape: str,
    dtype: torch.dtype | str,
    mode: str,
    providers: dict[str, Callable[[], object] | str],
    *,
    bytes: int | None = None,
    flops: int | None = None,
    quick: bool = False,
    seconds: float | None = None,
) -> Iterator[dict]:
    """Rows of one case, one per provider; a provider given as a string is absent, for the reason the string says.

    Args:
        family, shape, dtype, mode: what the case is; mode is "forward", "backward", "step", ...
        providers: name -> callable without arguments, or the reason why this peer is absent.
        bytes: those that must move (the floor); the row then holds its share of what a copy reaches.
        flops: those that must be computed.
        quick, seconds: as `measure` takes them.
    """
    present = {name: run for name, run in providers.items() if callable(run)}
    copies = 1.0
    if bytes:
        present["copy"], copies = _copy_of(bytes)
    timings = measure(present, quick=quick, seconds=seconds)
    floor = timings.pop("copy").quantile(0.5) * copies if bytes else None
    case = {"family": family, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
    for name, run in providers.items():
        row = dict.fromkeys(FIELDS, "") | case | {"provider": name} | _where_and_when()
        row |= {"bytes": bytes or "", "flops": flops or ""}
        if not callable(run):
            yield row | {"absent": run}
            continue
        timing = timings[name]
        for q in (20, 50, 80):
            row[f"p{q}_us"] = round(timing.quantile(q / 100), 2)
        for field in ("peak_mb", "host_us"):
            value = getattr(timing, field)
            row[field] = "" if value is None else round(value, 2)
        if floor:
            row["share_of_clone"] = round(floor / timing.quantile(0.5), 4)
            row["floor_us"] = floor
        yield row


def write(rows: list[dict]) -> Path:
    """Write one family's rows to results/<device>/<family>.csv and return the path."""
    path = RESULTS / slug(rows[0]["device"]) / f"{rows[0]['family']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def show(rows: list[dict]) -> None:
    """Print one case: each provider's time, how many times that of the first provider it is, and the floor."""
    first = rows[0]
    print(f"\n{first['family']}  {first['shape']}  {first['dtype']}  {first['mode']}")
    ours = first["p50_us"] or math.nan
    for row in rows:
        if "absent" in row:
            print(f"  {row['provider']:<28} absent: {row['absent']}")
            continue
        share = f"{row['share_of_clone']:7.1%} of a copy" if row["share_of_clone"] != "" else ""
        print(
            f"  {row['provider']:<28} {row['p50_us']:>12.1f} us  ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
            f"  {row['p50_us'] / ours:6.2f} x  {share}"
        )
    if first.get("floor_us"):
        print(f"  {'floor: bytes / copy rate':<28} {first['floor_us']:>12.1f} us")
