"""Token dropping: ids drawn, tokens kept, kept patches cut out of the image."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import evakernels as ek
from benchmarks import harness


def rows(quick: bool) -> Iterator[dict]:
    """Draws of half the patches, the gather forward and backward, and patchify forward (images take no gradient)."""
    on_gpu = harness.device().type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tiny = quick and not on_gpu
    for patches in (49,) if tiny else (196, 256, 576):
        yield from sampling(1024 if on_gpu else 8 if tiny else 256, patches, quick)
    yield from gathering(*((4, 16, 64) if tiny else (256 if on_gpu else 32, 256, 1024)), dtype, quick)
    for patch in (14,) if tiny else (14, 16):
        yield from cutting(*((2, 56) if tiny else (256 if on_gpu else 32, 224)), patch, dtype, quick)


def sampling(batch: int, patches: int, quick: bool) -> Iterator[dict]:
    device, keep = harness.device(), patches // 2

    def draw() -> Tensor:
        return ek.sample_kept_tokens(batch, patches, keep, seed=0, device=device)

    def by_topk() -> Tensor:
        """As open_clip and EVA-CLIP draw; not in order."""
        return torch.randn(batch, patches, device=device).topk(keep, dim=-1).indices

    yield from harness.compare(
        "tokens",
        f"sample_kept_tokens, {keep} of {patches}, batch {batch}",
        "int16",
        "forward",
        harness.ours("tokens", lambda: draw) | {"torch, topk of noise": by_topk},
        bytes=batch * keep * 2,
        quick=quick,
    )


def some_ids(batch: int, patches: int, keep: int) -> Tensor:
    return torch.rand(batch, patches, device=harness.device()).argsort(1)[:, :keep].sort(1).values


def gathering(batch: int, patches: int, channels: int, dtype: torch.dtype, quick: bool) -> Iterator[dict]:
    keep = patches // 2

    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(batch, 1 + patches, channels, device=harness.device(), dtype=dtype)
        ids = some_ids(batch, patches, keep)
        return x.requires_grad_(), ids.to(torch.int16), ids

    def indexed(x: Tensor, _: Tensor, ids: Tensor) -> Tensor:
        """As open_clip and EVA-CLIP keep tokens."""
        samples = torch.arange(len(x), device=x.device)[:, None]
        return torch.cat((x[:, :1], x[:, 1:][samples, ids]), dim=1)

    def gathered(x: Tensor, _: Tensor, ids: Tensor) -> Tensor:
        return torch.cat((x[:, :1], x[:, 1:].gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))), dim=1)

    peers: dict[str, Callable | str] = {"torch, index and cat": indexed, "torch, gather and cat": gathered}
    peers["torch.compile, index"] = harness.compiled(indexed)
    kept, row = batch * (1 + keep), channels * dtype.itemsize
    yield from harness.both_ways(
        "tokens",
        f"gather_tokens, {1 + keep} of {1 + patches} tokens of {channels}, batch {batch}",
        dtype,
        lambda x, ids, _: ek.gather_tokens(x, ids),
        peers,
        inputs,
        (2 * kept * row, (kept + batch * (1 + patches)) * row),
        quick,
    )


def cutting(batch: int, size: int, patch: int, dtype: torch.dtype, quick: bool) -> Iterator[dict]:
    side = size // patch
    keep = side**2 // 2

    def inputs() -> tuple[Tensor, ...]:
        ids = some_ids(batch, side**2, keep)
        return torch.randn(batch, 3, size, size, device=harness.device(), dtype=dtype), ids.to(torch.int16), ids

    def all_then_kept(images: Tensor, _: Tensor, ids: Tensor) -> Tensor:
        patches = images.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5)
        patches = patches.flatten(3).flatten(1, 2)
        return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))

    def only_kept(images: Tensor, _: Tensor, ids: Tensor) -> Tensor:
        patches = images.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5)
        samples = torch.arange(len(images), device=images.device)[:, None]
        return patches[samples, ids // side, ids % side].flatten(2)

    peers = {"torch, all patches, gather": all_then_kept, "torch, index": only_kept}
    ours = harness.ours("tokens", lambda: harness.forward(lambda x, ids, _: ek.patchify(x, patch, ids), inputs))
    compiled = harness.compiled(only_kept)
    yield from harness.compare(
        "tokens",
        f"patchify, {keep} of {side**2} patches of {size} px, batch {batch}",
        dtype,
        "forward",
        ours
        | {name: harness.forward(peer, inputs) for name, peer in peers.items()}
        | {"torch.compile, index": compiled if isinstance(compiled, str) else harness.forward(compiled, inputs)},
        bytes=2 * batch * keep * 3 * patch**2 * dtype.itemsize,
        quick=quick,
    )
