"""What the compilers make of each Triton kernel, for cards that need not be there: the columns of `resources`.

The operators are called on small tensors, what they would launch on a card is written down (`jit.recorded`), and each
kernel is compiled for it with those constants, warps and stages. A hash of a kernel's code, and of all that it calls,
stands beside what came of it, so that a test knows without compiling whether the table is that of these sources.
"""

import ast
import csv
import functools
import hashlib
import multiprocessing
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITCallable

import evakernels as ek
from benchmarks import harness, resources, smallest, stand_in
from benchmarks.resources import KIB, RESERVED, SHARED_MEMORY
from benchmarks.smallest import BF16, WIDE
from evakernels import dispatch, jit, native

FIELDS = (
    *("family", "kernel", "architecture", "registers", "stack_bytes"),
    *("at", "threads", "stages", "shared_bytes", "blocks", "warps", *resources.INSTRUCTIONS, "source"),
)
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}  # of an A100, of an H100
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half", None: "-"}

# Calls that together ask each configuration function for each of its answers. Of equal kernels the first counts.
CALLS: dict[str, dict[str, Callable[[], None]]] = {
    "norm": {
        f"width {n}": functools.partial(smallest.norm, [n], streams)
        for n, streams in ((1024, [(BF16, BF16), (WIDE, BF16)]), (2730, [(WIDE, BF16)]), (15360, [(WIDE, BF16)]))
    },
    "swiglu": {
        f"width {n}": functools.partial(smallest.swiglu, [n], [dtype])
        for n, dtype in ((2048, WIDE), (2730, BF16), (15360, BF16))
    },
    "attention": {
        "129 tokens": lambda: smallest.attention(129, (64, 88, 128), [BF16]),
        "577 tokens": lambda: smallest.attention(577, (64, 128), [BF16]),
        "129 tokens, float32": lambda: smallest.attention(129, (64,), [WIDE]),
    },
    "contrastive": {"width 1024": lambda: smallest.contrastive(1024, [BF16, WIDE])},
}


class Compiled(NamedTuple):
    """A kernel that is to be compiled for a card, and the call that launches it."""

    architecture: str
    at: str
    launch: jit.Launch

    @property
    def family(self) -> str:
        return self.launch.kernel.fn.__module__.partition(".ops.")[2].split(".")[0]

    @property
    def name(self) -> str:
        """`_forward<bf16 - float, WIDTH=1024>`: the types of its pointers, and its constants."""
        given = self.launch.arguments
        types = [TYPES.get(a, str(a).removeprefix("torch.")) for a in given if not isinstance(a, int | float)]
        wide = [f"{a}" for a in given if isinstance(a, int) and a >= 2**31]
        constants = [f"{name}={value}" for name, value in self.launch.constants.items()]
        return f"{self.launch.kernel.fn.__name__}<{', '.join([' '.join(types), *wide, *constants])}>"


@contextmanager
def card(architecture: str):
    """What configuration functions ask of a card is answered as this one does."""
    answers = {
        (jit, "capability"): divmod(int(architecture.removeprefix("sm_")), 10),
        (native, "shared_memory"): SHARED_MEMORY[architecture] - RESERVED,
        (native, "multiprocessors"): MULTIPROCESSORS[architecture],
    }
    with ExitStack() as patched:
        for (module, name), answer in answers.items():
            patched.enter_context(mock.patch.object(module, name, lambda _, answer=answer: answer))
        patched.enter_context(mock.patch.object(harness, "device", lambda: torch.device("cpu")))
        yield


def launched() -> list[Compiled]:
    """Every kernel that the calls launch, once for each card."""
    found: dict[tuple, Compiled] = {}
    for architecture in MULTIPROCESSORS:
        with card(architecture), ek.using("triton"):
            for family, calls in CALLS.items():
                if isinstance(dispatch.implementation(family, "triton"), str):
                    continue
                for at, call in calls.items():
                    with jit.recorded() as launches:
                        call()
                    for launch in launches:
                        one = Compiled(architecture, at, launch)
                        key = one.family, one.name, architecture, launch.warps, launch.stages
                        found.setdefault(key, one)
    return [found[key] for key in sorted(found)]


