"""What the processes of a group compute in the tests of losses across ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

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
    ranks._grids.clear()
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


class Towers(torch.nn.Module):
    """A CLIP model as small as it can be."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.image, self.text = (torch.nn.Linear(12, 8, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.log_scale = torch.nn.Parameter(torch.full((1,), 2.5, dtype=torch.float64))

    def forward(self, image, text):
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1), self.log_scale.exp()


def whole_batch_gradients(samples: int) -> list[Tensor]:
    """Of the towers' parameters, by the dense formula in one process."""
    model = Towers()
    image, text, scale = model(*batch(samples))
    logits = scale * image @ text.t()
    (sum(F.cross_entropy(x, torch.arange(samples)) for x in (logits, logits.t())) / 2).backward()
    return [parameter.grad for parameter in model.parameters()]


def trained(how: str, sizes: list[int]) -> list[Tensor]:
    """The gradients of the towers' parameters after one step in this process."""
    reference.TILE = 2
    inputs = [share(x, sizes) for x in batch(sum(sizes))]
    model = Towers()
    if how == "fsdp2":
        for part in (model.image, model.text, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (len(sizes),)))
    forward = DistributedDataParallel(model) if how == "ddp" else model

    def loss(*features):
        return ek.contrastive_loss(*features, group=dist.group.WORLD)[0]

    if how == "compiled":
        step = torch.compile(lambda *x: loss(*model(*x)), fullgraph=True, backend="aot_eager")
        step(*inputs).backward()
    elif how == "two passes":
        with torch.no_grad():
            features = [model(*parts) for parts in zip(*(x.split(2) for x in inputs), strict=True)]
        joined = [torch.cat(x).requires_grad_() for x in list(zip(*features, strict=True))[:2]]
        loss(*joined, model.log_scale.exp()).backward()
        for parts in zip(*(x.split(2) for x in (*inputs, *(f.grad for f in joined))), strict=True):
            torch.autograd.backward(model(*parts[:2])[:2], parts[2:])
    else:
        loss(*forward(*inputs)).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    if how == "fsdp2":
        return [gradient.full_tensor() for gradient in gradients]
    if how != "ddp":
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= len(sizes)
    return gradients


def factors(sizes: list[int], conventions: list[tuple[str, dict]]) -> list[tuple[float, ...]]:
    """What multiple of the exact gradient a loss gives after averaging over ranks, by its name and flags.

    Of the encoders, how far it is from any multiple (relative), of the logit scale, and of the loss itself. "replaced"
    before the name of an open_clip loss: by `evakernels.integrations`.
    """
    import torchvision_on_cpu  # noqa: F401
    from open_clip import loss as published

    from evakernels.integrations.open_clip import replace

    rank, world = dist.get_rank(), len(sizes)
    found = []
    for name, flags in conventions:
        image, text = (share(x, sizes).requires_grad_() for x in batch(sum(sizes)))
        scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (20.0, -5.0))
        make = ek.nn.ClipLoss if name == "ours" else getattr(published, name.removeprefix("replaced "))
        loss = make(rank=rank, world_size=world, **flags)
        if name.startswith("replaced"):
            replace(loss)
        value = loss(image, text, *((scale, bias) if "Sig" in name else (scale,)))
        value.backward()
        exact = [share(x, sizes).requires_grad_() for x in batch(sum(sizes))]
        exact_scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        if "Sig" in name:
            exact_value = ek.sigmoid_loss(*exact, exact_scale, -5.0, group=dist.group.WORLD)
        else:
            exact_value = ek.contrastive_loss(*exact, exact_scale, group=dist.group.WORLD)[0]
        exact_value.backward()
        theirs, ours = torch.cat((image.grad, text.grad)), torch.cat([x.grad for x in exact])
        sums = torch.stack((
            (theirs * ours).sum(), ours.square().sum(), theirs.square().sum(), scale.grad, exact_scale.grad,
            value.detach(), exact_value.detach()
        ))  # fmt: skip
        dist.all_reduce(sums)
        product, mine, its, scale_sum, exact_sum, value_sum, exact_value_sum = sums.tolist()
        residual = max(0.0, 1 - product**2 / (mine * its)) ** 0.5
        found.append((product / mine, residual, scale_sum / exact_sum, value_sum / exact_value_sum))
    return found
