"""`benchmarks` is no part of the distribution: it is imported from the folder of the sources."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
