"""Which implementation answers for these tensors, and why the others do not.

Every family (`evakernels/ops/<family>/`) keeps its implementations as sibling modules with the same function
names: `reference` (plain PyTorch, any device: the oracle), `cpu` (PyTorch's own fused CPU kernels composed),
`triton` and `cuda`. A module may define `refuses(op, *args)`, which returns None or the sentence that says why
it cannot serve this call.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

FAMILIES = ("attention", "norm", "swiglu", "tokens", "lamb", "contrastive")
IMPLEMENTATIONS = ("cuda", "triton", "cpu", "reference")


class Rule(NamedTuple):
    """In which order implementations are asked, for whom, and why."""

    order: tuple[str, ...]
    reason: str
    family: str | None = None  # None: any
    device: str | None = None
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None = None  # of a GPU: the first, and the last
    when: Callable[..., bool] | None = None  # of the op's name and arguments
    words: str = ""  # what `when` asks

    def __str__(self) -> str:
        return f"{', '.join(self.order)}{self.words and f' for {self.words}'} ({self.reason})"


def _long(op: str, x: torch.Tensor, *_) -> bool:
    return op != "apply_rope" and x.shape[1] > 577


# The first that matches counts. Nothing was measured on a GPU yet: "by formula".
RULES = (
    Rule(
        ("triton", "cuda", "reference"),
        "by formula: bound by products, and Triton's (wgmma, tcgen05) are faster there than mma.sync",
        *("attention", "cuda", ((9, 0), (10, 9)), _long, "more than 577 tokens"),
    ),
    Rule(
        ("reference",),
        "kernels are compiled for compute capability 8.0 and newer",
        device="cuda",
        capabilities=((0, 0), (7, 9)),
    ),
    Rule(
        ("cuda", "triton", "reference"),
        "by formula: as few bytes as Triton moves or fewer, and nothing is compiled at the first call",
        device="cuda",
    ),
    Rule(
        ("cpu", "reference"),
        "PyTorch's fused CPU kernels go first; emulated and interpreted ones answer to `using` alone",
        device="cpu",
    ),
    Rule(("reference",), "plain PyTorch runs on any device"),
)

library = torch.library.Library("evakernels", "DEF")

_forced: str | None = None


@contextmanager
def using(name: str) -> Iterator[None]:
    """Make one implementation answer for every call, or raise; process-wide, backward passes included.

    Families that have no such implementation at all (of tokens and LAMB there is none in Triton, of the losses none in
    CUDA C++) choose as ever.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: the name is none of these.
    """
    global _forced
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"using({name!r}): choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@cache
def implementation(family: str, name: str) -> ModuleType | str:
    """The module that implements a family in one way, or the sentence that says why there is none."""
    path = f"evakernels.ops.{family}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == path:
            return f"this version of evakernels has no {name} implementation of {family}"
        return f"it needs the Python package {error.name!r}, which is not installed"
    except ImportError as error:
        return f"it needs a Python package that is installed, but does not load: {error}"


@cache
def _exists(family: str, name: str) -> bool:
    """Whether there is such an implementation, whether or not it can be imported here."""
    return importlib.util.find_spec(f"evakernels.ops.{family}.{name}") is not None


def refusal(family: str, name: str, op: str, args: tuple) -> str | None:
    """Why one implementation cannot serve this call, in a sentence; None when it can."""
    module = implementation(family, name)
    if isinstance(module, str):
        return module
    if not hasattr(module, op):
        return f"it does not implement {op}"
    refuses = getattr(module, "refuses", None)
    return refuses(op, *args) if refuses else None


def rules(family: str, device: str, capability: tuple[int, int] | None = None) -> tuple[Rule, ...]:
    """Those of a family on a type of device, up to the one that matches whatever the arguments are."""
    found = []
    for one in RULES:
        if one.family not in (None, family) or one.device not in (None, device):
            continue
        if one.capabilities and not (capability and one.capabilities[0] <= capability <= one.capabilities[1]):
            continue
        found.append(one)
        if not one.when:
            break
    return tuple(found)


@cache
def _rules(family: str, device: torch.device) -> tuple[Rule, ...]:
    return rules(family, device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def rule(family: str, op: str, args: tuple) -> Rule:
    """The rule that says in which order implementations are asked to serve a call."""
    for found in _rules(family, device_of(args)):
        if found.when is None or found.when(op, *args):
            return found
    raise AssertionError("the last of RULES matches always")


def choose(family: str, op: str, args: tuple) -> ModuleType:
    """The module that serves this call; the error lists every implementation with its reason to decline."""
    forced = _forced if _forced and _exists(family, _forced) else None
    order = (forced,) if forced else rule(family, op, args).order
    for name in order:
        if refusal(family, name, op, args) is None:
            return implementation(family, name)  # type: ignore[return-value]
    reasons = "\n".join(
        f"  {name}: {refusal(family, name, op, args) or 'can serve, but was not asked'}" for name in IMPLEMENTATIONS
    )
    asked = f'using("{forced}") asked for {forced} alone' if forced else f"tried {rule(family, op, args)}"
    raise NotImplementedError(
        f"no implementation of evakernels::{op} serves this call ({asked}):\n{reasons}\n"
        "Run `python -m evakernels` to see what works on this machine and how to get the rest."
    )


def device_of(args: tuple) -> torch.device:
    """The device of the first tensor (or tensor list, or device) among an op's arguments."""
    for arg in args:
        if isinstance(arg, list | tuple) and arg:
            arg = arg[0]
        if isinstance(arg, torch.Tensor):
            return arg.device
        if isinstance(arg, torch.device):
            return arg
    return torch.device("cpu")


def define(family: str, schema: str, fake: Callable) -> Callable:
    """Register `torch.ops.evakernels.<op>`: schema, fake, and an implementation that asks `choose` at run time.

    Autocast is off inside: an implementation decides its dtypes itself. Schemas carry no defaults, because
    the dispatcher drops arguments that equal them.
    """
    op = schema.split("(", 1)[0]
    takes = len(inspect.signature(fake).parameters)

    def run(*args):
        assert len(args) == takes, f"{op} takes {takes} arguments"
        device = device_of(args).type
        serve = getattr(choose(family, op, args), op)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return serve(*args)
        return serve(*args)

    library.define(schema)
    library.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"evakernels::{op}", fake, lib=library)
    return getattr(torch.ops.evakernels, op).default
