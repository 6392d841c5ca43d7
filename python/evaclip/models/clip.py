"""Two towers and a temperature."""

import torch
from torch import Tensor, nn

from evaclip.models.blocks import Checkpointing, normalize
from evaclip.models.config import ClipConfig
from evaclip.models.text import TextTower
from evaclip.models.vision import VisionTower


class CLIP(nn.Module):
    """An EVA-CLIP model with the published state-dict keys; rotary tables are computed, never stored."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.full((), config.logit_scale_init, dtype=torch.float32))

    def encode_image(self, images: Tensor, *, kept: Tensor | None = None, normalize: bool = False) -> Tensor:
        """Features of images.

        Args:
            images: (B, channels, height, width) as the configuration says, normalised as in CLIP.
            kept: (B, K) patch ids, any integer dtype: compute with these patches and the class token alone.
            normalize: scale the features to length 1, in float32.

        Returns:
            (B, embed_dim) in autocast's dtype, or that of the parameters without autocast; float32 if normalised.

        Raises:
            ValueError: a shape does not fit the tower, or an id is no patch.
        """
        return _maybe_normalized(self.visual(images, kept), normalize)

    def encode_video(self, frames: Tensor, *, kept: Tensor | None = None, normalize: bool = False) -> Tensor:
        """Features of videos: the mean of those of their frames (arXiv 2402.04252).

        Args:
            frames: (B, T, channels, height, width), normalised as in CLIP.
            kept: (B, K) patch ids, of all frames of a video.
            normalize: scale the mean to length 1, in float32.

        Returns:
            (B, embed_dim), as of `encode_image`.

        Raises:
            ValueError: as of `encode_image`.
        """
        batch, count = frames.shape[:2]
        kept = kept if kept is None else kept.repeat_interleave(count, 0)
        features = self.encode_image(frames.flatten(0, 1), kept=kept)
        return _maybe_normalized(features.view(batch, count, -1).mean(1), normalize)

    def encode_text(self, ids: Tensor, *, normalize: bool = False) -> Tensor:
        """Features of captions.

        Args:
            ids: (B, N) int32 or int64 token ids, N at most the context; the largest id of a row ends its text.
            normalize: scale the features to length 1, in float32.

        Returns:
            (B, embed_dim) in autocast's dtype, or that of the parameters without autocast; float32 if normalised.

        Raises:
            ValueError: the shape does not fit the tower.
        """
        return _maybe_normalized(self.text(ids), normalize)

    def forward(self, images: Tensor, ids: Tensor, *, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image features, normalised text features (B, embed_dim), and the scale of their logits ().

        Images with five dimensions are videos, as in `encode_video`.
        """
        encode = self.encode_video if images.ndim == 5 else self.encode_image
        image_features = encode(images, kept=kept, normalize=True)
        return image_features, self.encode_text(ids, normalize=True), self.logit_scale.exp()

    def set_checkpointing(self, how: Checkpointing | bool = "block") -> None:
        """What blocks keep for the backward pass, which computes the rest again.

        "none": all; "block" or True: one tensor each; "selective": results of matrix products and attention, too.
        """
        if how not in (True, False, "none", "block", "selective"):
            raise ValueError(f'checkpointing is {how!r}; allowed are "none", "block", "selective", True and False')
        known: Checkpointing = ("block" if how else "none") if isinstance(how, bool) else how
        self.visual.checkpointing = self.text.checkpointing = known

    def reset_parameters(self) -> None:
        """Draw initial values from torch's generator, as after `to_empty`."""
        self.visual.reset_parameters()
        self.text.reset_parameters()
        nn.init.constant_(self.logit_scale, self.config.logit_scale_init)


def _maybe_normalized(features: Tensor, wanted: bool) -> Tensor:
    return normalize(features) if wanted else features
