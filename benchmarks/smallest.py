"""Every compiled kernel on its smallest shapes, forward and backward: what compute-sanitizer watches.

`python -m benchmarks.smallest [--library PATH] [family ...]`
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels as ek
from benchmarks import harness
from evakernels import native
from evakernels.ops.attention.cuda import HEAD_DIMS

DTYPES = WIDE, BF16, HALF = (torch.float32, torch.bfloat16, torch.float16)
STREAMS = ((WIDE, WIDE), (BF16, BF16), (HALF, HALF), (WIDE, BF16), (WIDE, HALF))  # residual stream, and branch


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=harness.device(), dtype=dtype).requires_grad_()


def back(outputs: Tensor | tuple[Tensor, ...]) -> None:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])


def norm(widths: Iterable[int] = (64, 61), streams: Iterable[tuple[torch.dtype, torch.dtype]] = STREAMS) -> None:
    for width, (stream, dtype) in itertools.product(widths, streams):
        x, branch = new(2, 3, width, dtype=stream), new(2, 3, width, dtype=dtype)
        weight, bias, layer_scale = new(width), new(width), new(width)
        row_scale = torch.tensor([0.0, 2.0], device=x.device)
        with torch.autocast(x.device.type, dtype, enabled=dtype != stream):
            back(ek.layer_norm(x, weight, bias))
            back(ek.rms_norm(x, weight))
            for scales in ({}, {"layer_scale": layer_scale, "row_scale": row_scale}):
                back(ek.add_norm(x, branch, weight, bias, eps=1e-6, **scales))
                back(ek.norm_add(x, branch, weight, bias, eps=1e-6, **scales))


def swiglu(widths: Iterable[int] = (64, 61), dtypes: Iterable[torch.dtype] = DTYPES) -> None:
    for width, dtype in itertools.product(widths, dtypes):
        gate, up, weight, bias = new(3, width, dtype=dtype), new(3, width, dtype=dtype), new(width), new(width)
        back(ek.swiglu(gate, up))
        back(ek.swiglu_norm(gate, up, weight, bias))
        padded = (width + 7) // 8 * 8
        back(ek.swiglu_norm_packed(new(3, 2 * padded, dtype=dtype), weight, bias, width=width))


def tokens(image: int = 28, patch: int = 7) -> None:
    device, patches = harness.device(), (image // patch) ** 2
    for dtype in (WIDE, BF16):
        kept = ek.sample_kept_tokens(3, patches, patches // 2, seed=1, device=device)
        back(ek.gather_tokens(new(3, 1 + patches, 24, dtype=dtype), kept))
        back(ek.patchify(new(3, 3, image, image, dtype=dtype), patch, kept))


def lamb() -> None:
    parameters = [new(33, 5), new(7), new(64, dtype=BF16)]
    for options in ({}, {"max_grad_norm": 1.0, "trust": "group"}):
        optimizer = ek.FusedLAMB(parameters, lr=1e-3, weight_decay=0.05, **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()


def attention(
    tokens: int = 18, head_dims: Iterable[int] = HEAD_DIMS, dtypes: Iterable[torch.dtype] = (BF16, HALF)
) -> None:
    side = math.isqrt(tokens) + 1
    for head_dim, dtype in itertools.product(head_dims, dtypes):
        qkv, rope = new(2, tokens, 3, 3, head_dim, dtype=dtype), ek.Rope2d(side, head_dim).to(harness.device())
        positions = torch.rand(2, side**2, device=qkv.device).argsort(1)[:, : tokens - 1].to(torch.int16)
        back(ek.attention_qkvpacked(qkv, rope=rope, positions=positions))
        back(ek.attention_qkvpacked(qkv, causal=True))


def long_attention() -> None:
    """More than shared memory holds: keys pass through it in stages, and a second kernel makes dq."""
    back(ek.attention_qkvpacked(new(1, 577, 3, 1, 128, dtype=BF16)))


def contrastive(width: int = 64, dtypes: Iterable[torch.dtype] = DTYPES) -> None:
    """It has no compiled kernels: for Triton's alone."""
    for dtype in dtypes:
        image, text = (F.normalize(new(6, width), dim=1).detach().to(dtype).requires_grad_() for _ in range(2))
        for loss in (
            lambda *features: ek.contrastive_loss(*features, new()),
            lambda *features: ek.contrastive_loss(*features, new(), label_smoothing=0.1),
            lambda *features: (ek.sigmoid_loss(*features, new(), new()),),
        ):
            loss(image.detach(), text.detach())
            for one, other in ((image, text), (image.detach(), text), (image, text.detach())):
                loss(one, other)[0].backward()


FAMILIES = {
    "norm": norm,
    "swiglu": swiglu,
    "tokens": tokens,
    "lamb": lamb,
    "attention": lambda: (attention(), long_attention()),
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.smallest", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(FAMILIES)}; by default, all")
    parser.add_argument("--library", help="a compiled library to load first, such as an emulated one")
    given = parser.parse_args()
    if given.library:
        native.load(given.library)
    absent = 0
    for family in given.families or FAMILIES:
        if family not in FAMILIES:
            print(f"{family}: no compiled kernels")
        elif why := native.refusal(family, harness.device().type):
            print(f"{family}: absent: {why}")
            absent += 1
        else:
            with ek.using("cuda"):
                FAMILIES[family]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print(f"{family}: ran")
    sys.exit(absent > 0)


if __name__ == "__main__":
    main()
