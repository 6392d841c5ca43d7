"""How modules of another codebase are made to compute otherwise: a plan of what to change, carried out as a whole."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

__all__ = ["Plan", "Replaced", "Report", "original"]

Methods = tuple[tuple[str, Callable], ...]
_ABSENT = object()


class Replaced:
    """What the classes of replaced modules inherit from, beside the class the module had.

    Such a class has its original's name, so that policies that go by names and by `isinstance` find it.
    """

    _evakernels_original: type
    _evakernels_methods: Methods

    def __reduce_ex__(self, protocol):  # the class is made at run time: pickle and deepcopy have to make it as well
        return _new, (self._evakernels_original, self._evakernels_methods), self.__getstate__()


def original(module: nn.Module) -> Any:
    """The class that a replaced module had before; `original(self).forward(self, x)` computes as it did."""
    return module._evakernels_original


def taken(module: nn.Module, *methods: str) -> str | None:
    """Why these methods cannot be replaced, one being set on the instance itself; None where they can."""
    for method in methods:
        if method in module.__dict__:
            return f"somebody else has replaced its {method}, on the instance"
    return None


@cache
def _class(before: Any, methods: Methods) -> type:
    described = {"_evakernels_original": before, "_evakernels_methods": methods}
    names = {"__module__": before.__module__, "__qualname__": before.__qualname__, "__doc__": before.__doc__}
    return type(before.__name__, (Replaced, before), {**dict(methods), **described, **names})


def _new(before: type, methods: Methods) -> Any:
    made: Any = _class(before, methods)
    return made.__new__(made)


class Report:
    """What `replace` did to a model; print it for a table.

    Attributes:
        replaced: name of the module (or attribute) -> what computes it now.
        left: name of the module -> why it stays as it was.
    """

    def __init__(self, integration: str, replaced: dict[str, str], left: dict[str, str], steps: list["_Step"]) -> None:
        self.integration, self.replaced, self.left = integration, replaced, left
        self._steps = steps

    def undo(self) -> None:
        """Change everything back; does nothing the second time. Copies of the model stay as they are.

        Raises:
            RuntimeError: something has changed the model since, such as sharding; nothing is undone then.
        """
        changed = [step.name for step in self._steps if not step.stands()]
        if changed:
            raise RuntimeError(
                f"{self.integration}: {', '.join(changed)} changed after replace(); take back what was done to it since"
                " (sharding, another replacement), then call undo() again"
            )
        while self._steps:
            self._steps[-1].back()
            self._steps.pop()

    def __str__(self) -> str:
        parts = [f"{self.integration}: {len(self.replaced)} replaced, {len(self.left)} left as they were"]
        for verb, reason, names in (("replaced", "now computed by", self.replaced), ("left", "because", self.left)):
            if rows := _grouped(names):
                width = max(len(verb), *(len(name) for name, _ in rows))
                lines = [f"  {name:<{width}}  {text}" for name, text in [(verb, reason), *rows]]
                parts.append("\n".join(lines))
        return "\n\n".join(parts)

    __repr__ = __str__


def _grouped(names: dict[str, str]) -> list[tuple[str, str]]:
    """Names that differ in numbers alone, and share their text, as one row: blocks.*.attn (12)."""
    counts: dict[tuple[str, str], list[str]] = {}
    for name, text in names.items():
        name = name or "(the model)"
        counts.setdefault((re.sub(r"\d+", "*", name), text), []).append(name)
    return [(f"{key[0]} ({len(found)})" if len(found) > 1 else found[0], key[1]) for key, found in counts.items()]


class _Step:
    """One attribute of one object (its class included) that takes another value."""

    def __init__(self, name: str, owner: Any, attribute: str, value: Any) -> None:
        self.name, self.owner, self.attribute, self.value = name, owner, attribute, value
        self.before = self.now()

    def now(self) -> Any:
        return getattr(self.owner, self.attribute, _ABSENT)

    def stands(self) -> bool:
        return self.now() is self.value

    def there(self) -> None:
        setattr(self.owner, self.attribute, self.value)

    def back(self) -> None:
        if self.before is _ABSENT:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.before)


class Plan:
    """What an integration decides to change, and to leave; nothing is changed before `carry_out`.

    Args:
        integration: its name, for messages: "integrations.timm".
        model: the model.

    Raises:
        TypeError: the model is no `torch.nn.Module`.
        ValueError: it has been replaced before, or a parameter or buffer is on the meta device.
    """

    def __init__(self, integration: str, model: nn.Module) -> None:
        self.integration, self.model = f"evakernels.{integration}", model
        self._replaced: dict[str, str] = {}
        self._left: dict[str, str] = {}
        self._steps: list[_Step] = []
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self.integration}: the model is a {type(model).__name__}; give a torch.nn.Module")
        for name, module in model.named_modules():
            if isinstance(module, Replaced):
                raise ValueError(
                    f"{self.integration}: {name or 'the model'} has been replaced before; call undo() of the report of"
                    " that time first (a copy of a replaced model is replaced, and stays so)"
                )
            for own in (*module._parameters.items(), *module._buffers.items()):
                if own[1] is not None and own[1].is_meta:
                    raise ValueError(
                        f"{self.integration}: {'.'.join(filter(None, (name, own[0])))} is on the meta device, where"
                        " there are no values to check; materialise the model (to_empty, then load its weights) first"
                    )

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the model, each module once."""
        return self.model.named_modules()

    def replace(self, name: str, module: nn.Module, by: str, **methods: Callable) -> bool:
        """Let functions stand in for methods of a module: `forward=function`.

        The functions must be found under their names in their modules, or the model cannot be pickled any more. A
        module whose `forward` somebody has set on the instance is left: False is returned then.
        """
        if why := taken(module, *methods):
            self.leave(name, why)
            return False
        self._replaced[name] = by
        before: Any = type(module)
        self._step(name, module, "__class__", _class(before, tuple(sorted(methods.items()))))
        return True

    def add(self, name: str, module: nn.Module, attribute: str, value: Any) -> None:
        """Give a module a new attribute for a replaced method to use; undo takes it away.

        Raises:
            ValueError: it has one of that name.
        """
        if hasattr(module, attribute):
            raise ValueError(f"{self.integration}: {name or 'the model'} already has an attribute {attribute!r}")
        self._step(name, module, attribute, value)

    def note(self, name: str, by: str) -> None:
        """Report a module as replaced whose work a replaced module around it does."""
        self._replaced[name] = by

    def leave(self, name: str, why: str) -> None:
        """Note that a module stays as it was, and why."""
        self._left[name] = why

    def _step(self, name: str, owner: Any, attribute: str, value: Any) -> None:
        """The first decision about an attribute stands: two models inside this one may share a module."""
        if not any(step.owner is owner and step.attribute == attribute for step in self._steps):
            self._steps.append(_Step(name, owner, attribute, value))

    def carry_out(self, expected: str) -> Report:
        """Change everything, or nothing if anything fails.

        Args:
            expected: what a model must be for this integration, for the error message: "a timm Eva model".

        Raises:
            TypeError: nothing was replaced, and nothing left: it is no such model.
            ValueError: nothing could be replaced; the message has the reasons.
        """
        if not self._replaced and not self._left:
            raise TypeError(
                f"{self.integration}: nothing in this {type(self.model).__name__} is known to it; give {expected}"
            )
        if not self._replaced:
            reasons = "\n".join(f"  {name}: {why}" for name, why in _grouped(self._left))
            raise ValueError(f"{self.integration}: nothing could be replaced in this model:\n{reasons}")
        report = Report(self.integration, self._replaced, self._left, [])
        try:
            for step in self._steps:
                step.there()
                report._steps.append(step)
        except BaseException:
            report.undo()
            raise
        return report
