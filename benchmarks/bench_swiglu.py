"""SwiGLU, alone and with its sub-LayerNorm, at the hidden widths of EVA-02's towers."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels as ek
from benchmarks import harness

EPS = 1e-6
ROWS = 256 * 129  # 256 images of 224 px in patches of 14, half of them dropped
CASES = (("swiglu", 2048), ("swiglu_norm", 2048), ("swiglu_norm", 2730), ("swiglu_norm_packed", 2730))


def padded(width: int) -> int:
    return -(-width // 8) * 8


def passes(function: str, width: int) -> tuple[int, int]:
    """Elements of a row that must move, forward and backward: gate, up and y; gate, up, dy, dgate and dup."""
    stored = padded(width) if function == "swiglu_norm_packed" else width
    return 2 * width + stored, 3 * width + 2 * stored


def ours(function: str, width: int) -> Callable:
    if function == "swiglu_norm_packed":
        return lambda gate_up, weight, bias: ek.swiglu_norm_packed(gate_up, weight, bias, EPS, width=width)
    return ek.swiglu if function == "swiglu" else lambda *inputs: ek.swiglu_norm(*inputs, eps=EPS)


def composed(function: str, width: int, swiglu: Callable) -> Callable:
    """A function of ours from another's SwiGLU and torch's LayerNorm."""

    def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(swiglu(gate, up), weight.shape, weight, bias, EPS)

    def swiglu_norm_packed(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stored = gate_up.shape[-1] // 2
        y = swiglu_norm(gate_up[..., :width], gate_up[..., stored : stored + width], weight, bias)
        return F.pad(y, (0, stored - width))

    return {"swiglu_norm": swiglu_norm, "swiglu_norm_packed": swiglu_norm_packed}.get(function, swiglu)


def peers(function: str, width: int) -> dict[str, Callable | str]:
    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    found: dict[str, Callable | str] = {"torch": composed(function, width, eager)}
    found["torch.compile"] = harness.compiled(composed(function, width, eager))
    liger = harness.peer("liger_kernel.transformers.functional")
    found["Liger"] = liger if isinstance(liger, str) else composed(function, width, liger.liger_swiglu)
    return found


def inputs(function: str, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=harness.device(), dtype=dtype).requires_grad_()

    packed = function == "swiglu_norm_packed"
    hidden = (new(rows, 2 * padded(width)),) if packed else (new(rows, width), new(rows, width))
    return hidden if function == "swiglu" else (*hidden, new(width), new(width))


def rows(quick: bool) -> Iterator[dict]:
    """Each function at its widths, forward and backward."""
    on_gpu = harness.device().type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    count = ROWS if on_gpu else 8 if quick else 1024
    for function, width in CASES:
        if quick and not on_gpu:
            width = {2048: 64, 2730: 61}[width]
        stored = f" in {padded(width)}" if function == "swiglu_norm_packed" else ""
        yield from harness.both_ways(
            "swiglu",
            f"{function}, {count} rows of {width}{stored}",
            dtype,
            ours(function, width),
            peers(function, width),
            lambda f=function, w=width: inputs(f, count, w, dtype),
            tuple(count * dtype.itemsize * elements for elements in passes(function, width)),
            quick,
        )
