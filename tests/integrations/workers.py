"""What the processes of a group compute in the tests of integrations."""

import torch
import torch.distributed as dist

CASES = {
    "no flags": ("ClipLoss", {}),
    "with gradient": ("ClipLoss", {"gather_with_grad": True}),
    "local, with gradient": ("ClipLoss", {"gather_with_grad": True, "local_loss": True}),
    "sigmoid": ("SigLipLoss", {}),
}


def losses_of_open_clip() -> tuple[dict, dict]:
    """By case, of replaced and untouched losses: gradients of the features; those of the scalars and the value, summed."""
    import torchvision_on_cpu  # noqa: F401
    from open_clip import loss as published

    from evakernels.integrations.open_clip import replace

    rank, size = dist.get_rank(), dist.get_world_size()
    found: tuple[dict, dict] = {}, {}
    for name, (kind, flags) in CASES.items():
        for results, replacing in zip(found, (True, False), strict=True):
            loss = getattr(published, kind)(rank=rank, world_size=size, **flags)
            if replacing:
                replace(loss)
            generator = torch.Generator().manual_seed(rank)
            leaves = list(torch.nn.functional.normalize(torch.randn(2, 3, 8, generator=generator).double(), dim=-1))
            leaves = [x.detach().requires_grad_() for x in (*leaves, *torch.tensor([20.0, -5.0]).double())]
            value = loss(*leaves)
            value.backward()
            image, text, *summed = (x.grad for x in leaves)
            summed.append(value.detach())  # of local losses the process's own share, untouched
            for x in summed:
                dist.all_reduce(x)
            results[name] = [image, text, *summed]
    return found
