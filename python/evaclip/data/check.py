"""What is in shards, and what of it is broken: `evaclip data check`."""

import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from evaclip.data import tar
from evaclip.data.common import DataError
from evaclip.data.preprocess import ImageError, named_error, open_bytes
from evaclip.data.shards import Shards, grouped
from evaclip.data.video import video_frames

SHOWN = 20  # broken samples named


@dataclass(frozen=True, kw_only=True)
class Check:
    """What `evaclip data check SOURCE` can be told."""

    decode: bool = True
    """Decode every image; else captions and images are only read."""
    video: bool = False
    """The samples are videos."""
    workers: int = 4
    """Processes that check a shard each."""
    cache: Path = tar.CACHE
    """Folder for copies of shards from elsewhere and for indexes."""
    output: Path | None = None
    """A JSON file for the report."""


@dataclass
class Report:
    """What was found in one shard or several."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    media_bytes: int = 0
    caption_bytes: int = 0
    left_out: int = 0
    """Keys without an image (or video), or without a caption."""
    suffixes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Samples that cannot be read, with reasons."""
    problems: list[str] = field(default_factory=list)
    """Shards that are not whole, with reasons."""

    def __iadd__(self, other: "Report") -> "Report":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def sound(self) -> bool:
        """Whether there are samples, and all that was found can be read."""
        return bool(self.samples) and not self.broken and not self.problems


def check(source: str, options: Check, say: Callable[[str], None] = print) -> Report:
    """Read every sample of the shards that a source stands for; their indexes are written by the way.

    Raises:
        ValueError: no such shards.
    """
    shards = Shards(source, cache=options.cache, video=options.video)
    total, began = Report(), time.monotonic()
    one = partial(check_shard, shards, decode=options.decode)
    told = began
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaclip.data.check"])
    workers = min(max(1, options.workers), len(shards))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = [pool.submit(one, shard) for shard in range(len(shards))]
        for future in as_completed(running):
            try:
                total += future.result()
            except BrokenProcessPool as error:
                raise DataError(f"a process that checks shards died, perhaps for want of memory: {error}") from error
            if time.monotonic() > told + 10:
                told = time.monotonic()
                rate = total.samples / (told - began)
                say(f"{total.shards} of {len(shards)} shards, {total.samples} samples, {rate:.0f} samples/s")
    total.broken.sort()
    total.problems.sort()
    _show(total, options, workers, time.monotonic() - began, say)
    return total


def check_shard(shards: Shards, shard: int, decode: bool = True) -> Report:
    """The report of one shard."""
    report = Report(shards=1)
    try:
        index, report.bytes = shards.index(shard), shards.size(shard)
    except DataError as error:
        report.problems.append(str(error))
        return report
    report.problems += [f"{shards.urls[shard]}: {problem}" for problem in index.problems]
    for _, members in grouped(index):
        report.suffixes.update(list(members))
        report.left_out += 1
    samples = shards.samples_of(index)
    report.samples, report.left_out = len(samples), report.left_out - len(samples)
    for sample in samples:
        name = shards.name(shard, sample)
        report.media_bytes += sample.media[1]
        report.caption_bytes += sample.caption[1]
        try:
            with named_error(name):
                data, _ = shards.read(shard, sample)
            if shards.video and decode:
                video_frames(data, sample.media_suffix, 8, name=name)
            elif decode:
                open_bytes(data, name=name)
        except ImageError as error:
            report.broken.append(str(error))
    return report


def _show(report: Report, options: Check, workers: int, seconds: float, say: Callable[[str], None]) -> None:
    n, kind = max(1, report.samples), "video" if options.video else "image"
    say(f"shards     {report.shards}, {report.bytes / 1e6:.1f} MB")
    say(f"samples    {report.samples}, {report.samples / max(1, report.shards):.0f} in a shard")
    say(f"{kind}s     {report.media_bytes / n / 1e3:.1f} kB each; captions {report.caption_bytes / n:.0f} bytes each")
    say(f"members    {', '.join(f'{count} .{suffix}' for suffix, count in report.suffixes.most_common(10))}")
    say(f"left out   {report.left_out} without {kind} or caption")
    share = len(report.broken) / n
    say(f"broken     {len(report.broken)} samples ({share:.2%}), shards with problems: {len(report.problems)}")
    for line in [*report.problems[:SHOWN], *report.broken[:SHOWN]]:
        say(f"  {line}")
    more = sum(max(0, len(lines) - SHOWN) for lines in (report.problems, report.broken))
    if more:
        say(f"  and {more} more" + ("" if options.output else "; --output FILE lists them all"))
    done = "read and decoded" if options.decode else "read"
    say(f"{done} in {seconds:.1f} s, {report.samples / seconds:.0f} samples/s with {workers} processes")
    sys.stdout.flush()
