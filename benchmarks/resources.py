"""What the compilers make of each kernel: registers, spills, shared memory, occupancy, and telling instructions.

`python -m benchmarks.resources` reads the compiled library with cuobjdump (of a CUDA toolkit, or of Triton's wheel) and
writes `benchmarks/results/resources-cuda-<version>.csv`; and of the Triton kernels (`triton_resources.py`) it writes
`resources-triton-<version>.csv`. Nothing is run, so no GPU is needed. Threads of a block and its shared memory, on
which occupancy depends as well, are decided by the host: the emulated library is called at telling sizes, and what it
would launch is written down.
"""

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch

import evakernels as ek
from benchmarks import harness, smallest
from evakernels import native
from evakernels.ops.lamb import cuda as lamb

# Instructions to count, by the start of their SASS mnemonic and a part it must have.
COUNTED = {
    "HMMA": ("HMMA", ""),
    "LDSM": ("LDSM", ""),
    "LDGSTS": ("LDGSTS", ""),
    "LDG.128": ("LDG", ".128"),
    "STG.128": ("STG", ".128"),
    "spills": ("STL", ""),
}
INSTRUCTIONS = COUNTED | {"HGMMA": ("HGMMA", "")}  # Triton's products on sm_90
# Of kernels whose names begin otherwise than with their family's.
FAMILIES = {"gather": "tokens", "patchify": "tokens", "sample": "tokens", "sum": "common"}
# `warps` are on a multiprocessor at once where each block is launched as in `at`.
FIELDS = (
    *("family", "kernel", "architecture", "registers", "stack_bytes"),
    *("at", "threads", "shared_bytes", "blocks", "warps", *COUNTED),
)

# Calls that together launch every kernel. Of a kernel launched by several the first counts.
CALLS = {
    "width 1024": partial(smallest.norm, [1024]),
    "width 1021": partial(smallest.norm, [1021]),
    "width 2730": partial(smallest.swiglu, [2730]),
    "width 2048": partial(smallest.swiglu, [2048]),
    "width 6144": lambda: (smallest.norm([6144]), smallest.swiglu([6144])),
    "224 by 14": partial(smallest.tokens, 224, 14),
    "any size": smallest.lamb,
    "129 tokens": partial(smallest.attention, 129),
    "2049 tokens": partial(smallest.attention, 2049),
}
KIB = 1024
SHARED_MEMORY = {"sm_80": 164 * KIB, "sm_90": 228 * KIB}  # of a multiprocessor
RESERVED = KIB  # of it, in each block, by CUDA


class Launch(NamedTuple):
    """Threads and bytes of shared memory of a block, in one of the `CALLS`."""

    at: str
    threads: int
    shared: int


def cuobjdump() -> str | None:
    """The path of cuobjdump, or None where neither a toolkit nor Triton is installed."""
    if found := shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])):
        return found
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(wheel) if wheel and wheel.is_file() else None


def dump(path: Path, *options: str) -> str:
    tool = cuobjdump()
    assert tool, "cuobjdump is missing"
    return subprocess.run([tool, *options, str(path)], capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not tool:
        return {name: name for name in names}
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(short, out.splitlines()), strict=True))


def short(name: str) -> str:
    """`norm_forward_kernel<1, float, bf16, 1, 0>` of a kernel's full signature."""
    name = re.sub(r"ek::|^void |\(anonymous namespace\)::", "", name)
    name = re.sub(r"\([A-Za-z]+\)(?=\d)", "", name).split("(")[0]  # (NormKind)1
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "half").replace("unsigned char", "byte")
    return name.replace("true", "1").replace("false", "0")


def launches(emulated: ModuleType, architecture: str) -> dict[str, Launch]:
    """How the host functions launch each kernel, by its name; and by its name without template arguments."""
    symbols = subprocess.run(["nm", str(emulated.__file__)], capture_output=True, text=True, check=True).stdout
    at_offset = {int(m[1], 16): m[2] for m in re.finditer(r"^(\w+) [tTwW] (\S+)$", symbols, re.MULTILINE)}
    found: dict[str, Launch] = {}
    with (
        mock.patch.dict(native.loaded, {"cpu": emulated}),
        mock.patch.object(native, "shared_memory", lambda _: SHARED_MEMORY[architecture] - RESERVED),
        mock.patch.object(harness, "device", lambda: torch.device("cpu")),
        # It reads on what the kernels have written, and none runs.
        mock.patch.object(lamb, "_ends", lambda *_: torch.zeros(2)),
        ek.using("cuda"),
    ):
        for at, call in CALLS.items():
            made = emulated.launches(call)
            names = demangled(sorted({at_offset[offset] for offset, *_ in made}))
            for offset, threads, shared in made:
                name = names[at_offset[offset]]
                for key in (name, name.split("<")[0]):
                    found.setdefault(key, Launch(at, threads, shared))
    return found


