"""Times the neighbours of the configurations that Triton kernels choose, on the GPU that is there.

`python -m benchmarks.tune [--quick] FAMILY` prints, for each configuration function and case, the chosen configuration
and the fastest of those that differ from it in one field or two. They take turns, so that their ratios hold.
"""

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch

import evakernels as ek
from benchmarks import bench_attention, bench_norm, bench_swiglu, harness

SHOWN = 5
BF16 = torch.bfloat16


class Knob(NamedTuple):
    """A configuration function: of which passes, and which fields of what it returns are tried otherwise.

    Of the row kernels' tiles, rows and columns are given by the width and the grid.
    """

    module: str
    function: str
    mode: str
    fields: tuple[str, ...]


ROWS = (
    Knob("evakernels.ops.rows", "forward_tiles", "forward", ("warps",)),
    Knob("evakernels.ops.rows", "backward_tiles", "backward", ("warps", "stages", "grid")),
)
ELEMENTS = (Knob("evakernels.ops.rows", "element_tiles", "forward", ("warps",)),)
ATTENTION, TILE = "evakernels.ops.attention.triton", ("queries", "keys", "warps", "stages")
KNOBS = {
    "attention": (
        Knob(ATTENTION, "forward_plan", "forward", TILE),
        Knob(ATTENTION, "queries_plan", "backward", TILE),
        Knob(ATTENTION, "keys_plan", "backward", TILE),
    ),
    "norm": ROWS,
    "swiglu": ROWS + ELEMENTS,
    "contrastive": (
        Knob("evakernels.ops.contrastive.triton", "config", "both", ("rows", "columns", "k", "warps", "stages")),
    ),
}


def cases(family: str) -> Iterator[tuple[str, Callable, Callable[[], tuple]]]:
    """What it is, a function, and what makes a set of its inputs."""
    if family == "norm":
        for function, width in [("layer_norm", 2730), *(("add_norm", n) for n in bench_norm.WIDTHS["add_norm"])]:
            make = partial(bench_norm.inputs, function, bench_norm.ROWS, width, BF16)
            yield f"{function}, width {width}", bench_norm.ours(function), make
    elif family == "swiglu":
        for function, width in bench_swiglu.CASES:
            make = partial(bench_swiglu.inputs, function, bench_swiglu.ROWS, width, BF16)
            yield f"{function}, width {width}", bench_swiglu.ours(function, width), make
    elif family == "attention":
        for case in bench_attention.CASES:
            yield str(case), bench_attention.ours(case), partial(bench_attention.inputs, case, BF16)
    else:
        for batch, width in ((4096, 512), (16384, 1024)):
            features = partial(torch.randn, batch, width, device=harness.device(), dtype=BF16)
            yield f"batch {batch}, width {width}", losses, lambda new=features: (new(), new())


def losses(image: torch.Tensor, text: torch.Tensor) -> tuple:
    """The loss and its gradients: of what is computed, the larger part is done forward."""
    image, text = (torch.nn.functional.normalize(x, dim=1).requires_grad_() for x in (image, text))
    return torch.autograd.grad(ek.contrastive_loss(image, text, 100.0)[0], (image, text))


def neighbours(config, fields: tuple[str, ...]) -> list:
    """Configurations that differ in one of these fields or in two: the half or the double, a stage less or more."""

    def near(field: str) -> list:
        value = getattr(config, field)
        if field == "grid":  # as many programs go round all rows
            return [(max(1, value[0] // 2), *value[1:]), (2 * value[0], *value[1:])]
        return [n for n in ((value - 1, value + 1) if field == "stages" else (value // 2, 2 * value)) if n]

    found = []
    for some in itertools.chain(itertools.combinations(fields, 1), itertools.combinations(fields, 2)):
        for values in itertools.product(*map(near, some)):
            one = config._replace(**dict(zip(some, values, strict=True)))
            found += [one] if one != config and one not in found else []
    return found


def chosen(module: ModuleType, function: str, run: Callable[[], object]):
    """The first configuration that a function returns while something runs, or None where it is not asked."""
    asked: list = []
    original = getattr(module, function)
    answering(module, function, lambda *args: asked.append(original(*args)) or asked[-1], run)()
    return asked[0] if asked else None


def answering(module: ModuleType, function: str, answer: Callable, run: Callable[[], object]) -> Callable[[], object]:
    """Calls `run` while a configuration function is another."""

    def call() -> object:
        original = getattr(module, function)
        setattr(module, function, answer)
        try:
            return run()
        finally:
            setattr(module, function, original)

    return call


def tried(knob: Knob, shape: str, run: Callable[[], object], quick: bool) -> list[dict]:
    """Rows of the chosen configuration, of the fastest others, and one for all that do not run."""
    module = importlib.import_module(knob.module)
    config = chosen(module, knob.function, run)
    if config is None:
        return []
    providers: harness.Providers = {
        said(one, knob.fields): answering(module, knob.function, lambda *_, one=one: one, run)
        for one in (config, *neighbours(config, knob.fields))
    }
    first, *others = harness.compare("tune", f"{knob.function}, {shape}", BF16, knob.mode, providers, quick=quick)
    ran = sorted((row for row in others if not row["absent"]), key=lambda row: row["p50_us"])
    failed = [row for row in others if row["absent"]]
    last = [failed[0] | {"provider": f"{len(failed)} others, the first"}] if failed else []
    return [first | {"provider": f"chosen: {first['provider']}"}, *ran[:SHOWN], *last]


def said(config, fields: tuple[str, ...]) -> str:
    return ", ".join(f"{field} {getattr(config, field)}" for field in fields)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=KNOBS)
    parser.add_argument("--quick", action="store_true", help="a fifth of the time, and the first case alone")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here, and nothing else tells which configuration is the fastest")
    with ek.using("triton"):
        for shape, function, make in itertools.islice(cases(given.family), 1 if given.quick else None):
            for knob in KNOBS[given.family]:
                run = (harness.backward if knob.mode == "backward" else harness.forward)(function, make)
                if rows := tried(knob, shape, run, given.quick):
                    harness.show(rows)


if __name__ == "__main__":
    main()
