"""Sentences around a class name, for zero-shot classification."""

from pathlib import Path

TEMPLATES = (
    "a photo of a {}.",
    "a picture of the {}.",
    "a close-up photo of a {}.",
    "a {} seen from a distance.",
    "one of many photos of a {}.",
    "a small, blurred image of a {}.",
    "a drawing of a {}.",
    "an image that shows the {} in bright light.",
)


def load_templates(path: str | Path) -> tuple[str, ...]:
    """Templates from a text file: one per line, with {} where the class name goes; empty lines are skipped.

    Raises:
        ValueError: no template, or a line without {}.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as such") from error
    templates = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    if not templates:
        raise ValueError(f"{path} holds no template; write one per line, such as {TEMPLATES[0]!r}")
    for number, template in templates.items():
        check(template, f"{path}, line {number}")
    return tuple(templates.values())


def check(template: str, where: str) -> None:
    """Raise ValueError unless the template has a place for the class name."""
    if "{}" not in template:
        raise ValueError(f"{where}: the template {template!r} has no {{}} where the class name goes")