def blocks(registers: int, threads: int, shared: int, memory: int) -> int:
    """How many blocks a multiprocessor has at once, by registers, `memory` to share, warps (64) and blocks (32)."""
    warps = -(-threads // 32)
    # Each quarter of a multiprocessor has 16384 registers, given to warps 256 at a time; shared memory, 128 bytes.
    by_registers = 16384 // (-(-registers * 32 // 256) * 256) * 4 // warps
    by_shared = memory // (-(-(shared + RESERVED) // 128) * 128)
    return min(by_registers, by_shared, 64 // warps, 32)


def compiled(path: Path) -> dict[tuple[str, str], dict]:
    """What the compilers made of each kernel of a library, by its name and architecture; of a cubin it is ""."""
    found: dict[tuple[str, str], dict] = {}
    architecture, row = "", {}
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)")
    counted = {start for start, _ in INSTRUCTIONS.values()}
    for line in dump(path, "-res-usage", "-sass").splitlines():
        if match := instruction.match(line):
            if match[1].split(".")[0] in counted:
                for key, (start, part) in INSTRUCTIONS.items():
                    row[key] += match[1].split(".")[0] == start and part in match[1]
        elif line.lstrip().startswith("/*"):  # the second half of an instruction's code
            continue
        elif match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (?:: )?([^\s:]+)", line):
            row = found.setdefault((match[1], architecture), dict.fromkeys(INSTRUCTIONS, 0))
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            row |= zip(("registers", "stack_bytes", "shared_bytes"), map(int, match.groups()), strict=True)
    return found


def rows(path: Path, emulated: ModuleType) -> list[dict]:
    """One row per kernel and architecture of a compiled library; the emulated one knows the launches."""
    found = compiled(path)
    names = demangled(sorted({name for name, _ in found}))
    launched = {architecture: launches(emulated, architecture) for architecture in {a for _, a in found}}
    table = []
    for (name, architecture), row in found.items():
        kernel = names[name]
        start = kernel.split("_")[0]
        launch = launched[architecture].get(kernel) or launched[architecture].get(kernel.split("<")[0])
        assert launch, f"nothing launches {kernel}: add a call to CALLS"
        # From sm_90 on, ptxas counts what CUDA reserves.
        row["shared_bytes"] += launch.shared - (RESERVED if architecture >= "sm_90" else 0)
        row["blocks"] = blocks(row["registers"], launch.threads, row["shared_bytes"], SHARED_MEMORY[architecture])
        row["warps"] = row["blocks"] * -(-launch.threads // 32)
        row |= {"family": FAMILIES.get(start, start), "kernel": kernel, "architecture": architecture}
        table.append(row | {"at": launch.at, "threads": launch.threads})
    return sorted(table, key=lambda row: (row["family"], row["kernel"], row["architecture"]))


def table(version: str) -> Path:
    """The committed table of a CUDA version such as 13.0.88: another compiler allots other registers."""
    return harness.RESULTS / f"resources-cuda-{'.'.join(version.split('.')[:2])}.csv"


def spilling(found: list[dict]) -> list[str]:
    """A sentence for each kernel that keeps anything on the stack."""
    return [
        f"{row['kernel']} on {row['architecture']} has {row['stack_bytes']} bytes of stack"
        for row in found
        if int(row["stack_bytes"]) or int(row["spills"])
    ]


def built() -> Path:
    """The emulated library of these sources."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from emulator import build

    return build.library()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=("cuda", "triton"), action="append", help="these kernels; by default, all")
    parser.add_argument("--library", type=Path, help="a compiled library; by default, the installed one")
    parser.add_argument("--emulated", type=Path, help="the emulated library; by default, it is built")
    parser.add_argument("--all", action="store_true", help="compile also Triton kernels whose rows are those of before")
    given = parser.parse_args()
    if not cuobjdump():
        sys.exit("cuobjdump is missing; it comes with CUDA and with triton")
    sentences = []
    for kernels in given.of or ("cuda", "triton"):
        sentences += of_cuda(given.library, given.emulated) if kernels == "cuda" else of_triton(given.all)
    sys.exit("\n".join(sentences) or None)


def of_cuda(path: Path | None, emulated: Path | None) -> list[str]:
    """Write the table of the compiled library; a sentence for each thing that is wrong."""
    library = native.load(path) if path else native.library()
    if isinstance(library, str):
        return [library]
    found = rows(Path(library.__file__ or ""), native.load(emulated or built()))
    write(table(library.build_info()["cuda"]), FIELDS, found)
    return spilling(found)


def of_triton(everything: bool) -> list[str]:
    """Write the table of the Triton kernels; a sentence for each thing that is wrong."""
    module = harness.peer("benchmarks.triton_resources")
    if isinstance(module, str):
        return [f"no table of Triton kernels: {module}"]
    if module.jit.INTERPRETED:
        return ["no table of Triton kernels: Triton interprets, TRITON_INTERPRET is set"]
    found = (module.rows if everything else module.renewed)(module.launched())
    write(module.table(), module.FIELDS, found)
    return module.too_much(found)


def write(path: Path, fields: tuple[str, ...], found: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(f"{len(found)} rows written to {path}")


if __name__ == "__main__":
    main()
