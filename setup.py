"""Builds the compiled library with CMake where nvcc is found; everything else is in pyproject.toml.

| variable | meaning |
|---|---|
| EVAKERNELS_SKIP_CUDA=1 | do not build the compiled library |
| EVAKERNELS_ARCHITECTURES | CMake's CUDA architectures, default "80-real;90-real;80-virtual" |
| CUDA_HOME, CUDACXX | where nvcc is, when it is not on PATH |
| MAX_JOBS | parallel compilations, default: one per core |
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return os.environ.get("CUDACXX") or (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def run(command: list[str]) -> None:
    if code := subprocess.run(command).returncode:
        sys.exit(
            f"evakernels: {' '.join(command[:2])} failed with status {code}, see above. "
            "EVAKERNELS_SKIP_CUDA=1 installs without the compiled library."
        )


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Not build_temp, which is new for every editable install: kernels that have not changed stay compiled.
        build = Path("build", sys.implementation.cache_tag).resolve()
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if architectures := os.environ.get("EVAKERNELS_ARCHITECTURES"):
            options.append(f"-DEVAKERNELS_ARCHITECTURES={architectures}")
        # pip runs in a new environment each time; the cache names tools of the last one, which are gone.
        options += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", "-Upybind11_DIR"]
        run(["cmake", "-S", ".", "-B", str(build), "-G", "Ninja", *options])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run(["cmake", "--build", str(build), "--parallel", jobs])


skip = os.environ.get("EVAKERNELS_SKIP_CUDA") == "1"
if skip or not find_nvcc():
    why = "EVAKERNELS_SKIP_CUDA=1 is set" if skip else "nvcc was not found"
    print(f"evakernels: {why}; installing without the compiled library (see `python -m evakernels`)", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[Extension("evakernels._native", [])], cmdclass={"build_ext": CMakeBuild})
