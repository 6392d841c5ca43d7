"""README's way from a folder of images and captions to a zero-shot evaluation is walked, command by command."""

import re
import shlex
from pathlib import Path

import pytest

from evaclip import cli

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README[README.index("## Train your own") : README.index("## More")]
COLOURS = ("red", "green", "blue")


def picture(colour: str):
    from PIL import Image

    return Image.new("RGB", (80, 72), colour)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder to start from: images with captions beside them, and images by class."""
    monkeypatch.chdir(tmp_path)
    images = Path("path/to/images")
    images.mkdir(parents=True)
    for i in range(64):
        colour = COLOURS[i % 3]
        picture(colour).save(images / f"{i}.jpg")
        (images / f"{i}.txt").write_text(f"a {colour} square")
    for colour in COLOURS:
        (Path("path/to/classes") / colour).mkdir(parents=True)
        picture(colour).save(f"path/to/classes/{colour}/0.jpg")
    return tmp_path


def test_train_your_own_works_word_for_word(folder, capsys):
    commands = []
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL):
        if language == "toml":
            Path("my.toml").write_text(re.sub(r"steps = \d+", "steps = 2", text))  # all that is not word for word
        else:
            commands += [shlex.split(line, comments=True) for line in text.splitlines()]
    assert [command[:2] for command in commands] == [
        ["evaclip", "data"],
        ["evaclip", "data"],
        ["evaclip", "train"],
        ["evaclip", "eval"],
    ]
    for command in commands:
        assert cli.main(command[1:]) == 0, (command, capsys.readouterr())
    assert "zero-shot classification" in capsys.readouterr().out
    assert Path("runs/mine/eval-classes.json").is_file()
