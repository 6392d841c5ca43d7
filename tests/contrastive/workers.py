"""What the processes of a group compute in the tests of losses across ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import evakernels as ek
from evakernels.ops.contrastive import ranks, reference, streamed


def batch(samples: int, width: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and texts of the whole batch, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, samples, width, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=-1), F.normalize(text + image, dim=-1)


def share(x: Tensor, sizes: list[int]) -> Tensor:
    return x.split(sizes)[dist.get_rank()]


def loss(
    which: str, sizes: list[int], dtype: torch.dtype, known: bool, tile: int, mask: Tensor | None = None, **options
):
    """A loss with its gradients, of this process's share of the batch; the towers' scale is 20."""
    reference.TILE, streamed.CHECK_SCALE, ranks.LINE = tile, True, options.pop("line", 64)
    image, text = (share(x, sizes).to(dtype).requires_grad_() for x in batch(sum(sizes)))
    scale, bias = (
        torch.tensor(x, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True) for x in (20.0, -5.0)
    )
    inputs = [image, text, scale] + [bias] * (which == "sigmoid")
    for i in options.pop("frozen", ()):
        inputs[i] = inputs[i].detach()
    sizes_known = list(sizes) if known else None
    group = dist.group.WORLD
    if which == "sigmoid":
        outputs = (ek.sigmoid_loss(*inputs, group=group, batch_sizes=sizes_known),)
    else:
        row_mask = None if mask is None else share(mask, sizes)
        outputs = ek.contrastive_loss(*inputs, group=group, batch_sizes=sizes_known, row_mask=row_mask, **options)
    (outputs[0] * 3).backward()
    return [x.detach() for x in outputs], [x.grad for x in inputs]


def losses(sizes: list[int], cases: list[tuple]) -> list:
    return [loss(which, sizes, dtype, **options) for which, dtype, options in cases]
