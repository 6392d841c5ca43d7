"""The last step of gpu_report.sh: joins the families' CSV files and says in report.json how every stage ended.

`python -m benchmarks.gpu_summary WORK_FOLDER OUT_FOLDER`
"""

import csv
import json
import shutil
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from benchmarks import harness, report


def stages(path: Path) -> dict[str, dict]:
    """From lines of name, how it ended, seconds."""
    lines = (line.split("\t") for line in path.read_text().splitlines())
    return {name: {"ended": ended, "seconds": int(seconds)} for name, ended, seconds in lines}


def tests(path: Path) -> dict:
    """Counts, and the names of tests that failed, from pytest's JUnit file; empty where there is none."""
    if not path.exists():
        return {}
    cases = list(xml.parse(path).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    return {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped, "names of failed": names}


def benchmarks(rows: report.Rows) -> dict:
    """For each family the cases that were measured, and the providers that were absent, with the first reason."""
    found: dict[str, dict] = {}
    for row in rows:
        family = found.setdefault(row["family"], {"rows": 0, "absent": {}})
        if row["absent"]:
            family["absent"].setdefault(row["provider"], row["absent"])
        else:
            family["rows"] += 1
    return found


def main(work: Path, out: Path) -> None:
    rows = [row for path in sorted((work / "results").glob("*.csv")) for row in report.read(path)]
    if rows:
        with (out / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, harness.FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        shutil.copy(work / "results" / "provenance.json", out)
    summary = {
        "device": harness.device_name(),
        "commit": harness.where_and_when()["commit"],
        "emulated": not harness.torch.cuda.is_available(),
        "stages": stages(work / "stages"),
        "tests": tests(work / "tests.xml"),
        "benchmarks": benchmarks(rows),
    }
    (out / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    summary["tests"].pop("names of failed", None)
    print(json.dumps({name: summary[name] for name in ("device", "commit", "stages", "tests")}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
