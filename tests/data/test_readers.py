"""Reader processes: they change nothing but the time, and none is missed in silence."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shard_files import jpeg, mixture, write_shards, write_tar

from evaclip.data import DataError
from evaclip.data.readers import Readers

RANK = dict(rank=1, world=2)


@pytest.fixture
def readers(tmp_path):
    """Makes readers of one data set, which end with the test."""
    source, made = write_shards(tmp_path / "shards", [9, 4, 12, 5], broken=[3]), []

    def make(workers, **options):
        made.append(Readers(mixture(source, cache=tmp_path, **RANK | options), workers))
        return made[-1]

    yield make
    for each in made:
        each.close()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_readers_gives_the_same_batches_in_order(readers, workers):
    alone, several = readers(0), readers(workers)
    assert all(same(alone.batch(step), several.batch(step)) for step in range(12))
    assert several.unreadable == alone.unreadable and several.unreadable.tried == alone.unreadable.tried
    for step in (40, 41, 3, 3, 4):  # a run that goes back, or on elsewhere
        assert same(alone.batch(step), several.batch(step))


def test_a_batch_stays_as_it_is_while_the_next_are_read(readers):
    several = readers(2)
    batches = [several.batch(step) for step in range(8)]
    alone = readers(0)
    assert all(same(batch, alone.batch(step)) for step, batch in enumerate(batches))


def test_resampled_mixtures_go_to_readers_too(readers):
    alone, several = readers(0, mode="resampled"), readers(2, mode="resampled")
    assert all(same(alone.batch(step), several.batch(step)) for step in range(4))


@pytest.mark.parametrize("mode", ["epoch", "resampled"])
def test_a_shard_that_is_cut_short_is_told_of_once_and_read(mode, readers, tmp_path, caplog):
    path = tmp_path / "shards/002.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    several, names = readers(2, mode=mode), []
    for step in range(12):
        several.batch(step)
        names += several.names
    (told,) = [message for message in caplog.messages if "what is whole of it is read" in message]
    assert told.startswith(f"{path}: ")
    assert any(name.startswith(f"{path}: ") for name in names)


def test_a_reader_that_dies_is_named_and_the_run_does_not_hang(readers):
    several = readers(2)
    several.batch(0)
    process = list(several._readers.values())[1]
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(
        DataError, match=rf"evaclip-reader-1 of rank 1 \(pid {process.pid}\) was killed by SIGKILL; .*memory"
    ):
        for step in range(1, 9):
            several.batch(step)


def test_signals_to_the_whole_group_leave_readers_at_work(readers):
    several, alone = readers(2), readers(0)
    several.batch(0)
    for process in several._readers.values():
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    assert all(same(several.batch(step), alone.batch(step)) for step in range(1, 6))


def test_an_error_in_a_reader_comes_with_the_step_that_it_spoils(tmp_path):
    members = {}
    for n in range(12):
        members |= {f"{n}.jpg": jpeg(n), f"{n}.txt": b"eleven" if n == 7 else b"%d" % n}
    source = str(write_tar(tmp_path / "a.tar", members))
    alone = Readers(mixture(source, cache=tmp_path, batch_size=2), 0)
    spoilt = next(step for step in range(6) if fails(alone, step))
    assert spoilt > 0  # else this shows nothing
    several = Readers(mixture(source, cache=tmp_path, batch_size=2), 2)
    assert [step for step in range(6) if fails(several, step)] == [spoilt]
    several.close()


def fails(readers, step) -> bool:
    try:
        readers.batch(step)
    except DataError as error:
        assert "'eleven'" in str(error)
        return True
    return False


def test_readers_end_with_the_process_that_they_read_for(tmp_path):
    source = write_shards(tmp_path / "shards", [9])
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from shard_files import mixture\n"
        "from evaclip.data.readers import Readers\n"
        "if __name__ == '__main__':\n"
        f"    readers = Readers(mixture({source!r}, cache=Path({str(tmp_path)!r})), 2)\n"
        "    readers.batch(0)\n"
        "    print(*(p.pid for p in readers._readers.values()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    tests = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    for _ in range(600):
        if not any(map(alive, pids)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{[pid for pid in pids if alive(pid)]} are still there")


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_closing_ends_the_readers(readers):
    several = readers(2)
    several.batch(0)
    processes = list(several._readers.values())
    several.close()
    assert not any(process.is_alive() for process in processes)
    assert not [p for p in multiprocessing.active_children() if p in processes]
