"""The harness calls what it says it calls, names what is absent, and the families' floors are those of their pages."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_host,
    bench_integrations,
    bench_norm,
    bench_swiglu,
    bench_tokens,
    harness,
    rates,
    report,
)


@pytest.fixture
def called_once(monkeypatch):
    """Nothing is timed: each provider is called once."""

    def measure(providers, **_):
        for run in providers.values():
            run()
        return {name: harness.Timing([1.0, 2.0, 4.0]) for name in providers}

    monkeypatch.setattr(harness, "measure", measure)


def test_a_provider_that_raises_is_absent_and_the_others_are_measured(called_once):
    def fails():
        raise TypeError("not so\nat all")

    providers = {"good": lambda: None, "bad": fails, "peer": "it is not installed"}
    good, bad, peer = harness.compare("norm", "some", torch.float32, "forward", providers, bytes=80)
    assert (good["p50_us"], good["share_of_clone"], good["absent"]) == (2.0, 1.0, "")
    assert (bad["p50_us"], bad["absent"]) == ("", "fails: TypeError: not so")
    assert (peer["p50_us"], peer["absent"]) == ("", "it is not installed")
    assert set(harness.FIELDS) <= set(good)


def test_an_implementation_that_declines_says_why(called_once):
    make = bench_norm.inputs("rms_norm", 2, 8, torch.float32)
    providers = harness.ours("norm", lambda: lambda: bench_norm.ours("rms_norm")(*make))
    rows = {r["provider"]: r for r in harness.compare("norm", "some", torch.float32, "forward", providers)}
    if harness.device().type == "cpu":
        assert rows["evakernels, cpu"]["absent"] == "PyTorch has no fused RMSNorm on the CPU"
    assert rows["evakernels, reference"]["absent"] == ""


def test_backward_repeats_the_gradients():
    x = torch.randn(3, requires_grad=True)
    run = harness.backward(lambda t, scale: (t * scale,), lambda: (x, torch.tensor(2.0)))
    first, second = run(), run()
    assert torch.equal(first[0], second[0]) and first[0].shape == x.shape


def test_inputs_rotate_beyond_the_cache_of_a_gpu(monkeypatch):
    made = []
    monkeypatch.setattr(harness, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1000))

    def make():
        made.append(torch.zeros(100))
        return (made[-1],)

    turns = harness.rotating(make)
    assert len(made) * 400 >= 2 * 1000 > (len(made) - 1) * 400
    assert [next(turns)[0] is made[i % len(made)] for i in range(12)] == [True] * 12


def test_what_is_written_is_read_again(called_once, tmp_path):
    rows = list(harness.compare("norm", "a, b", torch.float32, "forward", {"us": lambda: None, "peer": "no\ttime"}))
    path = harness.write(rows, tmp_path)
    assert path == tmp_path / "norm.csv"
    again = report.read(path)
    assert [row["absent"] for row in again] == ["", "no\ttime"] and again[0]["shape"] == "a, b"


@pytest.mark.parametrize(
    "bench", [bench_attention, bench_norm, bench_swiglu, bench_tokens, bench_host, bench_integrations]
)
def test_every_quick_case_runs(bench, called_once):
    rows = list(bench.rows(quick=True))
    assert rows and not [row for row in rows if row["absent"].startswith(harness.FAILS)]
    if bench is bench_integrations:
        assert {row["provider"] for row in rows} >= {"evakernels", "untouched"}
    elif bench is not bench_host:
        assert {row["provider"] for row in rows} >= {"evakernels", "evakernels, reference"}
        assert all(row["bytes"] > 0 for row in rows)


def test_pytest_benchmark_runs_the_hosts_steps():
    root = Path(bench_host.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-n", "0", "--benchmark-disable", "benchmarks/bench_host.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("function", list(bench_norm.WIDTHS))
def test_the_norms_peers_compute_the_same(function):
    inputs = bench_norm.inputs(function, 5, 12, torch.float64)
    same(bench_norm.ours(function)(*inputs), bench_norm.peers(function)["torch"](*inputs))


@pytest.mark.parametrize("function", ["swiglu", "swiglu_norm", "swiglu_norm_packed"])
def test_the_swiglus_peers_compute_the_same(function):
    inputs = bench_swiglu.inputs(function, 5, 13, torch.float64)
    same(bench_swiglu.ours(function, 13)(*inputs), bench_swiglu.peers(function, 13)["torch"](*inputs))


@pytest.mark.parametrize("case", bench_attention.TINY, ids=str)
def test_the_attentions_peers_compute_the_same(case):
    """In float64, which on a GPU none of them takes."""
    inputs = bench_attention.inputs(case, torch.float64)
    found = bench_attention.peers(case, torch.float64)
    peers = [peer for name, peer in found.items() if name.startswith("SDPA") and callable(peer)]
    assert len(peers) == 2 or harness.device().type == "cuda"
    for peer in peers:
        same(bench_attention.ours(case)(*inputs), peer(*inputs))


def same(ours, theirs):
    ours, theirs = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=a.detach().abs().max().item() * 2.0**-48)


def test_the_tokens_peers_compute_the_same(monkeypatch):
    """Each provider's last output, all from the same random inputs."""
    last = {}

    def compare(family, shape, dtype, mode, providers, **_):
        for name, run in providers.items():
            torch.manual_seed(0)
            if callable(run) and mode == "forward":
                try:
                    last[name] = run()
                except NotImplementedError:  # no compiled library
                    continue
        yield from ()

    monkeypatch.setattr(harness, "compare", compare)
    for cases in (
        bench_tokens.gathering(2, 6, 5, torch.float32, True),
        bench_tokens.cutting(2, 28, 7, torch.float32, True),
    ):
        last.clear()
        assert list(cases) == [] and len(last) >= 4
        assert all(torch.equal(output, last["evakernels"]) for output in last.values())


