"""The compiled library as it was installed: what it needs at load, what is in it, and what the compiler made of it."""

import csv
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

import evakernels as ek
from benchmarks import resources
from evakernels import native


@pytest.fixture(scope="module")
def library():
    found = native.library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def tool(name, *arguments):
    if not shutil.which(name):
        pytest.skip(f"{name} is not on PATH")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def test_needs_neither_torch_nor_cuda_at_load(library):
    needed = re.findall(r"NEEDED.*\[(.+?)\]", tool("readelf", "-d", library.__file__))
    system = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so.*|ld-linux.*"
    assert needed and all(re.fullmatch(system, name) for name in needed), needed
    undefined = re.findall(r"^ +U (\S+)$", tool("nm", "-D", "--undefined-only", library.__file__), re.MULTILINE)
    unversioned = [name for name in undefined if "@" not in name]  # a version is that of a system library
    assert unversioned and all(re.match(r"_?Py", name) for name in unversioned), unversioned


def test_exports_nothing_of_its_own(library):
    exported = re.findall(r"^\w+ T (\S+)$", tool("nm", "-D", "--defined-only", library.__file__), re.MULTILINE)
    assert exported == ["PyInit__native"]


def test_has_every_family_of_the_sources(library):
    sources = Path(__file__).parents[1] / "csrc"
    assert sorted(library.build_info()["families"]) == sorted(p.parent.name for p in sources.glob("*/bindings.cpp"))


def test_no_kernel_spills_and_the_table_of_resources_is_up_to_date(library, emulated):
    if not resources.cuobjdump():
        pytest.skip("cuobjdump is missing; it comes with CUDA and with triton")
    found = resources.rows(Path(library.__file__), emulated)
    assert not resources.spilling(found)
    path = resources.table(library.build_info()["cuda"])
    if not path.exists():
        pytest.skip(f"there is no table of this CUDA version ({path.name})")
    with path.open(newline="") as file:
        committed = list(csv.DictReader(file))
    now = [{key: str(row[key]) for key in resources.FIELDS} for row in found]
    assert committed == now, "run `python -m benchmarks.resources`"


@pytest.mark.parametrize(
    ("driver", "runs"), [(12080, False), (13000, True), (13010, True), (14000, True), (None, True)]
)
def test_a_library_of_newer_cuda_than_the_drivers_is_refused(driver, runs, monkeypatch):
    stand_in = ModuleType("_native")
    stand_in.build_info = lambda: {"cuda": "13.1", "architectures": "", "device": "cuda", "families": ["norm"]}
    monkeypatch.setitem(native.loaded, "cuda", stand_in)
    monkeypatch.setattr(native, "_driver_version", lambda: driver)
    told = native.refusal("norm", "cuda")
    assert told is None if runs else "has CUDA 13.1, the driver that of 12.8; update it" in told


def test_launches_are_told_instead_of_run(emulated, monkeypatch):
    monkeypatch.setitem(native.loaded, "cpu", emulated)
    x = torch.ones(1, 64, requires_grad=True)
    with ek.using("cuda"):
        told = emulated.launches(lambda: ek.layer_norm(x, x[0].detach()).sum().backward())
        assert [threads for _, threads, _ in told] == [256, 256, 512]  # forward, backward, sums of the partial rows
        assert [shared for _, _, shared in told] == [160, 320 + 4 * 64, 4 * 16 * 33]
        with pytest.raises(ZeroDivisionError):
            emulated.launches(lambda: 1 / 0)
        assert not ek.layer_norm(x, x[0].detach()).any()


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "architecture", "blocks"),
    [
        (32, 256, 0, "sm_80", 8),  # 64 warps
        (32, 32, 0, "sm_80", 32),  # blocks
        (40, 256, 0, "sm_80", 6),  # registers: 12 warps of 1280 in each quarter
        (41, 256, 0, "sm_80", 5),  # of 1536: 10
        (255, 256, 0, "sm_90", 1),
        (64, 128, 40 << 10, "sm_80", 4),  # 41 KiB of 164
        (64, 128, 40 << 10, "sm_90", 5),  # of 228
        (64, 128, (163 << 10) - 128, "sm_80", 1),
    ],
)
def test_occupancy_is_that_of_the_scarcest_resource(registers, threads, shared, architecture, blocks):
    assert resources.blocks(registers, threads, shared, resources.SHARED_MEMORY[architecture]) == blocks
