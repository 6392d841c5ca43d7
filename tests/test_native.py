"""The compiled library as it was installed: what it needs at load, what is in it, and what the compiler made of it."""

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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


def test_no_kernel_spills_and_the_table_of_resources_is_up_to_date(library):
    if not resources.cuobjdump():
        pytest.skip("cuobjdump is missing; it comes with CUDA and with triton")
    found = resources.rows(Path(library.__file__))
    assert not resources.spilling(found)
    path = resources.table(library.build_info()["cuda"])
    if not path.exists():
        pytest.skip(f"there is no table of this CUDA version ({path.name})")
    with path.open(newline="") as file:
        committed = list(csv.DictReader(file))
    now = [{key: str(row[key]) for key in resources.FIELDS} for row in found]
    assert committed == now, "run `python -m benchmarks.resources`"
