"""`python -m benchmarks.report`: plots and tables from benchmarks/results/*/*.csv. Nobody types a figure.

Tables go between `<!-- results:FAMILY -->` and `<!-- /results -->` in README.md and docs/*.md; FAMILY may be `summary`.
"""

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import FIELDS, FLOORS, slug, write

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
YARDSTICKS = ("torch AdamW, fused",)  # beside the peers, but not of the same work
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """The rows of a CSV file; a column that it lacks is empty."""
    with path.open(newline="") as file:
        return [dict.fromkeys(FIELDS, "") | row for row in csv.DictReader(file)]


def measured(results: Path) -> dict[str, dict[str, Rows]]:
    """Rows by family and, within it, by the folder of the device."""
    found: dict[str, dict[str, Rows]] = {}
    for path in sorted(results.glob("*/*.csv")):
        found.setdefault(path.stem, {})[path.parent.name] = read(path)
    return found


def in_order(values: Iterable) -> list:
    """Each value once, in the order in which it came first."""
    return list(dict.fromkeys(values))


def figures(us: float) -> str:
    """A time to three figures."""
    for unit, size in (("us", 1e3), ("ms", 1e6), ("s", math.inf)):
        if abs(us) < size * 0.9995:
            value = us / {"us": 1, "ms": 1e3, "s": 1e6}[unit]
            places = max(0, 2 - math.floor(math.log10(abs(value)))) if abs(value) >= 0.01 else 2
            return f"{value:.{min(places, 2)}f} {unit}"
    raise ValueError(us)


def number(text: str) -> float:
    """NaN where nothing was measured."""
    return float(text) if text else math.nan


def memory_alone(row: dict[str, str]) -> bool:
    return "memory" in row["mode"]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(rows: Rows) -> list[str]:
    """Cases down, providers across: the median, and how many times that of the case's first provider it is.

    Cases that measure memory have their peak instead, those of training also how many samples a second there are. The
    first provider also says which share of a copy, or of a matrix product, it reaches, and a column before it the
    floor, in the time of a copy, and those of `harness.FLOORS` that are known.
    """
    cases: dict[tuple, dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["shape"], row["mode"], row["dtype"]), {})[row["provider"]] = row
    names = in_order(row["provider"] for row in rows)
    known = [name for name in names if any(present(found.get(name)) for found in cases.values())]
    several = [len({case[i] for case in cases}) > 1 for i in (1, 2)]
    floors = any(floors_of(row) for row in rows)
    lines = [line(["", *(["floor"] if floors else []), *known]), line(["---", *["---:"] * (len(known) + floors)])]
    for case, found in cases.items():
        label = ", ".join([case[0], *(text for text, needed in zip(case[1:], several, strict=True) if needed)])
        cells, first = [], next((row for row in found.values() if present(row)), None)
        if first is None:
            continue
        if floors:
            cells.append(" / ".join(figures(us) for us in floors_of(first).values()))
        for name in known:
            cells.append(cell(found.get(name), first))
        lines.append(line([label, *cells]))
    missing = [name for name in names if name not in known]
    return lines + (["", f"Absent: {', '.join(missing)}."] if missing else [])


def floors_of(row: dict[str, str]) -> dict[str, float]:
    """What is known of the floors, in microseconds, by what they are."""
    copy = number(row["p50_us"]) * number(row["share_of_clone"])
    times = {what: copy if field == "floor_us" else number(row[field]) for field, what in FLOORS.items()}
    return {what: us for what, us in times.items() if not math.isnan(us)}


def present(row: dict[str, str] | None) -> bool:
    return row is not None and bool(row["peak_mb"] if memory_alone(row) else row["p50_us"])


def cell(row: dict[str, str] | None, first: dict[str, str]) -> str:
    if row is None or not present(row):
        return ""
    if memory_alone(row):
        return f"{number(row['peak_mb']):.0f} MB{'' if number(row['p50_us']) > 0 else ', not run'}"
    time = figures(number(row["p50_us"]))
    if row["samples_per_s"]:
        time += f", {number(row['samples_per_s']):.3g}/s"
    if row is first:
        share = row["share_of_clone"] or row["share_of_matmul"]
        return f"{time} ({number(share):.0%})" if share else time
    return f"{time} ({number(row['p50_us']) / number(first['p50_us']):.1f} x)"


def family_text(family: str, by_device: dict[str, Rows], up: str) -> str:
    """What stands between a family's marks: for each device where, when, plot and tables; `up` leads to the root."""
    of = "a matrix product" if any(row["share_of_matmul"] for rows in by_device.values() for row in rows) else "a copy"
    lines = [f"In parentheses: the share of {of}'s rate, and other columns' times in those of the first."]
    known = in_order(what for rows in by_device.values() for row in rows for what in floors_of(row))
    if len(known) > 1:
        lines.append(f"Floors, in this order: {', '.join(known)}.")
    for folder, rows in by_device.items():
        here, first = f"{up}benchmarks/results/{folder}/{family}", rows[0]
        driver = f", driver {first['driver']}" if first["driver"] else ""
        lines += ["", f"**{first['device']}**{driver}, torch {first['torch']}, commit {first['commit']}:"]
        lines += [f"[figures]({here}.csv), [plot]({here}.png)."]
        for part in (False, True):
            if kept := [row for row in rows if memory_alone(row) == part]:
                lines += ["", *table(kept)]
    return "\n".join(["", *lines, "", ""])


