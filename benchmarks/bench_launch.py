"""What launching a Triton kernel costs the host before the driver is called: `jit.launch`, and Triton's own.

The driver is a stand-in, so this needs no GPU, and what the driver itself takes is in none of the times.
"""

from collections.abc import Iterator

import torch

from benchmarks import harness

ROWS, WIDTH = 64, 1024


def rows(quick: bool) -> Iterator[dict]:
    """Microseconds of the host per launch of a kernel with ten arguments and five constants."""
    case = "launch", "kernel of 15 parameters", torch.float32, "forward"
    stand_in = harness.peer("benchmarks.stand_in")
    if isinstance(stand_in, str) or stand_in.jit.INTERPRETED:
        absent = stand_in if isinstance(stand_in, str) else "Triton interprets: TRITON_INTERPRET is set"
        yield from harness.compare(*case, dict.fromkeys(("jit.launch", "kernel[grid]", "compiled[grid]"), absent))
        return
    kernel, launch, options = stand_in.of_fifteen, stand_in.jit.launch, stand_in.jit.options
    given = (*torch.empty(5, ROWS, WIDTH, device=harness.device()), None, ROWS, WIDTH, WIDTH, 1e-6)
    constants = {"A": WIDTH, "B": 64, "C": True, "D": False, "E": 1}
    grid = (ROWS, 1, 1)
    with stand_in.active(remember=False):
        compiled = kernel[grid](*given, **options(4, 1), **constants)
        providers = {
            "jit.launch": lambda: launch(kernel, grid, *given, warps=4, stages=1, **constants),
            "kernel[grid]": lambda: kernel[grid](*given, **options(4, 1), **constants),
            "compiled[grid]": lambda: compiled[grid](*given, *constants.values(), stream=0),
        }
        yield from harness.compare(*case, providers, quick=quick, by_host=True)
