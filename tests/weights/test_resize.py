"""Positions and patch kernels of another size: as EVA's code, and as timm."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from weights.small import small

import evaclip
from evaclip.weights.resize import resize_kernel, resize_positions

NAME = "EVA02-CLIP-L-14"


@pytest.mark.parametrize("grid", [(6, 6), (2, 5), (3, 3)])
def test_positions_are_resized_as_by_eva_and_by_timm(grid):
    positions = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0))
    image = positions[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    evas = F.interpolate(image, grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, -1, 8)
    assert torch.equal(resize_positions(positions, grid, "eva"), torch.cat([positions[:, :1], evas], 1))
    timms = resample_abs_pos_embed(positions, list(grid))
    torch.testing.assert_close(resize_positions(positions, grid, "timm"), timms)
    if grid != (6, 6):  # to a smaller side antialiasing tells
        assert not torch.allclose(timms[:, 1:], evas)


@pytest.mark.parametrize("size", [16, 8])
def test_kernels_are_resized_as_by_eva_and_by_timm(size):
    kernel = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_kernel(kernel, (size, size), "eva"), F.interpolate(kernel, (size, size), mode="bicubic"))
    timms = resample_patch_embed(kernel, [size, size])
    torch.testing.assert_close(resize_kernel(kernel, (size, size), "timm"), timms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["eva", "timm"])
def test_a_model_of_another_grid_and_patch_takes_resized_weights_only_when_told(how, tmp_path):
    source = small(NAME).state_dict()
    torch.save(source, tmp_path / "w.pt")
    target = small(NAME, seed=1, image_size=64, patch=16)
    with pytest.raises(ValueError) as error:
        evaclip.load_checkpoint(target, tmp_path / "w.pt")
    for line in (
        "visual.pos_embed is (1, 5, 64), the model's (1, 17, 64); resize='eva' or 'timm' interpolates it",
        "visual.patch_embed.proj.weight is (64, 3, 14, 14), the model's (64, 3, 16, 16); resize='eva' or 'timm'",
    ):
        assert line in str(error.value)
    report = evaclip.load_checkpoint(target, tmp_path / "w.pt", resize=how)
    assert report.resized == (
        "visual.pos_embed (1, 5, 64) to (1, 17, 64)",
        "visual.patch_embed.proj.weight (64, 3, 14, 14) to (64, 3, 16, 16)",
    )
    loaded = target.state_dict()
    assert torch.equal(loaded["visual.pos_embed"], resize_positions(source["visual.pos_embed"], (4, 4), how))
    kernel = source["visual.patch_embed.proj.weight"]
    assert torch.equal(loaded["visual.patch_embed.proj.weight"], resize_kernel(kernel, (16, 16), how))
    assert torch.equal(loaded["visual.norm.weight"], source["visual.norm.weight"])


def test_what_no_resizing_mends_is_refused_all_the_same(tmp_path):
    source = small(NAME).state_dict()
    source["visual.pos_embed"] = torch.zeros(1, 6, 64)  # no square grid
    source["text.positional_embedding"] = torch.zeros(13, 64)
    torch.save(source, tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        evaclip.load_checkpoint(small(NAME), tmp_path / "w.pt", resize="eva")
    assert "reshaped: visual.pos_embed is (1, 6, 64), the model's (1, 5, 64)" in str(error.value)
    assert "reshaped: text.positional_embedding is (13, 64), the model's (12, 64)" in str(error.value)
    with pytest.raises(ValueError, match=r"resize is 'bicubic'; allowed: 'eva', 'timm' or None"):
        evaclip.load_checkpoint(small(NAME), tmp_path / "w.pt", resize="bicubic")
