"""Finds and loads the compiled library; `load(path)` loads one that declares its device."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

MODULE = "evakernels._native"


def library() -> ModuleType | None:
    """The compiled library of this installation; None where none was built."""
    return importlib.import_module(MODULE) if importlib.util.find_spec(MODULE) else None


def status() -> str:
    """One sentence about the compiled library, for people."""
    try:
        found = library()
    except ImportError as error:
        return f"built, but does not load: {error}"
    if found is None:
        return (
            "not built (no nvcc when evakernels was installed, or EVAKERNELS_SKIP_CUDA=1); "
            "install the CUDA toolkit and reinstall with `pip install --force-reinstall --no-deps .`"
        )
    info = found.build_info()
    families = ", ".join(info["families"]) or "none yet"
    return f"built with CUDA {info['cuda']} for {info['architectures']}; families: {families}"


def load(path: str | Path) -> ModuleType:
    """Load a compiled library from a file.

    Args:
        path: a shared library with the bindings of `csrc/bindings.cpp`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is no library of evakernels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"native.load: {path} is no file; give the path of a compiled evakernels library")
    spec = importlib.util.spec_from_file_location("_native", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"native.load: {path} is no Python extension module (its name must end in .so or .pyd)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "build_info"):
        raise ImportError(f"native.load: {path} has no build_info(), so it is no library of evakernels")
    return module
