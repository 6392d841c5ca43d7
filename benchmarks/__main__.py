"""`python -m benchmarks [--family NAME] [--quick]`: run, print, write the CSV files."""

import argparse
import importlib
import pkgutil
from itertools import groupby

import benchmarks
from benchmarks import harness


def main() -> None:
    families = sorted(
        module.name.removeprefix("bench_")
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if module.name.startswith("bench_")
    )
    parser = argparse.ArgumentParser("python -m benchmarks", description=benchmarks.__doc__)
    parser.add_argument("--family", choices=families, action="append", help="this family alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases; prints, writes no file")
    arguments = parser.parse_args()
    print(harness.device_name())
    for family in arguments.family or families:
        module = importlib.import_module(f"benchmarks.bench_{family}")
        rows = []
        for _, case in groupby(module.rows(arguments.quick), key=lambda r: (r["shape"], r["dtype"], r["mode"])):
            rows.append(list(case))
            harness.show(rows[-1])
        if not arguments.quick:
            print(f"\nwritten to {harness.write([row for case in rows for row in case])}")


if __name__ == "__main__":
    main()
