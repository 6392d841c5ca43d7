"""Positions of another grid and patch kernels of another size, interpolated.

"eva": bicubic without antialiasing, as EVA's own code does with both. "timm": as timm does; positions bicubic with
antialiasing, and kernels so that the resized kernel gives on resized images what the kernel gave (FlexiViT, arXiv
2212.08013).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.weights.lazy import Lazy

Resize = Literal["eva", "timm"]
POSITIONS, KERNEL = "visual.pos_embed", "visual.patch_embed.proj.weight"


def resize_positions(positions: Tensor, grid: tuple[int, int], how: Resize) -> Tensor:
    """(1, 1 + side^2, C) to (1, 1 + rows * columns, C), float32; the class token's position stays."""
    side = math.isqrt(positions.shape[1] - 1)
    image = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    image = F.interpolate(image, grid, mode="bicubic", align_corners=False, antialias=how == "timm")
    return torch.cat([positions[:, :1].float(), image.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def resize_kernel(kernel: Tensor, size: tuple[int, int], how: Resize) -> Tensor:
    """(C, channels, p, p) to (C, channels, *size), float32."""
    if how == "eva":
        return F.interpolate(kernel.float(), size, mode="bicubic", align_corners=False)
    old = kernel.shape[2:]
    # Resizing an image of the old size is linear: a row per old pixel, a column per new one.
    pixels = torch.eye(math.prod(old)).view(-1, 1, *old)
    resizing = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).flatten(1)
    return (kernel.float().flatten(2) @ torch.linalg.pinv(resizing).T).unflatten(2, size)


def resized_to(shape: tuple[int, ...], key: str, tensor: Lazy, grid: tuple[int, int], how: Resize) -> Lazy | None:
    """A tensor in another shape; None where it cannot be brought to it.

    Positions must be those of a class token and a square grid; all but the grid, or the kernel's size, must agree.
    """
    was = tensor.shape
    patches = was[1] - 1 if len(was) == 3 else 0
    if key == POSITIONS and patches > 0 and math.isqrt(patches) ** 2 == patches and was[2] == shape[2]:
        return Lazy(shape, torch.float32, lambda: resize_positions(tensor.read(), grid, how))
    if key == KERNEL and len(was) == 4 and was[:2] == shape[:2]:
        size = (shape[2], shape[3])
        return Lazy(shape, torch.float32, lambda: resize_kernel(tensor.read(), size, how))
    return None
