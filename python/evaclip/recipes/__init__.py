"""Published and small training recipes, one TOML file each."""

from pathlib import Path


def recipe_files() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}
