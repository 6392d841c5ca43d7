"""Tables and plots say what the CSV files say, and nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import harness, report

ROWS = [
    *(("norm, 8 rows", "forward", "evakernels", 100.0, 0.8), ("norm, 8 rows", "forward", "torch", 150.0, 0.5333)),
    *(("norm, 8 rows", "backward", "evakernels", 2000.0, 0.5), ("norm, 8 rows", "backward", "apex", "", "")),
    ("norm, 8 rows", "backward", "torch", 1000.0, 1.0),
]
PAGE = "Measured:\n\n<!-- results:norm -->\nold\n<!-- /results -->\n\nand more\n"


def rows(**changes) -> list[dict]:
    common = dict.fromkeys(harness.FIELDS, "") | {
        "family": "norm",
        "device": "Some GPU",
        "torch": "2.13",
        "commit": "c0",
    }
    names = ("shape", "mode", "provider", "p50_us", "share_of_clone")
    return [common | dict(zip(names, row, strict=True)) | changes for row in ROWS]


@pytest.fixture
def root(tmp_path):
    harness.write(rows(), tmp_path / "benchmarks" / "results" / "some-gpu")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "norm.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("<!-- results:summary -->\n<!-- /results -->\n")
    return tmp_path


def test_the_tables_in_the_project_are_up_to_date():
    stale = [path for path, text in report.pages(report.ROOT).items() if path.read_text() != text]
    assert not stale, "run `python -m benchmarks.report`"


def test_a_table_has_medians_ratios_shares_floors_and_the_absent(root):
    report.main([], root)
    lines = (root / "docs" / "norm.md").read_text().splitlines()
    assert "| norm, 8 rows, forward | 80.0 us | 100 us (80%) | 150 us (1.5 x) |" in lines
    assert "| norm, 8 rows, backward | 1.00 ms | 2.00 ms (50%) | 1.00 ms (0.5 x) |" in lines
    assert "Absent: apex." in lines and "old" not in lines and lines[-1] == "and more"
    assert "**Some GPU**, torch 2.13, commit c0:" in lines
    assert "| Some GPU | norm | forward | 80% | 1.50 |" in (root / "README.md").read_text()
    assert "| Some GPU | norm | backward | 50% | 0.50 |" in (root / "README.md").read_text()


def test_floors_that_are_no_copys_stand_beside_it():
    by_device = {"some-gpu": rows(family="attention", products_us=43.49, exps_us="")}
    text = report.family_text("attention", {name: text_of(found) for name, found in by_device.items()}, "")
    assert "Floors, in this order: bytes / copy rate, padded products / mma.sync rate." in text
    assert "| norm, 8 rows, forward | 80.0 us / 43.5 us | 100 us (80%) | 150 us (1.5 x) |" in text


def text_of(found: list[dict]) -> list[dict[str, str]]:
    return [{field: str(value) for field, value in row.items()} for row in found]


def test_memory_is_shown_as_memory():
    case = {"shape": "batch 8", "mode": "step, memory above the inputs", "dtype": "float32", "share_of_clone": ""}
    ours = dict.fromkeys(harness.FIELDS, "") | case | {"provider": "ours", "p50_us": "5", "peak_mb": "119.7"}
    theirs = ours | {"provider": "theirs", "p50_us": "nan", "peak_mb": "17334.8"}
    assert report.table([ours, theirs])[-1] == "| batch 8 | 120 MB | 17335 MB, not run |"


def test_a_second_run_changes_nothing_and_a_new_figure_fails_the_check(root):
    with pytest.raises(SystemExit, match=r"out of date: README.md, docs/norm.md"):
        report.main(["--check"], root)
    report.main([], root)
    files = [root / "docs" / "norm.md", root / "README.md", root / "benchmarks" / "results" / "some-gpu" / "norm.png"]
    before = [path.read_bytes() for path in files]
    report.main([], root)
    assert [path.read_bytes() for path in files] == before
    with pytest.raises(SystemExit) as left:
        report.main(["--check"], root)
    assert left.value.code == 0
    harness.write(rows(p50_us=7.0), root / "benchmarks" / "results" / "some-gpu")
    with pytest.raises(SystemExit, match=r"out of date: README.md, docs/norm.md"):
        report.main(["--check"], root)


def test_a_mark_without_results_is_an_error(root):
    (root / "docs" / "lamb.md").write_text("<!-- results:lamb -->\n<!-- /results -->\n")
    with pytest.raises(SystemExit, match=r"no benchmarks/results/\*/lamb.csv"):
        report.main(["--check"], root)


@pytest.mark.parametrize(
    ("us", "text"),
    [
        *((0.0, "0.00 us"), (0.123, "0.12 us"), (-3.21, "-3.21 us"), (9.876, "9.88 us"), (45.67, "45.7 us")),
        *((999.4, "999 us"), (999.7, "1.00 ms"), (386_440.0, "386 ms"), (6.55e6, "6.55 s"), (65.5e6, "65.5 s")),
    ],
)
def test_times_have_three_figures(us, text):
    assert report.figures(us) == text


def test_results_of_another_machine_are_taken_over(root, tmp_path):
    out = tmp_path / "out"
    taken = [row | {"device": "NVIDIA H200"} for row in rows()] + rows(family="lamb", device="NVIDIA H200")
    harness.write(taken, out).rename(out / "results.csv")
    (out / "provenance.json").write_text(json.dumps({"norm": {"date": "today"}, "lamb": {"date": "now"}}))
    into = root / "benchmarks" / "results" / "nvidia-h200"
    into.mkdir()
    (into / "provenance.json").write_text(json.dumps({"tokens": {"date": "before"}}))
    report.main(["--take", str(out)], root)
    assert sorted(path.name for path in into.iterdir()) == [
        *("lamb.csv", "lamb.png", "norm.csv", "norm.png", "provenance.json"),
    ]
    assert json.loads((into / "provenance.json").read_text()).keys() == {"tokens", "norm", "lamb"}
    assert len(report.read(into / "lamb.csv")) == len(ROWS)
    assert "**NVIDIA H200**" in Path(root / "docs" / "norm.md").read_text()


def test_times_of_emulated_kernels_are_not_taken_over(root, tmp_path):
    out = tmp_path / "out"
    harness.write(rows(provider="evakernels, cuda emulated"), out).rename(out / "results.csv")
    (out / "provenance.json").write_text("{}")
    with pytest.raises(SystemExit, match="emulated"):
        report.main(["--take", str(out)], root)
