"""`python -m benchmarks [--family NAME] [--quick] [--out FOLDER]`: run, print, write the CSV files."""

import argparse
import importlib
import pkgutil
import sys
from itertools import groupby
from pathlib import Path

import benchmarks
from benchmarks import harness, roofline
from evakernels import native

END_TO_END = "end_to_end"  # the one that is no family's


def main() -> None:
    names = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
    families = sorted(name.removeprefix("bench_") for name in names if name.startswith("bench_") or name == END_TO_END)
    parser = argparse.ArgumentParser("python -m benchmarks", description=benchmarks.__doc__)
    parser.add_argument("--family", choices=families, action="append", help="this family alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases; writes no file without --out")
    parser.add_argument("--out", type=Path, help="folder for the files, instead of benchmarks/results/<device>")
    parser.add_argument("--library", type=Path, help="a compiled library to load first, such as an emulated one")
    given = parser.parse_args()
    if given.library:
        native.load(given.library)
        if harness.emulated() and not given.quick:
            parser.error("an emulated library is slow, and its times are no results: add --quick")
    found = roofline.ceilings(given.quick)
    print("device")
    roofline.show(found)
    failed = []
    for family in given.family or families:
        rows: list[dict] = []
        # A run that is interrupted keeps the cases before.
        for case in cases(family, given.quick):
            harness.show(case)
            rows += case
            if given.out or not given.quick:
                path = harness.write(rows, given.out)
                roofline.record(path.parent, family, found)
        if given.out or not given.quick:
            print(f"\nwritten to {path}")
        failed += [row for row in rows if row["absent"].startswith(harness.FAILS)]
    if failed:
        print("\nfailed")
        for row in failed:
            print(f"  {row['family']}, {row['shape']}, {row['mode']}: {row['provider']} {row['absent']}")
        sys.exit(1)


def cases(family: str, quick: bool):
    """The rows of each case of a family."""
    module = importlib.import_module(f"benchmarks.{family}" if family == END_TO_END else f"benchmarks.bench_{family}")
    for _, rows in groupby(module.rows(quick), key=lambda r: (r["shape"], r["dtype"], r["mode"])):
        yield list(rows)


if __name__ == "__main__":
    main()
