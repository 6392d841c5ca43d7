"""Builds the compiled library to be emulated on the CPU: csrc/ and the emulator, with g++, without nvcc or a GPU.

`python tests/emulator/build.py [family ...]` prints the path of the library. Objects and libraries are cached in
`tests/emulator/build/`, by what they are made from.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE / "build"
EMULATOR = ("scheduler.cpp", "ampere.cpp", "checks.cpp")
CHECKED = ("-fsanitize=thread,alignment,bounds", "--param=tsan-instrument-func-entry-exit=0")
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type")
TRACED = ("-g1", "-fno-omit-frame-pointer")  # an error names the line, and its callers


def missing() -> str | None:
    """What this machine lacks to build the emulated library, in a sentence; None when it lacks nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator runs on x86-64 Linux alone"
    if shutil.which("g++") is None:
        return "the emulated library is built with g++, which is not on PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulated library needs pybind11; install it with `pip install pybind11`"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the emulated library needs Python.h; install the development package of Python"
    if cuda_include() is None:
        return (
            "the emulated library needs the headers of CUDA; set CUDA_HOME to a CUDA 13 toolkit, or `pip install "
            "nvidia-cuda-runtime==13.* nvidia-cuda-crt==13.* nvidia-cuda-cccl==13.*`"
        )
    return None


@functools.cache
def cuda_include() -> Path | None:
    """The folder with CUDA's headers: of a toolkit, or of NVIDIA's three header wheels."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    wheels = importlib.util.find_spec("nvidia")
    homes += [Path(site) / "cu13" for site in (wheels.submodule_search_locations or [] if wheels else [])]
    for include in (Path(home) / "include" for home in homes if home):
        needed = ("cuda_fp16.h", "cuda_bf16.h", "vector_functions.h", "crt/host_defines.h", "cuda_runtime_api.h")
        target = (include / "nv/target", include / "cccl/nv/target")
        if all((include / name).is_file() for name in needed) and any(path.is_file() for path in target):
            return include
    return None


@functools.cache
def cuda_version() -> str:
    include = cuda_include()
    assert include is not None
    number = int(re.findall(r"#define CUDART_VERSION\s+(\d+)", (include / "cuda_runtime_api.h").read_text())[0])
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def machine_flags() -> tuple[str, ...]:
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    return ("-march=x86-64-v3",) if {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"} <= flags else ()


@functools.cache
def compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def kernel_flags(checked: bool) -> list[str]:
    """Flags for a source with kernels; like nvcc, without strict aliasing and with fused multiply-adds."""
    flags = [
        "-O1",
        *TRACED,
        "-fno-strict-aliasing",
        "-ffp-contract=fast",
        "-Wno-unknown-pragmas",
        "-DEVAKERNELS_EMULATED",
    ]
    return [*COMMON, *flags, *machine_flags(), *(CHECKED if checked else ()), *cuda_flags()]


def emulator_flags() -> list[str]:
    return [*COMMON, "-O2", *TRACED, "-fno-strict-aliasing", *machine_flags(), "-DEVAKERNELS_EMULATED", *cuda_flags()]


def binding_flags() -> list[str]:
    import pybind11

    return [*COMMON, "-O0", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]


def cuda_flags() -> list[str]:
    include = cuda_include()
    assert include is not None, missing()
    return ["-isystem", str(include), "-isystem", str(include / "cccl")]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def included(source: Path, folders: Iterable[Path]) -> dict[Path, None]:
    """A source and every file that it includes with quotes, in order."""
    found: dict[Path, None] = {}
    todo = [source]
    while todo:
        if (path := todo.pop()) in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            todo += [there for folder in (path.parent, *folders) if (there := (folder / name).resolve()).is_file()][:1]
    return found


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def digest(*parts: str | bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()[:20]


def compile_object(source: Path, flags: list[str], csrc: Path = CSRC) -> Path:
    """The object of a source, from the cache where nothing that it is made from has changed."""
    folders = [csrc, HERE]
    files = [part for path in included(source, folders) for part in (path.name, path.read_bytes())]
    target = (
        BUILD / f"{source.parent.name}-{source.stem}-{digest(compiler_version(), cuda_version(), *flags, *files)}.o"
    )
    if target.exists():
        target.touch()
        return target
    BUILD.mkdir(exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    search = [option for folder in folders for option in ("-I", str(folder))]
    run(["g++", *flags, *search, "-x", "c++", "-c", str(source), "-o", str(part)])
    part.rename(target)
    return target


def link(name: str, jobs: list[tuple[Path, list[str]]], csrc: Path = CSRC) -> Path:
    """A shared library of sources with their flags, called `name`, in a folder of its own."""
    with locked(BUILD):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: compile_object(*job, csrc), jobs))
        target = BUILD / digest(*(path.name for path in objects)) / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            part = target.with_suffix(".part")
            # No sanitizer here: checks.cpp has the functions that the instrumented kernels call.
            run(["g++", "-shared", "-pthread", "-Wl,-z,now", *map(str, objects), "-ldl", "-o", str(part)])
            part.rename(target)
            forget()
        target.touch()
    return target


def forget(days: float = 2) -> None:
    """Removes what nobody has asked for of late."""
    for path in list(BUILD.rglob("*.*o")):
        if path.stat().st_mtime < time.time() - days * 86400:
            path.unlink()
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()


def emulator() -> list[tuple[Path, list[str]]]:
    return [(HERE / name, emulator_flags()) for name in EMULATOR]


def kernels(family: str, csrc: Path, checked: bool, defines: Iterable[str] = ()) -> list[tuple[Path, list[str]]]:
    flags = [*kernel_flags(checked), *(f"-D{define}" for define in defines)]
    return [(path, flags) for path in sorted((csrc / family).glob("*.cu"))]


def library(
    checked: bool = True, csrc: Path = CSRC, families: Iterable[str] | None = None, defines: Iterable[str] = ()
) -> Path:
    """Build the library whose kernels run on the CPU, where it is not built already.

    Args:
        checked: every memory access of the kernels is checked, at about half the speed.
        csrc: the sources; a changed copy shares the objects of what it did not change.
        families: those of `csrc/<family>/bindings.cpp` to build; by default, all.
        defines: macros for the sources with kernels.

    Raises:
        RuntimeError: something is `missing()`, or a source does not compile; the message has the compiler's words.
    """
    if why := missing():
        raise RuntimeError(why)
    csrc = Path(csrc).resolve()
    names = sorted(families if families is not None else (path.parent.name for path in csrc.glob("*/bindings.cpp")))
    facts = {
        "CUDA": f'"{cuda_version()}"',
        "ARCHITECTURES": '"emulated"',
        "FAMILIES": " ".join(f"FAMILY({name})" for name in names),
    }
    top = [*binding_flags(), "-DEVAKERNELS_EMULATED", *(f"-DEVAKERNELS_{k}={v}" for k, v in facts.items())]
    jobs = [(csrc / "bindings.cpp", top), *emulator()]
    for name in names:
        jobs += [(csrc / name / "bindings.cpp", binding_flags()), *kernels(name, csrc, checked, defines)]
    return link(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", jobs, csrc)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the emulated library and print its path.")
    parser.add_argument("families", nargs="*", help="families of csrc/ to build; by default, all")
    parser.add_argument("--plain", action="store_true", help="without the checks of memory accesses")
    parser.add_argument("--csrc", type=Path, default=CSRC, help="the folder of sources")
    given = parser.parse_args()
    print(library(not given.plain, given.csrc, given.families or None))