def test_floors_are_those_of_the_pages():
    """Bytes per element in two-byte dtypes, as docs/norm.md and docs/swiglu.md have them."""
    assert {name: (2 * a, 2 * b) for name, (a, b) in bench_norm.PASSES.items()} == {
        "layer_norm": (4, 6),
        "rms_norm": (4, 6),
        "add_norm": (8, 8),
        "norm_add": (6, 6),
    }
    assert bench_swiglu.passes("swiglu_norm", 2048) == (3 * 2048, 5 * 2048)
    assert bench_swiglu.passes("swiglu_norm_packed", 2730) == (2 * 2730 + 2736, 3 * 2730 + 2 * 2736)


def test_attentions_floors_are_those_of_two_products_and_of_five(monkeypatch):
    """Bytes per channel of a token in two-byte dtypes, and L/14's sizes with half the tokens dropped."""
    assert {mode: 2 * passes for mode, passes in bench_attention.PASSES.items()} == {"forward": 8, "backward": 16}
    case = next(case for case in bench_attention.CASES if case.tower == "L/14" and case.dropped)
    elements, padded, pairs = bench_attention.work(case)
    assert (elements, padded, pairs) == (256 * 129 * 1024, 256 * 144**2 * 1024, 256 * 16 * 129**2)
    monkeypatch.setattr(rates, "measured", lambda quick: {"mma_sync_tflop_s": 500.0, "ex2_g_s": 4000.0})
    assert rates.floors(4 * padded, pairs) == {"products_us": 43.49, "exps_us": 17.04}
    monkeypatch.setattr(rates, "measured", lambda quick: "there is no GPU")
    assert rates.floors(4 * padded, pairs) == {"products_us": "", "exps_us": ""}


@pytest.mark.gpu
def test_a_gpu_gives_device_time_host_time_and_memory():
    x = torch.randn(1 << 20, device="cuda")
    (row,) = harness.compare("norm", "x + 1", x.dtype, "forward", {"torch": lambda: x + 1}, bytes=8 << 20, quick=True)
    assert row["p50_us"] > 0 and row["host_us"] > 0 and row["peak_mb"] >= 4 and row["share_of_clone"] > 0