def source(kernel: Any) -> str:
    """A hash of a kernel's code and of that of all that it calls, comments aside."""
    found: dict[str, str] = {}

    def visit(function: JITCallable) -> None:
        name, tree, scope = (
            f"{function.fn.__module__}.{function.fn.__qualname__}",
            function.parse(),
            function.__globals__,
        )
        if name in found:
            return
        found[name] = ast.dump(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                value = scope.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(scope.get(node.value.id), node.attr, None)
            else:
                continue
            if isinstance(value, tl.constexpr):
                found[f"{name}: {ast.unparse(node)}"] = repr(value.value)
            elif isinstance(value, JITCallable) and not value.fn.__module__.startswith("triton."):
                visit(value)

    visit(kernel)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]


def described(one: Compiled) -> dict[str, str]:
    """What is known of a row before anything is compiled."""
    return {
        "family": one.family,
        "kernel": one.name,
        "architecture": one.architecture,
        "at": one.at,
        "threads": str(32 * one.launch.warps),
        "stages": str(one.launch.stages),
        "source": source(one.launch.kernel),
    }


def row(one: Compiled) -> dict:
    """A row of the table: the kernel is compiled."""
    launch = one.launch
    with stand_in.active(int(one.architecture.removeprefix("sm_"))):
        how = jit.options(launch.warps, launch.stages)
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **how, **launch.constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        (found,) = resources.compiled(Path(file.name)).values()
    assert compiled.metadata.num_warps == launch.warps, "the compiler has added warps"
    shared, threads = compiled.metadata.shared, 32 * launch.warps
    blocks = resources.blocks(found["registers"], threads, shared, SHARED_MEMORY[one.architecture])
    return found | described(one) | {"shared_bytes": shared, "blocks": blocks, "warps": blocks * launch.warps}


def rows(kernels: list[Compiled], processes: int = 2) -> list[dict]:
    """The rows of these kernels, compiled by so many processes at a time."""
    _given[:] = kernels
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_row, range(len(kernels)), chunksize=1)


def renewed(kernels: list[Compiled]) -> list[dict]:
    """The rows of these kernels, of which those that the table has already are not compiled again."""
    same = itemgetter("kernel", "architecture", "threads", "stages", "source")
    known = {same(row): row for row in committed()} if table().exists() else {}
    before = [known.get(same(described(one))) for one in kernels]
    new = [one for one, row in zip(kernels, before, strict=True) if not row]
    print(f"{len(new)} kernels are compiled, {len(kernels) - len(new)} have not changed")
    compiled = iter(rows(new))
    return [row | described(one) if row else next(compiled) for one, row in zip(kernels, before, strict=True)]


_given: list[Compiled] = []  # a kernel is not sent to another process, which finds it here


def _row(index: int) -> dict:
    return row(_given[index])


def table() -> Path:
    """The committed table of a Triton version such as 3.7.1: another compiler allots other registers."""
    return harness.RESULTS / f"resources-triton-{'.'.join(triton.__version__.split('.')[:2])}.csv"


def committed() -> list[dict]:
    with table().open(newline="") as file:
        return list(csv.DictReader(file))


def too_much(found: list[dict]) -> list[str]:
    """A sentence for each kernel that keeps anything on the stack, or wants more shared memory than there is."""
    most = {architecture: memory - RESERVED for architecture, memory in SHARED_MEMORY.items()}
    return resources.spilling(found) + [
        f"{row['kernel']} on {row['architecture']} wants {int(row['shared_bytes']) / KIB:.0f} KiB of shared memory"
        for row in found
        if int(row["shared_bytes"]) > most[row["architecture"]]
    ]
