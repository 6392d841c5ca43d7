"""The losses' dense formulas, and inputs on which an implementation is held against them."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def pairs(b, width=24, dtype=torch.float64, seed=0, kind="random", grad=True):
    """Unit rows: random ones; `collinear`, all within 1e-2 of one direction; `separated`, pairs almost equal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image, text = draw(b, width), draw(b, width)
    if kind == "collinear":
        image, text = draw(1, width) + 1e-2 * torch.stack((image, text))
    if kind == "separated":
        text = image + 0.1 * text
    return [F.normalize(x, dim=-1).to(dtype).requires_grad_(grad) for x in (image, text)]


def dense(image, text, scale, smoothing=0.0, mask=None):
    """The field's formula, on the samples that the mask keeps."""
    if mask is not None:
        image, text = image[mask], text[mask]
    logits = scale * image @ text.t()
    own = torch.arange(len(image))
    loss = sum(F.cross_entropy(x, own, label_smoothing=smoothing) for x in (logits, logits.t())) / 2
    return loss, *((logits.argmax(dim) == own).to(loss.dtype).mean() for dim in (1, 0))


def run(function, dtype, image, text, scale, *args, dloss=1.0):
    image, text = (x.detach().to(dtype).requires_grad_() for x in (image, text))
    scale = torch.tensor(scale, dtype=dtype if dtype == torch.float64 else torch.float32, requires_grad=True)
    loss, *accuracies = function(image, text, scale, *args)
    (loss * dloss).backward()
    return [loss.detach(), scale.grad, image.grad, text.grad, *accuracies]


def agreeing_pairs(b, width=24, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, b, width, generator=generator, dtype=torch.float64)
    features[1] += features[0]
    return [F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in features]


def dense_sigmoid(image, text, scale, bias):
    """The field's formula."""
    logits = scale * image @ text.t() + bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def run_sigmoid(function, dtype, image, text, *scalars):
    accumulated = dtype if dtype == torch.float64 else torch.float32
    inputs = [x.detach().to(dtype).requires_grad_() for x in (image, text)]
    inputs += [torch.tensor(x, dtype=accumulated, requires_grad=True) for x in scalars]
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss * 3, inputs)]


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


INTEGER_CANARY = 1 << 30


def in_half_precision(image, text, scale, smoothing=0.0):
    """The field's formula under autocast: logits from a product in half precision, statistics in float32."""
    logits, own = (scale * image @ text.t()).float(), torch.arange(len(image))
    return (sum(F.cross_entropy(x, own, label_smoothing=smoothing) for x in (logits, logits.t())) / 2,)


def sigmoid_in_half_precision(image, text, scale, bias):
    logits = (scale * image @ text.t() + bias).float()
    labels = 2 * torch.eye(len(image)) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)
