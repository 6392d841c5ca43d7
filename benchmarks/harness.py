"""How everything is timed, what a row of the results holds, and where rows go.

A family's module `bench_<family>.py` exposes `rows(quick: bool) -> Iterator[dict]` and yields what `compare`
returns. Providers take turns, sample by sample, so that their ratios hold where the machine drifts, and a copy
of as many bytes as the floor takes its turn among them: the floor in microseconds comes from the same run.

On a GPU, p20, p50 and p80 are the device's time: each sample waits in the queue until the host has called everything
in it, and inputs rotate among sets that together exceed the cache. What the host needs for a call is `host_us`.
"""

import csv
import functools
import importlib
import importlib.util
import itertools
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from evakernels import dispatch, native

FIELDS = (
    *("family", "shape", "dtype", "provider", "mode", "p20_us", "p50_us", "p80_us", "bytes", "flops"),
    *("share_of_clone", "share_of_matmul", "samples_per_s", "products_us", "exps_us", "peak_mb", "host_us"),
    *("device", "driver", "torch", "commit", "absent"),
)
FLOORS = {  # in microseconds, where rows have them
    "floor_us": "bytes / copy rate",
    "products_us": "padded products / mma.sync rate",
    "exps_us": "exponentials / ex2 rate",
}
RESULTS = Path(__file__).parent / "results"
FAILS = "fails: "  # so begins the reason of a provider that is absent because it raised an error
_kept: list[torch.library.Library] = []  # what a library declares goes when it is collected
COPY_BYTES = 512 << 20  # the copy stands for more bytes than these by its rate
MOST_SETS = 64  # of inputs

Providers = dict[str, Callable[[], object] | str]  # to be timed, or the reason why it is absent


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


def emulated() -> bool:
    """Whether the compiled library that is loaded is an emulated one: its times say nothing about a GPU."""
    return not isinstance(native.library("cpu"), str)


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
            if hasattr(torch.ops.torchvision, op):
                continue
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


def compiled(function: Callable) -> Callable | str:
    """A peer by torch.compile, for one shape; what was compiled before is forgotten."""
    if device().type == "cpu":
        return "it is measured on GPUs alone"
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # backward passes are repeated on one graph
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def rotating(make: Callable[[], tuple]) -> Iterator[tuple]:
    """Sets of inputs in turns: on a GPU so many that none is found in the cache when it comes round again."""
    sets = [make()]
    if device().type == "cuda":
        size = sum({t.data_ptr(): t.nbytes for t in sets[0] if isinstance(t, Tensor)}.values())
        cache = torch.cuda.get_device_properties(device()).L2_cache_size
        sets += [make() for _ in range(min(math.ceil(2 * cache / max(size, 1)), MOST_SETS) - 1)]
    return itertools.cycle(sets)


def forward(function: Callable, make: Callable[[], tuple]) -> Callable[[], object]:
    """Calls a function with rotating inputs; they are made at the first call."""
    inputs = functools.cache(lambda: rotating(make))
    return lambda: function(*next(inputs()))


def backward(function: Callable, make: Callable[[], tuple]) -> Callable[[], object]:
    """Repeats a function's backward pass for its inputs that require gradients; it runs forward at the first call."""

    def graph() -> tuple:
        inputs = make()
        outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        wanted = tuple(t for t in inputs if isinstance(t, Tensor) and t.requires_grad)
        return *(torch.randn_like(t) for t in outputs), outputs, wanted

    graphs = functools.cache(lambda: rotating(graph))

    def run() -> object:
        *gradients, outputs, wanted = next(graphs())
        return torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    return run


