"""rates.cu times the instructions that it says it times, and rates.py what rates.cu says that it did."""

import ctypes
import re
import subprocess

import pytest
import torch

from benchmarks import harness, rates, resources


@pytest.mark.skipif(not (rates.nvcc() and resources.cuobjdump()), reason="needs nvcc and cuobjdump")
def test_the_loops_are_of_the_instruction_alone(tmp_path):
    path = tmp_path / "rates.so"
    options = ["-std=c++17", "-arch=sm_80", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([rates.nvcc(), *options, rates.SOURCE, "-o", path], check=True)
    functions = re.split(r"Function : \S*?(\w+)_kernel", resources.dump(path, "-sass"))
    code = {re.sub(r".*\d", "", name): text for name, text in zip(functions[1::2], functions[2::2], strict=True)}
    for name, instruction in (("products", "HMMA.16816.F32.BF16"), ("exponentials", "MUFU.EX2")):
        lines = re.findall(r"/\*([0-9a-f]{4})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]+)([^;]*);", code[name])
        address = {int(at, 16): i for i, (at, *_) in enumerate(lines)}
        targets = [(i, int(to[1], 16)) for i, line in enumerate(lines) if (to := re.match(r" 0x(\w+)", line[3]))]
        loops = [lines[address[to] : i + 1] for i, to in targets if lines[i][2] == "BRA" and address[to] < i]
        largest = max(loops, key=len)
        assert [line[2] for line in largest].count(instruction) >= 16, largest
        assert sum(line[2] != instruction for line in largest) <= 4, largest


def test_a_rate_is_the_work_over_the_time(monkeypatch):
    monkeypatch.setattr(rates, "library", lambda: ctypes.CDLL(None))
    work = {"products": 2e12, "exponentials": 3e9}
    monkeypatch.setattr(rates, "launcher", lambda _, name: (lambda: None, work[name]))
    monkeypatch.setattr(harness, "measure", lambda runs, quick: {name: harness.Timing([1e6 / 2]) for name in runs})
    assert rates.measured.__wrapped__() == {"mma_sync_tflop_s": 4.0, "ex2_g_s": 6.0}


def test_without_a_gpu_the_rates_are_unknown_in_a_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert rates.measured() == "there is no GPU"


@pytest.mark.gpu
def test_a_gpu_has_rates():
    found = rates.measured(quick=True)
    if isinstance(found, str):
        pytest.skip(found)
    assert all(rate > 0 for rate in found.values())
