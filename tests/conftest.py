"""What every test shares: the `gpu` mark, the kernels, and a torchvision that imports beside a CPU torch."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import interpreter
import pytest
import torch
import torchvision_on_cpu  # noqa: F401
from emulator import build

# Without a GPU Triton interprets its kernels; it asks when the first of them is declared.
if not torch.cuda.is_available() and interpreter.runs():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import evakernels as ek
from evakernels import native

# `benchmarks` is no part of the distribution: its folder comes last, so that the installed evakernels is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # the tensors here are small, and tests may run side by side


def pytest_addoption(parser):
    parser.addoption(
        "--eva-code",
        metavar="PATH",
        help="a checkout of github.com/baaivision/EVA: test the integration of its eva_clip against that code itself",
    )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def compiling() -> None:
    """Skips a test where Triton interprets; `where_triton_compiles` runs it all the same."""
    jit = pytest.importorskip("evakernels.jit", reason="triton is not installed")
    if jit.INTERPRETED:
        pytest.skip("Triton interprets here")


@pytest.fixture
def where_triton_compiles(request) -> subprocess.CompletedProcess:
    """The asking test's file, run by pytest in a process in which Triton compiles; skipped where it does here."""
    jit = pytest.importorskip("evakernels.jit", reason="triton is not installed")
    if not jit.INTERPRETED:
        pytest.skip("Triton compiles here")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(request.path)]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The compiled library, built to be emulated on the CPU; or the one at EVAKERNELS_EMULATED_LIBRARY."""
    if reason := build.missing():
        pytest.skip(reason)
    library = native.load(os.environ.get("EVAKERNELS_EMULATED_LIBRARY") or build.library())
    del native.loaded["cpu"]  # it serves the tests that ask for it, and no other
    return library


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request):
    """The device of the compiled kernels, which answer for every call; a test takes both with the same body."""
    if request.param == "emulated":
        library = request.getfixturevalue("emulated")
        request.getfixturevalue("monkeypatch").setitem(native.loaded, "cpu", library)
    with ek.using("cuda"):
        yield torch.device("cpu" if request.param == "emulated" else "cuda")


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_kernels(request):
    """The device of the Triton kernels, which answer for every call: interpreted on the CPU, or a GPU."""
    jit = pytest.importorskip("evakernels.jit", reason="triton is not installed")
    if request.param == "interpreted":
        if not jit.INTERPRETED:
            pytest.skip("Triton compiles here: TRITON_INTERPRET is not 1 (on a CPU Triton 3.6 wants numpy before 2.4)")
        interpreter.round_bfloat16(request.getfixturevalue("monkeypatch"))
    with ek.using("triton"):
        yield torch.device("cpu" if request.param == "interpreted" else "cuda")