def ours(family: str, make: Callable[[], Callable[[], object]]) -> Providers:
    """What `make` returns as dispatch chooses, and by each implementation of the family that may serve this device."""

    def by(name: str, run: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            with dispatch.using(name):
                return run()

        return call

    on_gpu = device().type == "cuda"
    result: Providers = {"evakernels": make()}
    for name in dispatch.IMPLEMENTATIONS:
        if importlib.util.find_spec(f"evakernels.ops.{family}.{name}") and not (name == "cpu" and on_gpu):
            note = " emulated" if name == "cuda" and emulated() and not on_gpu else ""
            result[f"evakernels, {name}{note}"] = by(name, make())
    return result


def slug(name: str) -> str:
    """A device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def where_and_when() -> dict[str, str]:
    def say(*command: str) -> str:
        try:
            answer = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return answer.stdout.strip()

    driver = ""
    if torch.cuda.is_available():
        driver = say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    # A copy of the sources without git's folder is told where it comes from.
    commit = os.environ.get("EVAKERNELS_COMMIT") or say("git", "describe", "--always", "--dirty")
    return {"device": device_name(), "driver": driver, "torch": torch.__version__, "commit": commit}


def measure(
    providers: dict[str, Callable[[], object]],
    *,
    quick: bool = False,
    seconds: float | None = None,
    by_host: bool = False,
    rounds: int | None = None,
) -> dict[str, Timing]:
    """Time callables in turns: warm-up, then rounds in which each is sampled once.

    Args:
        providers: name -> callable without arguments, that runs the work once on `device()`.
        quick: a fifth of the time.
        seconds: about how long each provider is sampled; by default 2 on the CPU, 0.2 on a GPU. At least 5 samples
            are taken.
        by_host: samples are the host's time also on a GPU.
        rounds: exactly so many samples of one call each, whatever a call takes: so that the processes of a run, which
            wait for one another in it, call alike.
    """
    on_gpu = torch.cuda.is_available()
    seconds = seconds or (0.2 if on_gpu else 2.0) / (5 if quick else 1)
    repeats, timings = {}, {}
    for name, run in providers.items():
        run()
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        once = time.perf_counter() - start
        # Short calls are repeated within a sample: clock and events tick in microseconds. 1024 launches fit the queue.
        repeats[name] = 1 if rounds else min(max(1, math.ceil(1e-3 / max(once, 1e-7))), 100 if on_gpu else 10**6)
        for _ in range(min(repeats[name], 20)):
            run()
        timings[name] = Timing([], *_memory_and_host_time(run))

    def sample(name: str) -> float:
        if on_gpu and not by_host:
            return _device_time(providers[name], repeats[name], timings[name].host_us or 0.0)
        return _host_time(providers[name], repeats[name])

    slowest = max(sample(name) * repeats[name] for name in providers) / 1e6
    for _ in range(rounds or max(5, min(200, round(seconds / slowest)))):
        for name in providers:
            timings[name].samples.append(sample(name))
    for timing in timings.values():
        timing.samples.sort()
    return timings


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device_time(run: Callable[[], object], repeats: int, host_us: float) -> float:
    """Microseconds per call between events; the device sleeps until the host has called them all (10 ms at most)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(round(min(1.5 * host_us * repeats + 50, 1e4) * 2000))  # cycles, at about 2 GHz
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def _host_time(run: Callable[[], object], repeats: int) -> float:
    """Microseconds per call that the host is busy; on the CPU, which computes at once, all of them."""
    _wait()
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
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return peak, statistics.median(_host_time(run, 1) for _ in range(9))


def copy_of(moved: int) -> tuple[Callable[[], object], float]:
    """A copy that moves `moved` bytes (half of them read, half written), and how many copies those bytes are.

    `torch.clone` where the allocator keeps memory; on the CPU a copy into memory that is there, because clone
    would time the page faults of fresh memory.
    """
    size = min(moved, COPY_BYTES)
    if device().type == "cuda":
        return forward(torch.clone, lambda: (torch.randn(max(size // 8, 1), device=device()),)), moved / size
    x = torch.ones(max(size // 8, 1))
    y = torch.ones_like(x)
    return lambda: y.copy_(x), moved / size


def _why(error: Exception) -> str:
    """Why a provider does not run, by what its first call raised: it declined, or it failed."""
    text = str(error) or type(error).__name__
    if isinstance(error, NotImplementedError) and (asked := re.search(r'using\("(\w+)"\) asked', text)):
        return re.findall(rf"^  {asked[1]}: (.+)$", text, re.MULTILINE)[0]
    return f"{FAILS}{type(error).__name__}: {text.splitlines()[0]}"


def compare(
    family: str,
    shape: str,
    dtype: torch.dtype | str,
    mode: str,
    providers: Providers,
    *,
    bytes: int | None = None,
    flops: int | None = None,
    samples: int | None = None,
    quick: bool = False,
    seconds: float | None = None,
    by_host: bool = False,
    rounds: int | None = None,
) -> Iterator[dict]:
    """Rows of one case, one per provider; a provider given as a string is absent, for the reason the string says.

    So is one whose first call raises an error: an implementation that declines, or a bug.

    Args:
        family, shape, dtype, mode: what the case is; mode is "forward", "backward", "step", ...
        providers: name -> callable without arguments, or the reason why this peer is absent.
        bytes: those that must move (the floor); the row then holds its share of what a copy reaches.
        flops: those that must be computed.
        samples: those that a call trains on: rows then hold how many a second.
        quick, seconds, by_host, rounds: as `measure` takes them.
    """
    providers = dict(providers)
    for name, run in providers.items():
        if callable(run):
            try:
                run()
                _wait()
            except Exception as error:
                providers[name] = _why(error)
    present = {name: run for name, run in providers.items() if callable(run)}
    copies = 1.0
    if bytes:
        present["copy"], copies = copy_of(bytes)
    timings = measure(present, quick=quick, seconds=seconds, by_host=by_host, rounds=rounds) if present else {}
    floor = timings.pop("copy").quantile(0.5) * copies if bytes else None
    case = {"family": family, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
    for name, run in providers.items():
        row = dict.fromkeys(FIELDS, "") | case | {"provider": name} | where_and_when()
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
        if samples:
            row["samples_per_s"] = round(samples / timing.quantile(0.5) * 1e6, 2)
        if floor:
            row["share_of_clone"] = round(floor / timing.quantile(0.5), 4)
            row["floor_us"] = floor
        yield row


def both_ways(
    family: str,
    shape: str,
    dtype: torch.dtype,
    function: Callable,
    peers: dict[str, Callable | str],
    make: Callable[[], tuple],
    bytes: tuple[int, int],
    quick: bool,
    flops: tuple[int, int] | tuple[None, None] = (None, None),
) -> Iterator[dict]:
    """Rows of a function forward, with its graph for autograd, and backward; all functions take what `make` returns.

    Args:
        function, peers: ours and those of others, or the reasons why they are absent.
        make: returns a set of inputs; each provider has its own, because some write into them.
        bytes: the floors, forward and backward.
        flops: those that must be computed, forward and backward.
    """
    for i, (mode, calling) in enumerate((("forward", forward), ("backward", backward))):
        providers = ours(family, functools.partial(calling, function, make))
        providers |= {name: peer if isinstance(peer, str) else calling(peer, make) for name, peer in peers.items()}
        yield from compare(family, shape, dtype, mode, providers, bytes=bytes[i], flops=flops[i], quick=quick)


def write(rows: list[dict], folder: Path | None = None) -> Path:
    """Write one family's rows to <family>.csv in a folder, by default results/<device>, and return the path."""
    path = (folder or RESULTS / slug(rows[0]["device"])) / f"{rows[0]['family']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def show(rows: list[dict]) -> None:
    """Print one case: each provider's time, how many times that of the first provider it is, and the floor."""
    first = rows[0]
    print(f"\n{first['family']}  {first['shape']}  {first['dtype']}  {first['mode']}")
    ours = first["p50_us"] or math.nan
    floors = {f"floor: {what}": first[field] for field, what in FLOORS.items() if first.get(field)}
    width = max(28, *map(len, (*floors, *(row["provider"] for row in rows))))
    for row in rows:
        if row["absent"]:
            print(f"  {row['provider']:<{width}} absent: {row['absent']}")
            continue
        share = f"{row['share_of_clone']:7.1%} of a copy" if row["share_of_clone"] != "" else ""
        if "memory" in row["mode"]:
            print(f"  {row['provider']:<{width}} {row['peak_mb']:>12.1f} MB")
            continue
        if row["samples_per_s"] != "":
            share += f"{row['samples_per_s']:9.1f} samples/s"
        if row["share_of_matmul"] != "":
            share += f", {row['share_of_matmul']:.1%} of a matrix product"
        print(
            f"  {row['provider']:<{width}} {row['p50_us']:>12.1f} us  ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
            f"  {row['p50_us'] / ours:6.2f} x  {share}"
        )
    for what, us in floors.items():
        print(f"  {what:<{width}} {us:>12.1f} us")
