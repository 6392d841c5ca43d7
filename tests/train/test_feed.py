"""Batches on their way to a device: each step has its own, whoever reads ahead."""

import pytest
import torch

from evaclip.data.common import DataError
from evaclip.train.feed import Feed

STEPS = 5


def pixels(step):
    return torch.arange(step, step + 2 * 3 * 8 * 8).to(torch.uint8).view(2, 3, 8, 8)


class Numbers:
    """Batches of pixels that begin with the number of their step; it tells which were read."""

    def __init__(self, broken=None):
        self.read, self.names, self.broken = [], [], broken

    def batch(self, step):
        self.read.append(step)
        self.names = [f"sample of step {step}"]
        if step == self.broken:
            raise DataError("unreadable")
        return pixels(step), torch.full((2, 7), step)


class Stream:
    """In the place of one of CUDA's, and of its context, and of an event."""

    def __init__(self, device=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def record_event(self):
        return self

    def wait_event(self, event):
        pass


@pytest.fixture
def streams(monkeypatch):
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


def feed_of(source, ahead):
    """A feed for the CPU, which reads ahead as one for a GPU does."""
    feed = Feed(source, torch.device("cuda" if ahead else "cpu"), STEPS)
    feed.device = torch.device("cpu")
    return feed


def check(feed, step):
    images, ids = feed.batch(step)
    assert torch.equal(images, pixels(step))
    assert torch.equal(ids, torch.full((2, 7), step))
    assert feed.names == [f"sample of step {step}"]


@pytest.mark.parametrize("ahead", [False, True])
def test_each_step_has_its_batch_and_its_names(ahead, streams):
    source = Numbers()
    feed = feed_of(source, ahead)
    for step in (2, 3, 0, 1, 2, 3, 4):  # also where a run goes on, or back
        check(feed, step)
    if ahead:
        feed.thread.shutdown()
        assert source.read == [2, 3, 4, 0, 1, 2, 3, 4]  # one ahead, and none beyond the last
    else:
        assert source.read == [2, 3, 0, 1, 2, 3, 4]


def test_an_error_comes_with_its_own_step(streams):
    feed = feed_of(Numbers(broken=2), ahead=True)
    check(feed, 0)
    check(feed, 1)
    with pytest.raises(DataError, match="unreadable"):
        feed.batch(2)
    check(feed, 3)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_the_cpu():
    feeds = [Feed(Numbers(), torch.device(device), STEPS) for device in ("cpu", "cuda")]
    for step in range(STEPS):
        (images, ids), (images_there, ids_there) = (feed.batch(step) for feed in feeds)
        assert images_there.is_cuda and torch.equal(images_there.cpu(), images) and torch.equal(ids_there.cpu(), ids)
