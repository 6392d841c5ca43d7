"""What logits in half precision cost: errors of the contrastive loss and its gradients, against float64.

`python -m benchmarks.precision` prints the table of docs/contrastive.md; no GPU is needed, products round alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels

BATCH, WIDTH, DIRECTIONS, SCALE = 2048, 512, 24, 100.0


def features() -> tuple[Tensor, Tensor]:
    """Pairs near one another in a space of few directions, as trained towers' are; float64."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(DIRECTIONS, WIDTH, generator=generator, dtype=torch.float64)
    image, noise = torch.randn(2, BATCH, DIRECTIONS, generator=generator, dtype=torch.float64)
    return F.normalize(image @ basis, dim=-1), F.normalize((image + 0.7 * noise) @ basis, dim=-1)


def dense(image: Tensor, text: Tensor, scale: Tensor, logits: torch.dtype) -> Tensor:
    """open_clip's formula; under autocast its logits have the features' dtype, its cross-entropies float32."""
    s = (scale * image.to(logits) @ text.to(logits).t()).to(torch.promote_types(logits, torch.float32))
    own = torch.arange(len(s))
    return (F.cross_entropy(s, own) + F.cross_entropy(s.t(), own)) / 2


def gradients(loss, image: Tensor, text: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    inputs = image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()
    scale = torch.tensor(SCALE, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    value = loss(*inputs, scale)
    return value.detach(), *torch.autograd.grad(value, (inputs[0], scale))


def main() -> None:
    print(f"{BATCH} pairs of width {WIDTH}, scale {SCALE:.0f}; relative errors of the loss, dimage and dscale\n")
    print("| features | logits | loss | dimage | dscale |\n| --- | --- | ---: | ---: | ---: |")
    for dtype in (torch.bfloat16, torch.float16):
        image, text = (x.to(dtype) for x in features())
        exact = gradients(lambda *x: dense(*x, torch.float64), image.double(), text.double(), torch.float64)
        name = str(dtype).removeprefix("torch.")
        cases = {
            "float32, evakernels": lambda *x: evakernels.contrastive_loss(*x)[0],
            f"{name}, open_clip under autocast": lambda *x, dtype=dtype: dense(*x, dtype),
        }
        for label, loss in cases.items():
            found = gradients(loss, image, text, dtype)
            errors = [(x.double() - e).norm() / e.norm() for x, e in zip(found, exact, strict=True)]
            print(f"| {name} | {label} | {' | '.join(f'{error:.1e}' for error in errors)} |")


if __name__ == "__main__":
    main()
