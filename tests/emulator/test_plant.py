"""The list of planted bugs is sane; plant.py itself says whether tests catch them, and takes minutes."""

import subprocess
import sys
from collections import Counter

from emulator import build, plant


def test_every_bug_can_be_planted():
    for p in plant.plants():
        text = (build.CSRC / p.file).read_text()
        assert text.count(p.old) == 1 and p.old != p.new, p
    names = Counter((p.family, p.name) for p in plant.plants())
    assert max(names.values()) == 1 and len(names) >= 24


def test_every_test_that_is_to_catch_one_exists():
    tests = sorted({f"tests/{p.test}" for p in plant.plants()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=plant.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert sorted(line for line in done.stdout.splitlines() if "::" in line) == tests