def summary_text(found: dict[str, dict[str, Rows]]) -> str:
    """For each device, family and mode: the share of a copy and the best peer's time over ours, lowest to highest."""
    lines = [line(["device", "family", "mode", "share of a copy", "best peer's time / ours"])]
    lines.append(line(["---", "---", "---", "---:", "---:"]))
    for family, by_device in found.items():
        for rows in by_device.values():
            timed = [row for row in rows if row["p50_us"] and not memory_alone(row)]
            for mode in in_order(row["mode"] for row in timed):
                cases: dict[tuple, Rows] = {}
                for row in timed:
                    if row["mode"] == mode:
                        cases.setdefault((row["shape"], row["dtype"]), []).append(row)
                shares, ratios = [], []
                for case in cases.values():
                    own = next((row for row in case if row["provider"] == "evakernels"), None)
                    peers = [row for row in case if not row["provider"].startswith(("evakernels", *YARDSTICKS))]
                    if own and own["share_of_clone"]:
                        shares.append(number(own["share_of_clone"]))
                    if own and peers:
                        ratios.append(min(number(row["p50_us"]) for row in peers) / number(own["p50_us"]))
                if ratios:
                    lines.append(line([rows[0]["device"], family, mode, span(shares, ".0%"), span(ratios, ".2f")]))
    return "\n".join(["", *lines, "", ""])


def span(values: list[float], form: str) -> str:
    if not values:
        return ""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def pages(root: Path) -> dict[Path, str]:
    """The pages that have marks, with their tables as the results say."""
    found = measured(root / "benchmarks" / "results")

    def replaced(path: Path) -> str:
        def text(match: re.Match) -> str:
            family = match[2]
            if family == "summary":
                return match[1] + summary_text(found) + match[3]
            if family not in found:
                raise SystemExit(f"results:{family} in {path}: there is no benchmarks/results/*/{family}.csv")
            return match[1] + family_text(family, found[family], "" if path.parent == root else "../") + match[3]

        return MARKED.sub(text, path.read_text())

    candidates = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return {path: replaced(path) for path in candidates if MARKED.search(path.read_text())}


def plot(rows: Rows, path: Path) -> None:
    """Bars of every case and provider: the share of a copy where the floor is in bytes, else the time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["p50_us"] and row["p50_us"] != "nan" and not memory_alone(row)]
    providers = in_order(row["provider"] for row in rows)
    modes = in_order(row["mode"] for row in rows)
    tallest = max(len({row["shape"] for row in rows if row["mode"] == mode}) for mode in modes)
    size = (6 * len(modes) + 3, 1.5 + tallest * (0.4 + 0.12 * len(providers)))
    figure, axes = pyplot.subplots(1, len(modes), figsize=size, squeeze=False, layout="constrained")
    shares = all(row["share_of_clone"] for row in rows)
    for axis, mode in zip(axes[0], modes, strict=True):
        here = [row for row in rows if row["mode"] == mode]
        shapes = in_order(row["shape"] for row in here)
        for i, name in enumerate(providers):
            own = {row["shape"]: row for row in here if row["provider"] == name}
            at = [y + 0.8 * (i + 0.5) / len(providers) - 0.4 for y, shape in enumerate(shapes) if shape in own]
            field = "share_of_clone" if shares else "p50_us"
            lengths = [number(own[shape][field]) for shape in shapes if shape in own]
            if lengths:
                axis.barh(at, lengths, 0.8 / len(providers), label=name, color=f"C{i}")
        axis.set_yticks(range(len(shapes)), shapes, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(mode, fontsize=9)
        axis.set_xlabel("share of what a copy reaches" if shares else "microseconds")
        if shares:
            axis.axvline(1, color="grey", linewidth=0.5)
        else:
            axis.set_xscale("log")
    handles = {name: bar for axis in axes[0] for bar, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(f"{rows[0]['family']}: {rows[0]['device']}", fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})  # the same bytes at every repetition
    pyplot.close(figure)


def take(folder: Path, results: Path) -> list[Path]:
    """Sort what gpu_report.sh has written into results/<device>/, and return the paths."""
    rows = read(folder / "results.csv")
    provenance = json.loads((folder / "provenance.json").read_text())
    if any("emulated" in row["provider"] for row in rows):
        raise SystemExit(f"{folder} has times of emulated kernels, which are no results")
    written = []
    for family in in_order(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        into = results / slug(own[0]["device"])
        written.append(write(own, into))
        kept = into / "provenance.json"
        known = json.loads(kept.read_text()) if kept.exists() else {}
        kept.write_text(json.dumps(known | {family: provenance[family]}, indent=1, sort_keys=True) + "\n")
    return written


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a table is out of date")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="first take over what gpu_report.sh wrote there")
    given = parser.parse_args(arguments)
    results = root / "benchmarks" / "results"
    if given.take:
        for path in take(given.take, results):
            print(path)
    stale = {path: text for path, text in pages(root).items() if path.read_text() != text}
    if given.check:
        names = ", ".join(str(path.relative_to(root)) for path in stale)
        sys.exit(f"out of date: {names}; run `python -m benchmarks.report`" if stale else 0)
    for path, text in stale.items():
        path.write_text(text)
        print(path)
    for family, by_device in measured(results).items():
        for folder, rows in by_device.items():
            plot(rows, results / folder / f"{family}.png")


if __name__ == "__main__":
    main()
