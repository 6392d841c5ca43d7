"""LayerNorm and RMSNorm, alone and in the residual step, at the widths of EVA-CLIP's towers."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels as ek
from benchmarks import harness

EPS = 1e-6
ROWS = 256 * 129  # 256 images of 224 px in patches of 14, half of them dropped
WIDTHS = {
    "layer_norm": (768, 1024, 1408, 1792, 2048, 2730, 4096, 5120),
    "add_norm": (768, 1024, 1408, 1792, 2048, 4096, 5120),
    "norm_add": (1024, 1792, 5120),
    "rms_norm": (1024, 4096),
}
# Passes over (rows, width) forward and backward. add_norm's gradient is one tensor for residual and branch; norm_add's
# gradient of the residual is that of the output.
PASSES = {"layer_norm": (2, 3), "rms_norm": (2, 3), "add_norm": (4, 4), "norm_add": (3, 3)}


def ours(function: str) -> Callable:
    return lambda *inputs: getattr(ek, function)(*inputs, eps=EPS)


def composed(function: str, norm: Callable) -> Callable:
    """A function of ours from another's norm; its additions are passes of their own, unless a compiler joins them."""

    def add_norm(residual: Tensor, branch: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + branch
        return total, norm(total, *weights)

    def norm_add(residual: Tensor, branch: Tensor, *weights: Tensor) -> Tensor:
        return residual + norm(branch, *weights)

    return {"add_norm": add_norm, "norm_add": norm_add}.get(function, norm)


def peers(function: str) -> dict[str, Callable | str]:
    rms = function == "rms_norm"

    def torch_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS) if rms else F.layer_norm(x, weight.shape, weight, bias, EPS)

    found: dict[str, Callable | str] = {"torch": composed(function, torch_norm)}
    found["torch.compile"] = harness.compiled(composed(function, torch_norm))
    norms = {"Liger": liger(rms), "apex": apex(rms), "apex, contrib": apex_contrib(rms)}
    return found | {name: norm if isinstance(norm, str) else composed(function, norm) for name, norm in norms.items()}


def liger(rms: bool) -> Callable | str:
    module = harness.peer("liger_kernel.transformers.functional")
    if isinstance(module, str):
        return module
    if rms:
        return lambda x, weight: module.liger_rms_norm(x, weight, EPS, in_place=False)
    return lambda x, weight, bias: module.liger_layer_norm(x, weight, bias, EPS)


def apex(rms: bool) -> Callable | str:
    module = harness.peer("apex.normalization.fused_layer_norm")
    if isinstance(module, str):
        return module
    if rms:
        return lambda x, weight: module.fused_rms_norm_affine(x, weight, weight.shape, EPS)
    return lambda x, weight, bias: module.fused_layer_norm_affine(x, weight, bias, weight.shape, EPS)


def apex_contrib(rms: bool) -> Callable | str:
    module = harness.peer("apex.contrib.layer_norm.layer_norm")
    if isinstance(module, str):
        return module
    return "it has no RMSNorm" if rms else lambda *inputs: module.FastLayerNormFN.apply(*inputs, EPS)


def inputs(function: str, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=harness.device(), dtype=dtype).requires_grad_()

    streams = 2 if "add" in function else 1
    return *(new(rows, width) for _ in range(streams)), *(new(width) for _ in range(1 if function == "rms_norm" else 2))


def rows(quick: bool) -> Iterator[dict]:
    """Each function at its widths, forward and backward."""
    on_gpu = harness.device().type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    count = ROWS if on_gpu else 8 if quick else 2048
    for function, widths in WIDTHS.items():
        for width in (widths[:2] if quick else widths) if on_gpu else (64,) if quick else (768,):
            size = count * width * dtype.itemsize
            yield from harness.both_ways(
                "norm",
                f"{function}, {count} rows of {width}",
                dtype,
                ours(function),
                peers(function),
                lambda f=function, w=width: inputs(f, count, w, dtype),
                tuple(size * passes for passes in PASSES[function]),
                quick,
            )
