"""gpu_report.sh runs to its end without a GPU, on one family and a few of its tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build

from benchmarks import gpu_summary, report

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"environment.txt", "build.log", "sanitizer.log", "tests.log", "benchmarks.log"}
NAMES |= {"results.csv", "provenance.json", "report.json"}


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    environment = (
        os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    )
    command = ["bash", ROOT / "benchmarks" / "gpu_report.sh", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd="/")


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_without_a_gpu_everything_runs_emulated(tmp_path):
    done = run("-f", "tokens", "-k", "nothing_to_do", tmp_path, EVAKERNELS_COMMIT="a-commit")
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert done.returncode == 0, done.stdout + done.stderr
    assert said.keys() == NAMES
    summary = json.loads(said["report.json"])
    ended = {name: stage["ended"] for name, stage in summary["stages"].items()}
    passed = {name for name, how in ended.items() if how == "passed"}
    assert passed == {"build", "emulator", "tests", "benchmarks"}, "\n".join(said.values())
    assert ended.keys() - passed == {"nvcc", "compute-sanitizer"}
    assert "skipped: there is no GPU" in said["build.log"] and "skipped: there is no GPU" in said["sanitizer.log"]
    assert summary["tests"]["passed"] > 0 and summary["tests"]["failed"] == 0 and summary["emulated"]
    rows = report.read(tmp_path / "results.csv")
    assert {"evakernels", "evakernels, cuda emulated", "torch, index and cat"} <= {r["provider"] for r in rows}
    assert {row["commit"] for row in rows} == {"a-commit"}
    assert summary["benchmarks"]["tokens"]["rows"] == sum(not row["absent"] for row in rows)
    assert json.loads(said["provenance.json"])["tokens"]["copy_gb_s"] > 0


def test_wrong_arguments_are_answered_with_the_usage(tmp_path):
    for arguments in ((), ("-x", tmp_path), (tmp_path, tmp_path)):
        done = run(*arguments)
        assert done.returncode == 2 and "usage" in done.stderr and not any(tmp_path.iterdir())


def test_the_summary_counts_tests_and_stages(tmp_path):
    (tmp_path / "stages").write_text("build\tfailed with status 1\t12\ntests\tstopped after 5 s\t5\n")
    assert gpu_summary.stages(tmp_path / "stages") == {
        "build": {"ended": "failed with status 1", "seconds": 12},
        "tests": {"ended": "stopped after 5 s", "seconds": 5},
    }
    assert gpu_summary.tests(tmp_path / "tests.xml") == {}
    cases = "".join(
        f'<testcase classname="a" name="{n}">{n and f"<{n}/>"}</testcase>' for n in ("", "failure", "skipped")
    )
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = gpu_summary.tests(tmp_path / "tests.xml")
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "names of failed": ["a::failure"]}
