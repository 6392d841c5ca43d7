"""Plants bugs in copies of csrc/, one at a time, and expects of each the test that is named beside it to fail.

`python tests/emulator/plant.py [part of a name ...]` takes the bugs of plants.toml, all or those with a part in their
name, and prints for each what caught it. A bug is caught when the test fails by an assertion of its own or by a report
of the emulator, and passes on the sources as they are; a crash, a hang and all else that goes wrong is broken.
"""

import gc
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [] if str(HERE.parent) in sys.path else [str(HERE.parent)]

from emulator import build  # noqa: E402

ROOT = HERE.parents[1]
SECONDS = 120  # for a test, which takes a few
REPORT = re.compile(r"block \(\d|deadlock in block|launch with ")  # so the emulator's begin


@dataclass(frozen=True)
class Plant:
    family: str
    name: str
    file: str  # in csrc/
    old: str
    new: str
    test: str  # in tests/

    def sow(self, csrc: Path) -> Path:
        """A copy of the sources with this bug."""
        shutil.copytree(build.CSRC, csrc)
        text = (csrc / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times, not once: {self.old}")
        (csrc / self.file).write_text(text.replace(self.old, self.new))
        return csrc


def plants() -> list[Plant]:
    families = tomllib.loads((HERE / "plants.toml").read_text())
    return [Plant(family, **plant) for family, those in families.items() for plant in those]


def library(family: str, csrc: Path = build.CSRC) -> Path:
    """The library of one family and, where it can be chosen, of one dtype."""
    defines = ["EVAKERNELS_FEW_KERNELS"]
    for job in build.kernels(family, csrc, True, defines):
        build.compile_object(*job, csrc)  # library() compiles for one caller at a time
    return build.library(csrc=csrc, families=[family], defines=defines)


class Recorder:
    """A pytest plugin: how often a test ran to its end, and the first exception."""

    ran, error = 0, None

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo and not self.error:
            ours = [at for at in call.excinfo.traceback if HERE.parent in at.path.parents]
            place = f" ({ours[-1].path.name}:{ours[-1].lineno + 1})" if ours else ""
            self.error = call.when, call.excinfo.typename, str(call.excinfo.value), place
        self.ran += call.when == "call" and not call.excinfo


def run(library: Path, test: str, log: Path, answer) -> None:
    """In a process of its own: runs a test with a library, and answers (ran, error)."""
    import pytest

    gc.freeze()  # pytest collects garbage, which torch is not
    os.chdir(ROOT)
    os.environ |= {"EVAKERNELS_EMULATED_LIBRARY": str(library), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    recorder = Recorder()
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-x"]
    pytest.main([*options, f"tests/{test}"], plugins=[recorder])
    answer.send((recorder.ran, recorder.error))


def outcome(library: Path, test: str, log: Path) -> tuple[str, str]:
    """passed, failed (by an assertion or a report of the emulator) or BROKEN; and in a line why."""
    receiver, answer = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=run, args=(library, test, log, answer))
    process.start()
    answer.close()
    try:
        if not receiver.poll(SECONDS):
            return "BROKEN", f"no end after {SECONDS} seconds"
        ran, error = receiver.recv()
    except EOFError:
        process.join()
        return "BROKEN", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if error is None:
        last = [line for line in log.read_text().splitlines() if line][-1:]
        return ("passed", "") if ran == 1 else ("BROKEN", f"{ran} tests ran: {''.join(last)}")
    when, kind, words, place = error
    reported = kind == "RuntimeError" and REPORT.match(words)
    first = words.partition("\n")[0] + place
    checked = reported or (kind == "AssertionError" and when != "setup")
    return ("failed", first) if checked else ("BROKEN", f"{kind} in {when}: {first}")


def verdict(plant: Plant, healthy: Future, folder: Path) -> tuple[str, str]:
    try:
        if (found := healthy.result())[0] != "passed":
            return "BROKEN", f"without the bug, {plant.test} has {' '.join(found)}"
        kind, words = outcome(library(plant.family, plant.sow(folder / "csrc")), plant.test, folder / "log")
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()
        return "BROKEN", next((line for line in lines if " error: " in line), lines[0])
    return {"failed": "caught", "passed": "MISSED"}.get(kind, kind), words


def main(parts: list[str]) -> int:
    if why := build.missing():
        print(why)
        return 1
    chosen = [p for p in plants() if not parts or any(part in f"{p.family}: {p.name}" for part in parts)]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        # In this order, so that none waits for one that has not begun.
        libraries = {family: pool.submit(library, family) for family in dict.fromkeys(p.family for p in chosen)}

        def check(plant: Plant, log: Path) -> tuple[str, str]:
            return outcome(libraries[plant.family].result(), plant.test, log)

        tests = {p.test: p for p in chosen}
        healthy = {test: pool.submit(check, p, Path(work, f"log{i}")) for i, (test, p) in enumerate(tests.items())}
        found = [pool.submit(verdict, p, healthy[p.test], Path(work, str(i))) for i, p in enumerate(chosen)]
        caught = 0
        for plant, future in zip(chosen, found, strict=True):
            kind, words = future.result()
            caught += kind == "caught"
            print(f"{kind}  {plant.family}: {plant.name}: {words}", flush=True)
    print(f"caught {caught} of {len(chosen)}")
    return int(not 0 < caught == len(chosen))


# Each test runs in a fork of a process that has imported what takes long, and has run nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch", "evakernels"])

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
