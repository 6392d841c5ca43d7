"""Results as JSON and as tables."""

import io
import json
import sys

import pytest

from evaclip.evaluate import print_results, table, write_json

RESULTS = {
    "digits": {"top1": 0.94, "top5": 0.9996, "samples": 1000},
    "flickr": {"mean_recall": 1 / 3, "samples": 50000},
}


def test_json_holds_every_value_unrounded(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(RESULTS, path)
    assert json.loads(path.read_text()) == RESULTS


def test_the_table_shows_shares_in_percent_and_counts_as_they_are():
    assert table(RESULTS).splitlines() == [
        "          top1     top5  samples  mean_recall",
        "------  ------  -------  -------  -----------",
        "digits  94.0 %  100.0 %    1,000            -",
        "flickr       -        -   50,000       33.3 %",
    ]


@pytest.mark.parametrize("rich", [True, False])
def test_printing_works_with_and_without_rich(rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    out = io.StringIO()
    print_results(RESULTS, title="Evaluation", file=out)
    for piece in ("Evaluation", "digits", "94.0 %", "1,000", "33.3 %", "mean_recall"):
        assert piece in out.getvalue()
    assert ("─" in out.getvalue()) == rich
