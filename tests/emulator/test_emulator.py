"""The emulator's own tests: it reports planted bugs, and its primitives move every element as the PTX ISA says.

`golden/*.json` has the layouts, written by `python tests/emulator/test_emulator.py` from the formulas in this file.
The probes that are compared with it run emulated, and on a GPU where there is one; "hardware" in a golden file says on
which GPU they have passed.
"""

import ctypes
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE.parent) in sys.path else [str(HERE.parent)]

from emulator import build  # noqa: E402

LANES = range(32)


# --- the layouts, by the PTX ISA's formulas --------------------------------------------------------------------------


def mma_layout(k: int) -> dict[str, list]:
    """(row, column) of every element a lane holds: "Matrix Fragments for mma.m16n8k8", "... mma.m16n8k16 with
    floating point type", f16 and bf16."""

    def a(group, thread, i):
        if k == 8:
            return (group if i in (0, 1) else group + 8, thread * 2 + (i & 1))
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return (row, thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8)

    def b(group, thread, i):
        return (thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group)

    def c(group, thread, i):
        return (group if i < 2 else group + 8, thread * 2 + (i & 1))

    sizes = {"a": (a, k // 2), "b": (b, k // 4), "d": (c, 4)}
    return {name: [[[*at(n >> 2, n % 4, i)] for i in range(size)] for n in LANES] for name, (at, size) in sizes.items()}


def ldmatrix_layout() -> dict[str, list]:
    """(matrix, row, column) of both elements of every register: "Warp-level matrix load instruction: ldmatrix". Thread
    n holds elements 2 (n % 4) and the next one of row n / 4; with .trans, matrices are loaded column-major."""

    def register(lane, matrix, transposed):
        at = [(lane // 4, lane % 4 * 2 + half) for half in (0, 1)]
        return [[matrix, column, row] if transposed else [matrix, row, column] for row, column in at]

    kinds = {"plain": False, "transposed": True}
    return {name: [[register(n, m, kind) for m in range(4)] for n in LANES] for name, kind in kinds.items()}


def cp_async_layout() -> dict[str, list]:
    """Where each word comes from, null for zero: "Non-bulk copy: cp.async". 16 bytes are written, of which src-size
    are read and the others are zero. Row n of the probe is what lane 31 - n has copied, for two groups in turn."""
    masks = [0x5A5A00FF, 0x12345678]
    words = [
        [group * 128 + (31 - n) * 4 + i if mask >> (31 - n) & 1 else None for i in range(4)]
        for group, mask in enumerate(masks)
        for n in LANES
    ]
    return {"masks": masks, "words": words}


LAYOUTS = {
    "mma_m16n8k8": lambda: mma_layout(8),
    "mma_m16n8k16": lambda: mma_layout(16),
    "ldmatrix": ldmatrix_layout,
    "cp_async": cp_async_layout,
}


def golden(name: str) -> dict:
    return json.loads((HERE / "golden" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_golden_file_is_what_the_formulas_say(name):
    file = golden(name)
    assert file.pop("hardware")
    assert file == LAYOUTS[name]()


# --- probes: every lane and element by itself ------------------------------------------------------------------------


class Library:
    """plants.cu and probes.cu, called with numpy arrays, which the kernels change in place."""

    def __init__(self, path: Path, device: str):
        self.library, self.device = ctypes.CDLL(str(path)), device

    def report(self, name: str, *args) -> str:
        """Call a function; what it reported, empty when all was well."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        tensors = {i: torch.from_numpy(a).to(self.device) for i, a in enumerate(args) if isinstance(a, np.ndarray)}
        plain = [ctypes.c_void_p(tensors[i].data_ptr()) if i in tensors else a for i, a in enumerate(args)]
        words = function(*plain).decode()
        for i, tensor in tensors.items():
            args[i][...] = tensor.cpu().numpy()
        return words

    def __call__(self, name: str, *args) -> None:
        assert self.report(name, *args) == ""


@pytest.fixture(scope="module")
def emulated():
    if why := build.missing():
        pytest.skip(why)
    sources = [(HERE / name, build.kernel_flags(checked=True)) for name in ("plants.cu", "probes.cu")]
    return Library(build.link("libtests.so", [*sources, *build.emulator()]), "cpu")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc on PATH to compile probes.cu")
    path = tmp_path_factory.mktemp("probes") / "libprobes.so"
    options = ["-std=c++17", "-O3", "-arch=native", "-I", str(build.CSRC), "-Xcompiler", "-fPIC", "-shared"]
    build.run(["nvcc", *options, str(HERE / "probes.cu"), "-o", str(path)])
    return Library(path, "cuda")


@pytest.fixture(params=["emulated", pytest.param("on_gpu", marks=pytest.mark.gpu)])
def probe(request):
    return request.getfixturevalue(request.param)


def bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The 16 bits of each value in a dtype."""
    return torch.from_numpy(values.astype(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)


def unique(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows * columns).reshape(rows, columns)  # below 257: exact in bf16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [8, 16])
def test_mma_holds_every_element_where_the_golden_file_says(probe, k, dtype):
    layout = golden(f"mma_m16n8k{k}")

    def multiply(a, b, c):
        held = {}
        for name, matrix in (("a", a), ("b", b)):
            rows, columns = np.moveaxis(np.array(layout[name]), -1, 0)
            held[name] = np.ascontiguousarray(bits(matrix, dtype)[rows, columns]).view(np.uint32)
        rows, columns = np.moveaxis(np.array(layout["d"]), -1, 0)
        d = np.ascontiguousarray(c[rows, columns], np.float32)
        probe("probe_mma", d, held["a"], held["b"], k, int(dtype == torch.bfloat16))
        result = np.full((16, 8), np.nan)
        result[rows, columns] = d
        np.testing.assert_array_equal(result, a @ b + c)

    zero = np.zeros((16, 8))
    for first in range(0, k, 8):  # d is 8 columns of a, and so on: one value of one lane in each place
        multiply(unique(16, k), np.eye(k)[:, first : first + 8], zero)
    for first in range(0, k, 8):
        multiply(np.eye(k)[np.arange(16) % 8 + first], unique(k, 8), zero)
    multiply(np.zeros((16, k)), np.zeros((k, 8)), unique(16, 8))
    draw = np.random.default_rng(1)
    multiply(draw.integers(-9, 9, (16, k)), draw.integers(-9, 9, (k, 8)), draw.integers(-9, 9, (16, 8)))


@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_ldmatrix_gives_every_lane_what_the_golden_file_says(probe, kind):
    elements = np.random.default_rng(0).permutation(65536)[:256].astype(np.uint16)
    out = np.zeros(32 * 4, np.uint32)
    probe("probe_ldmatrix", out, elements, int(kind == "transposed"))
    matrix, row, column = np.moveaxis(np.array(golden("ldmatrix")[kind]), -1, 0)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(32, 4, 2), elements.reshape(4, 8, 8)[matrix, row, column])


def test_cp_async_copies_or_writes_zeros(probe):
    layout = golden("cp_async")
    source = np.arange(1, 257, dtype=np.uint32) * 0x01010101
    out = np.zeros(256, np.uint32)
    probe("probe_cp_async", out, source, *map(ctypes.c_uint, layout["masks"]))
    want = [0 if at is None else source[at] for words in layout["words"] for at in words]
    np.testing.assert_array_equal(out, np.array(want, np.uint32))


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("operand", [0, 1, 3, 8, 17])
@pytest.mark.parametrize("votes", [0, 0xFFFFFFFF, 0x80000001])
def test_shuffles_and_votes(probe, operand, width, votes):
    """CUDA C++ Programming Guide, "Warp Shuffle Functions" and "Warp Vote Functions"."""
    out = np.zeros((5, 32), np.uint32)
    probe("probe_shuffle", out, operand, width, ctypes.c_uint(votes))
    for lane in LANES:
        first = lane // width * width
        by_xor, down, up = lane ^ operand, lane + operand, lane - operand
        want = [
            first + operand % width,
            by_xor if by_xor < first + width else lane,
            down if down < first + width else lane,
            up if up >= first else lane,
            votes ^ (0 if votes else 1) ^ (2 if votes == 0xFFFFFFFF else 0),
        ]
        assert out[:, lane].tolist() == want, lane


def test_atomics_lose_nothing(probe):
    f, u, wide, largest = (np.zeros(1, dtype) for dtype in (np.float32, np.uint32, np.uint64, np.int32))
    probe("probe_atomic", f, u, wide, largest)
    total = sum(range(5 * 96))
    assert (f[0], u[0], wide[0], largest[0]) == (total, total, (total << 32) + total, 5 * 96 - 1)


def test_scalar_functions(probe):
    draw = np.random.default_rng(0)
    x = draw.integers(-126, 120, 32).astype(np.float32) + draw.integers(0, 64, 32).astype(np.float32) / 64
    x[:2] = -200, -np.inf
    a, b = draw.integers(0, 2**32, (2, 32), dtype=np.uint32)
    out, high = np.zeros((4, 32), np.float32), np.zeros((3, 32), np.uint32)
    probe("probe_scalar", out, x, high, a, b)
    np.testing.assert_allclose(out[0], np.exp2(x.astype(np.float64)) * (x > -126), rtol=2**-21)
    for row, dtype in ((1, torch.bfloat16), (2, torch.float16)):
        np.testing.assert_array_equal(out[row], torch.from_numpy(x).to(dtype).float().numpy())
        low, top = bits(x, dtype).astype(np.uint32), bits(x[::-1].copy(), dtype).astype(np.uint32)
        np.testing.assert_array_equal(high[row], low | top << 16)
    assert np.isneginf(out[3]).all()
    np.testing.assert_array_equal(high[0], (a.astype(np.uint64) * b >> 32).astype(np.uint32))


# --- planted bugs ----------------------------------------------------------------------------------------------------

IN_FLIGHT = "asynchronous copy to this place has not been waited for"
PLANTS = {  # in the order of `enum Bug`: what has to be reported
    "no barrier before a read": r"uninitialised.*plants.cu|race: read after write by thread.*plants.cu",
    "no barrier before a write": r"race: (write after read|read after write).*plants.cu",
    "no __syncwarp": r"race: .*plants.cu",
    "shared overrun": r"out of bounds: 4-byte access at offset 1280 of 1280 bytes of shared memory.*plants.cu",
    "global overrun": r"out of bounds: 4-byte write at offset 2.. of tensor #1 of 240 bytes.*plants.cu",
    "uninitialised shared memory": r"uninitialised: 4-byte read of shared memory.*plants.cu",
    "two barriers for one": r"divergent __syncthreads.*plants.cu",
    "one thread returns before a barrier": r"deadlock.*1 of 64 threads have exited.*__syncthreads.*plants.cu",
    "half a warp shuffles with the full mask": r"divergent warp collective.*plants.cu",
    "shuffle in one half, __syncwarp in the other": r"divergent warp collective.*plants.cu",
    "shuffle from outside the mask": r"shuffles from lane .*, which is not in mask 0000ffff",
    "lane outside its own mask": r"lane .* is not in its own mask 0000ffff",
    "barrier in one warp": r"divergent __syncthreads.*plants.cu",
    "no wait for a copy": IN_FLIGHT + r".*plants.cu",
    "wait for the wrong group": IN_FLIGHT + r".*plants.cu",
    "no commit": IN_FLIGHT + r".*plants.cu",
    "wait without a barrier": IN_FLIGHT + r"|uninitialised: |race: read after write",
    "misaligned load": r"misaligned.*plants.cu",
    "array index": r"array index out of bounds.*plants.cu",
    "no fence": r"race between blocks: 4-byte read of what block \d+ wrote.*plants.cu",
    "+= for atomicAdd": r"race between blocks.*tensor #0.*plants.cu",
    "two blocks write one place": r"race between blocks.*tensor #1.*plants.cu",
    "too much shared memory": r"launch with 167936 bytes of shared memory; sm_80 has 166912",
    "one warp reads what another writes": r"race: (write after read|read after write).*plants.cu",
    "one warp reads what another changes atomically": r"race: (read after atomic|atomic after read).*plants.cu",
    "one warp writes what another changes atomically": r"race: (write after atomic|atomic after write).*plants.cu",
}
OF_BLOCKS = ("no fence", "+= for atomicAdd", "two blocks write one place")
OF_ATOMICS = tuple(name for name in PLANTS if "atomically" in name)


def run_threads(library, bug: int = 0):
    source, out = np.arange(256, dtype=np.float32) / 2, np.full(64, -1, np.float32)
    return library.report("plant_threads", out, source, 60, bug), out


def run_blocks(library, bug: int = 0, blocks: int = 7):
    total, partial, finished = np.zeros(1, np.float32), np.zeros(blocks, np.float32), np.zeros(1, np.uint32)
    return library.report("plant_blocks", total, partial, finished, blocks, bug), total[0], finished[0]


def run_atomic(library, bug: int = 0):
    out = np.full(64, -2, np.int32)
    return library.report("plant_atomic", out, len(out), bug), out


@pytest.mark.parametrize("bug", PLANTS)
def test_a_planted_bug_is_reported_in_every_order(emulated, bug, monkeypatch):
    run = run_blocks if bug in OF_BLOCKS else run_atomic if bug in OF_ATOMICS else run_threads
    for order in "012":
        monkeypatch.setenv("EMU_SEED", order)
        with pytest.raises(RuntimeError, match=PLANTS[bug]):
            if report := run(emulated, list(PLANTS).index(bug) + 1)[0]:
                raise RuntimeError(report)


@pytest.mark.parametrize("bug", OF_ATOMICS)
def test_an_atomic_operation_races_before_and_after(emulated, bug, monkeypatch):
    reports = set()
    for order in range(8):
        monkeypatch.setenv("EMU_SEED", str(order))
        report, _ = run_atomic(emulated, list(PLANTS).index(bug) + 1)
        reports |= set(re.findall(r"race: (\w+ after \w+)", report))
    plain = "read" if "reads" in bug else "write"
    assert reports == {f"{plain} after atomic", f"atomic after {plain}"}


@pytest.mark.parametrize("order", range(8))
def test_nothing_is_reported_where_nothing_is_wrong(emulated, order, monkeypatch):
    monkeypatch.setenv("EMU_SEED", str(order))
    report, out = run_threads(emulated)
    assert not report
    t = np.arange(64)
    x = 63.0 - t + 63 - (t ^ 1)
    x = x + x[np.where(t % 32 < 16, t ^ 1, t ^ 2)] + (t ^ 63) * 2
    np.testing.assert_array_equal(out, np.where(t < 60, x, -1))
    for _ in range(20):
        assert run_blocks(emulated) == ("", 28, 0)
    report, out = run_atomic(emulated)
    assert not report and (out == 63).all()


@pytest.mark.parametrize("n", [1, 31, 32, 40, 63])
def test_threads_may_exit_when_nobody_waits_for_them(emulated, n):
    out = np.zeros(n, np.float32)
    if n < 32:  # the first warp is told to shuffle as a whole
        assert "deadlock" in emulated.report("plant_exit", out, n, 96)
    else:
        emulated("plant_exit", out, n, 96)
        assert out.tolist() == [0] * 32 + [32] * (n - 32)


def test_a_mask_names_lanes_that_exist(emulated):
    assert "names threads that do not exist" in emulated.report("plant_exit", np.zeros(9, np.float32), 9, 9)


def test_a_write_after_a_read_is_a_race_too(emulated, monkeypatch):
    monkeypatch.setenv("EMU_SEED", "0")  # the last warp at a barrier goes on first: it reads
    bug = list(PLANTS).index("one warp reads what another writes") + 1
    assert "race: write after read by thread 63" in run_threads(emulated, bug)[0]


def test_a_grid_without_blocks_is_refused(emulated):
    assert "at least 1" in run_blocks(emulated, blocks=0)[0]


def test_an_error_names_the_place_and_its_callers(emulated):
    report, _ = run_threads(emulated, list(PLANTS).index("no wait for a copy") + 1)
    assert report.startswith("block (0,0,0) thread (")
    source = (HERE / "plants.cu").read_text().splitlines()
    line = int(report.rsplit("plants.cu:", 1)[1].split("]")[0].split(" ")[0])
    assert "s.bytes + (t ^ 63) * 16" in source[line - 1]


# --- the build -------------------------------------------------------------------------------------------------------


def test_an_object_is_compiled_again_only_when_what_it_includes_has_changed(tmp_path, monkeypatch):
    if why := build.missing():
        pytest.skip(why)
    monkeypatch.setattr(build, "BUILD", tmp_path)
    (tmp_path / "a.cpp").write_text('#include "b.hpp"\nint f() { return B; }\n')
    (tmp_path / "b.hpp").write_text("#define B 1\n")

    def compiled(*flags):
        return build.compile_object(tmp_path / "a.cpp", [*build.COMMON, *flags], tmp_path)

    first = compiled()
    made = first.stat().st_ino
    assert compiled() == first and first.stat().st_ino == made
    assert compiled("-O1") != first
    (tmp_path / "b.hpp").write_text("#define B 2\n")
    assert compiled() != first
    (tmp_path / "a.cpp").write_text("int f( {")
    with pytest.raises(RuntimeError, match="error: expected"):
        compiled()


def test_what_nobody_uses_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BUILD", tmp_path)
    old, new = tmp_path / "name/old.so", tmp_path / "new.o"
    old.parent.mkdir()
    old.touch(), new.touch()
    os.utime(old, (0, 0))
    build.forget()
    assert list(tmp_path.iterdir()) == [new]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "g++" in build.missing()
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.missing() == "the emulator runs on x86-64 Linux alone"


if __name__ == "__main__":
    for name, layout in LAYOUTS.items():
        lines = ['  "hardware": "awaits hardware"']
        for key, rows in layout().items():
            lines.append(f'  "{key}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]")
        (HERE / "golden" / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
