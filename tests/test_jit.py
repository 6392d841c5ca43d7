"""How Triton kernels are launched: what compiles one anew, what does not, and what a launch hands to the driver."""

import ast
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from benchmarks import bench_launch, harness, stand_in  # noqa: E402
from evakernels import jit, ops  # noqa: E402


@jit.kernel
def scaled_sum(x_ptr, y_ptr, out_ptr, rows, factor, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * WIDTH + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < WIDTH) & (at < rows * WIDTH)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x * factor, mask=inside)


def launch(rows=4, dtype=torch.float32, offset=0, y=True, many=None, factor=0.5, warps=4, width=60, block=64):
    x, other, out = ones(3, rows * width + offset, dtype=dtype)[:, offset:]
    given = x, other if y else None, out, rows if many is None else many, factor
    jit.launch(scaled_sum, (rows,), *given, warps=warps, BLOCK=block, WIDTH=width)
    return x, other, out


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=harness.device())


def equal(one, other):
    return one.data_ptr() == other.data_ptr() if isinstance(one, torch.Tensor) else one == other


@pytest.fixture
def gpu_stand_in(compiling):
    with stand_in.active() as driver:
        yield driver


def test_what_wants_triton_to_compile_passes_in_a_process_of_its_own(where_triton_compiles):
    assert where_triton_compiles.returncode == 0, where_triton_compiles.stdout
    assert "Triton interprets here" not in where_triton_compiles.stdout


@pytest.mark.parametrize("y", [True, False], ids=["all given", "one is None"])
def test_first_and_later_launches_hand_the_same_to_the_driver(gpu_stand_in, y):
    tensors = ones(3, 4, 60)
    given = tensors[0], tensors[1] if y else None, tensors[2], 4, 0.5
    for _ in range(3):
        jit.launch(scaled_sum, (4,), *given, WIDTH=60, BLOCK=64)
    first, *later = gpu_stand_in.launched
    told_to_hooks = slice(6, 9)  # a description of the launch, and two hooks
    assert first[:3] == (4, 1, 1)
    assert all(map(equal, first[9:], (*given, 60, 64)))
    for launched in later:
        assert len(first) == len(launched) and first[:6] == launched[:6]
        assert all(map(equal, first[9:], launched[9:]))
        assert launched[told_to_hooks] == (None, None, None)
    assert gpu_stand_in.loaded == ["scaled_sum"]


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 4096])
def test_another_batch_compiles_nothing(gpu_stand_in, rows):
    launch()
    launch(rows)
    jit._compiled.clear()  # neither by its own look-up nor by Triton's
    launch(rows, factor=3.0)
    assert gpu_stand_in.loaded == ["scaled_sum"]


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.bfloat16},
        {"offset": 1},
        {"many": 2**31},
        {"many": -(2**31) - 1},
        {"factor": 1},
        {"y": False},
        {"warps": 8},
        {"block": 128},
    ],
    ids=lambda other: "{} {}".format(*next(iter(other.items()))),
)
def test_what_the_code_depends_on_compiles_it_anew_and_is_told_apart_later(gpu_stand_in, other):
    for _ in range(3):
        launch()
        launch(**other)
    assert gpu_stand_in.loaded == ["scaled_sum"] * 2
    functions = [launched[4] for launched in gpu_stand_in.launched]
    assert functions == [1, 2] * 3


def test_order_of_constants_does_not_matter(gpu_stand_in):
    x = ones(3, 64)
    for _ in range(2):
        jit.launch(scaled_sum, (1,), *x, 1, 0.5, WIDTH=32, BLOCK=64)
        jit.launch(scaled_sum, (1,), *x, 1, 0.5, BLOCK=64, WIDTH=32)
        jit.launch(scaled_sum, (1,), *x, 1, 0.5, BLOCK=32, WIDTH=64)
    assert [launched[-2:] for launched in gpu_stand_in.launched] == [(32, 64), (32, 64), (64, 32)] * 2
    assert [launched[4] for launched in gpu_stand_in.launched] == [1, 1, 2] * 2


def test_what_triton_tells_apart_is_told_apart():
    tensors = torch.ones(8), torch.ones(8)[1:], torch.ones(8, dtype=torch.float16)
    found = [jit._kinds((argument, *tensors)) for argument in (*tensors, 1, 2**31, 1.0, True, None)]
    assert all(found.count(kinds) == 1 for kinds in found)


