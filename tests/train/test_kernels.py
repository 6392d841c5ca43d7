"""Training steps of models with rotary embedding, SwiGLU and dropped tokens, all by the kernels."""

import numerics
import pytest
import torch
from train.ranked import tiny

import evakernels as ek
from evaclip.models import create_model
from evaclip.train.trainer import Trainer

BATCH, PATCHES, KEEP = 6, 16, 8


def model_of(device, dtype):
    torch.manual_seed(0)
    return create_model("EVA02-CLIP-tiny").to(device, dtype).train()


def backward(model, implementation):
    """Kept ids and features, under autocast unless the model is in float64; the model's parameters get gradients."""
    device, dtype = model.logit_scale.device, model.logit_scale.dtype
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).to(device, dtype)
    ids = torch.randint(1, 512, (BATCH, 16), generator=generator).to(device)
    with ek.using(implementation):
        kept = ek.sample_kept_tokens(BATCH, PATCHES, KEEP, seed=0, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
            image, text, _ = model(images, ids, kept=kept)
        ek.contrastive_loss(image, text, model.logit_scale.exp())[0].backward()
    return kept.cpu(), image.detach().cpu(), text.detach().cpu()


def update(parameters, gradients, implementation, dtype=torch.float32):
    """The parameters after LAMB."""
    parameters = [p.detach().clone().to(dtype).requires_grad_() for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter)
    with ek.using(implementation):
        ek.FusedLAMB(parameters, lr=1e-2, weight_decay=0.05).step()
    return [p.detach().cpu() for p in parameters]


@pytest.fixture(scope="module")
def expected():
    """The same by the formulas: under autocast, and in float64."""
    models = [model_of("cpu", dtype) for dtype in (torch.float32, torch.float64)]
    return models, [backward(model, "reference") for model in models]


def test_a_step_by_kernels_is_as_exact_as_one_by_formula(kernels, expected):
    (peer, oracle), (peer_forward, oracle_forward) = expected
    model = model_of(kernels, torch.float32)
    kept, *features = backward(model, "cuda")
    assert torch.equal(kept, peer_forward[0])
    for name, *three in zip(("image", "text"), features, peer_forward[1:], oracle_forward[1:], strict=True):
        numerics.assert_as_exact_as(*three, numerics.OUTPUTS, name)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [p.grad.cpu() for p in parameters]
    for name, *three in zip(names, gradients, peer.parameters(), oracle.parameters(), strict=True):
        numerics.assert_as_exact_as(three[0], three[1].grad, three[2].grad, numerics.GRADIENTS, name)

    updated = update(parameters, gradients, "cuda")
    by_formula = [update(peer.parameters(), gradients, "reference", dtype) for dtype in (torch.float32, torch.float64)]
    for name, *three in zip(names, updated, *by_formula, strict=True):
        numerics.assert_as_exact_as(*three, numerics.OUTPUTS, f"{name} after the step")


def test_the_quick_start_trains_by_triton(triton_kernels, tmp_path):
    recipe = tiny(schedule__steps=2, schedule__warmup=0, data__batch_size=4, compute__device=triton_kernels.type)
    losses = {}
    for implementation in ("triton", "reference"):
        with ek.using(implementation):
            trainer = Trainer(recipe, tmp_path / implementation)
            losses[implementation] = [trainer.train_step()["loss"] for _ in range(2)]
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-4)
