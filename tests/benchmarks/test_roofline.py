"""Device properties by cuda-python and by torch, and what is kept of them."""

import enum
import json
from types import SimpleNamespace

import torch

from benchmarks import harness, rates, roofline

H200 = {"multiprocessors": 132, "cache_mb": 62.9, "clock_mhz": 1980.0, "memory_clock_mhz": 3201.0}
H200 |= {"memory_bus_bits": 6144}


def test_cuda_python_is_asked_for_each_attribute():
    names = [f"CU_DEVICE_ATTRIBUTE_{attribute}" for attribute, *_ in roofline.ATTRIBUTES.values()]
    attributes = enum.Enum("CUdevice_attribute", names)
    values = dict(zip(names, (132, 62_914_560, 1_980_000, 3_201_000, 6144), strict=True))
    driver = SimpleNamespace(
        cuInit=lambda flags: (0,),
        cuDeviceGet=lambda index: (0, index),
        CUdevice_attribute=attributes,
        cuDeviceGetAttribute=lambda which, device: (0, values[which.name]),
    )
    assert roofline.from_driver(driver, 0) == H200
    driver.cuInit = lambda flags: (100,)  # CUDA_ERROR_NO_DEVICE
    assert roofline.from_driver(driver, 0) == {}


def test_torch_is_asked_for_what_it_has():
    device = SimpleNamespace(multi_processor_count=132, L2_cache_size=62_914_560)
    assert roofline.from_torch(device) == {"multiprocessors": 132, "cache_mb": 62.9}


def test_the_theoretical_bandwidth_is_two_transfers_a_tick():
    assert roofline.theoretical(H200) == {"theoretical_gb_s": 4916.7}
    assert roofline.theoretical({"multiprocessors": 132}) == {}


def test_rates_are_those_of_the_measured_times(monkeypatch):
    monkeypatch.setattr(harness, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(harness, "measure", lambda runs, quick: {name: harness.Timing([1e6]) for name in runs})
    assert roofline.rates(quick=True) == {"copy_gb_s": 0.0, "matmul_tflop_s": 0.0}
    monkeypatch.setattr(harness, "measure", lambda runs, quick: {name: harness.Timing([1.0]) for name in runs})
    assert roofline.rates(quick=True) == {"copy_gb_s": 16777.2, "matmul_tflop_s": 33.554}


def test_ceilings_have_the_rates_of_instructions_or_the_reason_why_not(monkeypatch):
    monkeypatch.setattr(roofline, "rates", lambda quick: {})
    monkeypatch.setattr(rates, "measured", lambda quick: {"mma_sync_tflop_s": 500.0, "ex2_g_s": 4000.0})
    assert roofline.ceilings()["ex2_g_s"] == 4000.0
    monkeypatch.setattr(rates, "measured", lambda quick: "nvcc was not found")
    assert roofline.ceilings()["mma_sync, ex2"] == "absent: nvcc was not found"


def test_provenance_keeps_the_other_families(tmp_path):
    found = roofline.properties()
    roofline.record(tmp_path, "norm", found)
    roofline.record(tmp_path, "lamb", found | {"copy_gb_s": 10.0})
    kept = json.loads((tmp_path / "provenance.json").read_text())
    assert list(kept) == ["lamb", "norm"] and kept["lamb"]["copy_gb_s"] == 10.0
    assert kept["norm"]["device"] == harness.device_name() and {"command", "date", "commit"} <= kept["norm"].keys()