def test_a_product_and_a_sum_may_be_rounded_once_whatever_triton_would_do(gpu_stand_in, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    launch()
    ((compiled, _),) = jit._compiled.values()
    assert compiled.metadata.enable_fp_fusion


def test_a_profiler_is_told_of_every_launch(gpu_stand_in):
    launch()
    told = []
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(told.append)
    try:
        launch()
    finally:
        hook.remove(told.append)
    launch()
    with_hook, without = gpu_stand_in.launched[1:]
    assert with_hook[6].get()["name"] == "scaled_sum" and with_hook[7] is hook
    assert without[6:9] == (None, None, None)


def test_another_device_than_the_current_one_is_made_current(gpu_stand_in):
    current, home = [7], ones(1).get_device()

    @contextmanager
    def made_current(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    with (
        mock.patch.object(torch.cuda, "current_device", lambda: current[0]),
        mock.patch.object(torch.cuda, "device", made_current),
        mock.patch.object(gpu_stand_in, "launcher_cls", lambda *_: lambda *_: launched_on.append(current[0])),
    ):
        launched_on = []
        launch()
        launch()
    assert launched_on == [home, home] and current == [7]


def test_triton_does_not_warn(gpu_stand_in):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(width=59)


def test_launches_are_benchmarked_where_triton_compiles(monkeypatch):
    def measure(providers, **_):
        for run in providers.values():
            run()
        return dict.fromkeys(providers, harness.Timing([1.0]))

    monkeypatch.setattr(harness, "measure", measure)
    absent = {row["provider"]: row["absent"] for row in bench_launch.rows(quick=True)}
    reason = "Triton interprets: TRITON_INTERPRET is set" if jit.INTERPRETED else ""
    assert absent == dict.fromkeys(("jit.launch", "kernel[grid]", "compiled[grid]"), reason)


@pytest.mark.parametrize("y", [True, False])
@pytest.mark.parametrize("dtype", jit.DTYPES)
def test_interpreted_kernel_computes(dtype, y):
    if not jit.INTERPRETED:
        pytest.skip("Triton compiles here")
    x, _, out = launch(rows=3, dtype=dtype, y=y)
    assert torch.equal(out, x * (1.0 if y else 0.5))


def test_no_kernel_says_return_none_which_triton_3_6_does_not_compile():
    found = []
    for path in Path(ops.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if {"triton.jit", "jit.kernel", "kernel"} & {*map(ast.unparse, getattr(function, "decorator_list", ()))}:
                lines = (ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Return))
                found += [f"{path}: {function.name}" for line in lines if line == "return None"]
    assert not found, "a function that ends without returning anything gives None too"


@pytest.mark.parametrize("grid", [(0,), (3, 0), (3, 1, 0)])
def test_a_grid_of_nothing_launches_nothing(grid):
    with jit.recorded() as launches:
        jit.launch(scaled_sum, grid, None, WIDTH=60, BLOCK=64)
    jit.launch(scaled_sum, grid, None, WIDTH=60, BLOCK=64)
    assert not launches


def test_recorded_writes_launches_down_and_runs_nothing():
    with jit.recorded() as outer:
        with jit.recorded() as inner:
            _, _, out = launch(y=False, dtype=torch.bfloat16, warps=2)
        assert torch.equal(out, torch.ones_like(out))
        assert not outer
        launch()
    (written,) = inner
    assert written == jit.Launch(
        scaled_sum,
        (4, 1, 1),
        (torch.bfloat16, None, torch.bfloat16, 4, 0.5),
        {"WIDTH": 60, "BLOCK": 64},
        2,
        1,
    )
    assert len(outer) == 1
    assert jit._record is None


def test_recorded_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), jit.recorded():
        raise ZeroDivisionError
    assert jit._record is None


@pytest.mark.parametrize("serves", ["interpreted", "recorded", None])
def test_on_a_cpu_kernels_refuse_unless_interpreted_or_recorded(monkeypatch, serves):
    monkeypatch.setattr(jit, "INTERPRETED", serves == "interpreted")
    with jit.recorded() if serves == "recorded" else nullcontext():
        said = jit.refusal(torch.ones(2), None, torch.ones(2, dtype=torch.float16))
    if serves:
        assert said is None
    else:
        assert "not for cpu" in said and "TRITON_INTERPRET=1" in said


def test_dtypes_that_kernels_do_not_take_are_named(monkeypatch):
    monkeypatch.setattr(jit, "INTERPRETED", True)
    said = jit.refusal(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert said == "its kernels take float32, bfloat16 and float16, not torch.float64"


def test_capability_is_that_of_an_a100_where_there_is_no_gpu():
    assert jit.capability(torch.device("cpu")) == (8, 0)
