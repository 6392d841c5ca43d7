"""Batches on the device they are trained on, the next one on its way while a step computes."""

import torch
from torch import Tensor

from evaclip.train.source import Ahead, Source


class Feed(Ahead):
    """The batches of a source on a device.

    On a GPU a thread reads the next batch while a step computes, and copies it from page-locked memory on a stream of
    its own.
    """

    def __init__(self, source: Source, device: torch.device, steps: int):
        on_gpu = device.type == "cuda"
        super().__init__(on_gpu, steps, device if on_gpu else None)
        self.source, self.device = source, device
        self.names: list[str] = []  # of the samples of the last batch
        self.stream = torch.cuda.Stream(device) if on_gpu else None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images or videos and token ids, as of `Source.batch`; errors are those of the source."""
        images, ids, self.names, copied = self.computed(step)
        if copied:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(copied)
            for tensor in (images, ids):
                tensor.record_stream(now)  # its memory is not to be used again before this stream has read it
        return images, ids

    def compute(self, step: int) -> tuple[Tensor, Tensor, list[str], torch.cuda.Event | None]:
        images, ids = self.source.batch(step)
        names = self.source.names
        with torch.cuda.stream(self.stream):  # None changes nothing
            images, ids = self._copied(images), self._copied(ids)
        return images, ids, names, self.stream.record_event() if self.stream else None

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.stream else tensor
