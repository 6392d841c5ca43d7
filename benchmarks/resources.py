"""What the compilers make of each CUDA kernel: registers, spills, shared memory, occupancy, and telling instructions.

`python -m benchmarks.resources` reads the compiled library with cuobjdump (of a CUDA toolkit, or of Triton's wheel) and
writes `benchmarks/results/resources-cuda-<version>.csv`. Nothing is run, so no GPU is needed.
"""

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import RESULTS
from evakernels import native

# Instructions to count, by the start of their SASS mnemonic and a part it must have.
COUNTED = {
    "HMMA": ("HMMA", ""),
    "LDSM": ("LDSM", ""),
    "LDGSTS": ("LDGSTS", ""),
    "LDG.128": ("LDG", ".128"),
    "STG.128": ("STG", ".128"),
    "spills": ("STL", ""),
}
# Of kernels whose names begin otherwise than with their family's.
FAMILIES = {"gather": "tokens", "patchify": "tokens", "sample": "tokens", "sum": "common"}
FIELDS = ("family", "kernel", "architecture", "registers", "warps", "stack_bytes", "shared_bytes", *COUNTED)


def cuobjdump() -> str | None:
    """The path of cuobjdump, or None where neither a toolkit nor Triton is installed."""
    if found := shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])):
        return found
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(wheel) if wheel and wheel.is_file() else None


def dump(option: str, path: Path) -> str:
    tool = cuobjdump()
    assert tool, "cuobjdump is missing"
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not tool:
        return {name: name for name in names}
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(short, out.splitlines()), strict=True))


def short(name: str) -> str:
    """`norm_forward_kernel<1, float, bf16, 1, 0>` of a kernel's full signature."""
    name = re.sub(r"ek::|^void |\((?:anonymous namespace)\)::|\([A-Za-z]+\)(?=\d)", "", name).split("(")[0]
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "half").replace("unsigned char", "byte")
    return name.replace("true", "1").replace("false", "0")


def warps(registers: int) -> int:
    """How many warps the registers of a multiprocessor hold (65536 of them, given out 8 at a time); 64 at most."""
    return min(64, 65536 // (-(-registers // 8) * 8 * 32))


def rows(path: Path) -> list[dict]:
    """One row per kernel and architecture of a compiled library."""
    found: dict[tuple[str, str], dict] = {}
    architecture = ""
    for line in dump("-res-usage", path).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            found[name, architecture] = {"registers": registers, "warps": warps(registers)}
            found[name, architecture] |= {"stack_bytes": stack, "shared_bytes": shared}
    for line in dump("-sass", path).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            row = found.get((match[1], architecture), {})
            row |= dict.fromkeys(COUNTED, 0)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", line):
            for key, (start, part) in COUNTED.items():
                row[key] += match[1].split(".")[0] == start and part in match[1]
    names = demangled(sorted({name for name, _ in found}))
    table = [
        {
            "family": FAMILIES.get(start := names[name].split("_")[0], start),
            "kernel": names[name],
            "architecture": architecture,
        }
        | row
        for (name, architecture), row in found.items()
    ]
    return sorted(table, key=lambda row: (row["family"], row["kernel"], row["architecture"]))


def table(version: str) -> Path:
    """The committed table of a CUDA version such as 13.0.88: another compiler allots other registers."""
    return RESULTS / f"resources-cuda-{'.'.join(version.split('.')[:2])}.csv"


def spilling(found: list[dict]) -> list[str]:
    """A sentence for each kernel that keeps anything on the stack."""
    return [
        f"{row['kernel']} on {row['architecture']} has {row['stack_bytes']} bytes of stack"
        for row in found
        if int(row["stack_bytes"]) or int(row["spills"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="a compiled library; by default, the installed one")
    given = parser.parse_args()
    library = native.load(given.library) if given.library else native.library()
    if isinstance(library, str) or not cuobjdump():
        sys.exit(library if isinstance(library, str) else "cuobjdump is missing; it comes with CUDA and with triton")
    found = rows(Path(library.__file__ or ""))
    path = table(library.build_info()["cuda"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: row[key] for key in FIELDS} for row in found)
    print(f"{len(found)} rows written to {path}")
    if sentences := spilling(found):
        sys.exit("\n".join(sentences))


if __name__ == "__main__":
    main()
