"""What a call costs the host: layer_norm on a tiny tensor, step by step from the public function to the bare kernel.

`python -m benchmarks --family host` times the steps in turns, for their differences and the CSV file; `python -m pytest
-n 0 benchmarks/bench_host.py` one after another by pytest-benchmark, with its calibration, statistics and comparisons.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import evakernels as ek
from benchmarks import harness
from evakernels import dispatch, native
from evakernels.ops.norm import reference

ROWS, WIDTH, EPS = 4, 64, 1e-6
OVER = {  # what a step adds: one provider's time less another's
    "public function, over the op": ("public function", "op"),
    "with autograd, over the op": ("public function with autograd", "op"),
    "with autograd, over the compiled function": ("public function with autograd", "compiled function"),
}


def rows(quick: bool) -> Iterator[dict]:
    """Microseconds of the host per call without waiting for the device, and differences of their medians."""
    implementation, absent = serving()
    with ek.using(implementation):
        found = list(
            harness.compare(
                "host",
                f"layer_norm, {ROWS} rows of {WIDTH}, {implementation}",
                torch.float32,
                "forward",
                steps(implementation, absent),
                quick=quick,
                by_host=True,
            )
        )
    yield from found
    median = {row["provider"]: row["p50_us"] for row in found}
    for name, (step, less) in OVER.items():
        row = found[0] | {"provider": name, "host_us": "", "peak_mb": ""}
        known = median[step] != "" and median[less] != ""
        more = round(median[step] - median[less], 2) if known else ""
        why = "" if known else absent or "a step of it is absent"
        yield row | {"p20_us": more, "p50_us": more, "p80_us": more, "absent": why}


def pytest_generate_tests(metafunc) -> None:
    metafunc.parametrize("step", steps(*serving()))


def test_host_time(benchmark, step: str) -> None:
    implementation, absent = serving()
    run = steps(implementation, absent)[step]
    if isinstance(run, str):
        import pytest

        pytest.skip(run)
    with ek.using(implementation):
        benchmark(run)


def serving() -> tuple[str, str | None]:
    """Which implementation is timed, and why it is not the compiled library where it is not."""
    x = torch.empty(ROWS, WIDTH, device=harness.device())
    absent = dispatch.refusal("norm", "cuda", "norm", (x, x[0], None, EPS, False, x.dtype))
    return "reference" if absent else "cuda", absent


def steps(implementation: str, absent: str | None) -> harness.Providers:
    """The way of a call, each step with all below it; `absent` says why the compiled library does not serve."""
    x = torch.randn(ROWS, WIDTH, device=harness.device())
    weight, bias = torch.randn(2, WIDTH, device=x.device)
    wanted = x.clone().requires_grad_()
    args = (x, weight, bias, EPS, False, x.dtype)
    op = torch.ops.evakernels.norm
    return {
        "public function with autograd": lambda: ek.layer_norm(wanted, weight, bias, EPS),
        "public function": lambda: ek.layer_norm(x, weight, bias, EPS),
        "op": lambda: op(*args),
        "dispatch.choose": lambda: dispatch.choose("norm", "norm", args),
        **({f"implementation, {implementation}": lambda: reference.norm(*args)} if absent else {}),
        **compiled_steps(args, absent),
        "torch with autograd": lambda: F.layer_norm(wanted, (WIDTH,), weight, bias, EPS),
        "torch": lambda: F.layer_norm(x, (WIDTH,), weight, bias, EPS),
    }


def compiled_steps(args: tuple, absent: str | None) -> harness.Providers:
    if absent:
        return dict.fromkeys(("implementation, cuda", "native.call", "compiled function"), absent)
    from evakernels.ops.norm import cuda

    name, on, *given = recorded(cuda.norm, args)
    library = native.compiled(on)
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in given]
    stream = torch.cuda.current_stream().cuda_stream if on.is_cuda else 0
    function = getattr(library, name)
    return {
        "implementation, cuda": lambda: cuda.norm(*args),
        "native.call": lambda: native.call(name, on, *given),
        "compiled function": lambda: function(*plain, stream),
    }


def recorded(function: Callable, args: tuple) -> tuple:
    """The arguments with which a function calls `native.call`."""
    calls: list[tuple] = []
    call = native.call
    native.call = lambda *given: calls.append(given)
    try:
        function(*args)
    finally:
        native.call = call
    return calls[0]
