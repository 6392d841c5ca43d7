"""Configurations are tried in place of the chosen one, and the functions that choose are left as they were."""

import importlib
import inspect
import sys
from types import SimpleNamespace
from typing import NamedTuple, get_type_hints

import pytest
import torch

from benchmarks import harness, tune
from evakernels import dispatch


class Config(NamedTuple):
    rows: int
    warps: int
    stages: int = 1


def test_neighbours_differ_in_one_field_or_two():
    found = tune.neighbours(Config(64, 1, 2), ("rows", "warps", "stages"))
    assert len(found) == len(set(found)) == 2 + 1 + 2 + 2 * 1 + 2 * 2 + 1 * 2  # less than one warp there is not
    assert {Config(32, 1, 2), Config(64, 2, 2), Config(128, 1, 3), Config(64, 2, 1)} <= {*found}
    assert all(sum(a != b for a, b in zip(one, Config(64, 1, 2), strict=True)) in (1, 2) for one in found)


def test_programs_that_go_round_all_rows_are_halved_and_doubled():
    config = SimpleNamespace(grid=(108, 2), _replace=lambda grid: grid)
    assert tune.neighbours(config, ("grid",)) == [(54, 2), (216, 2)]


def test_the_fastest_are_shown_beside_the_chosen(monkeypatch):
    asked, ran = [], []

    def choose(width):
        asked.append(width)
        return Config(64, 4)

    def run():
        ran.append(knob.config(1024))
        if ran[-1].stages > 1:
            raise RuntimeError("out of resources")

    def measure(providers, **_):
        found = {}
        for name, provider in providers.items():
            provider()
            found[name] = harness.Timing([ran[-1].rows + ran[-1].warps])
        return found

    knob = SimpleNamespace(config=choose)
    monkeypatch.setitem(sys.modules, "a_knob", knob)
    monkeypatch.setattr(harness, "measure", measure)
    rows = tune.tried(tune.Knob("a_knob", "config", "forward", Config._fields), "width 1024", run, quick=True)
    assert asked == [1024] and knob.config is choose
    assert [row["provider"] for row in rows] == [
        "chosen: rows 64, warps 4, stages 1",
        "rows 32, warps 2, stages 1",
        "rows 32, warps 4, stages 1",
        "rows 32, warps 8, stages 1",
        "rows 64, warps 2, stages 1",
        "rows 64, warps 8, stages 1",
        "5 others, the first",
    ]
    assert rows[-1]["absent"] == "fails: RuntimeError: out of resources"


def test_what_is_not_asked_is_not_tried(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_knob", SimpleNamespace(config=lambda: Config(64, 4)))
    assert tune.tried(tune.Knob("a_knob", "config", "forward", ("rows",)), "any", lambda: None, quick=True) == []


@pytest.mark.parametrize("family", tune.KNOBS)
def test_every_knob_is_a_function_that_returns_these_fields(family):
    if isinstance(absent := dispatch.implementation(family, "triton"), str):
        pytest.skip(absent)
    for knob in tune.KNOBS[family]:
        function = getattr(importlib.import_module(knob.module), knob.function)
        fields = inspect.get_annotations(get_type_hints(function)["return"])
        assert {*knob.fields} <= fields.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tune", "norm"])
    with pytest.raises(SystemExit, match="there is no GPU here"):
        tune.main()
