"""`evaclip data pack` and `check`: what goes in comes out, the same each time, also after an interruption."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from shard_files import BROKEN, jpeg, write_shards, write_tar

from evaclip.cli import main
from evaclip.data import ImageCaptions
from evaclip.data.check import Check, check
from evaclip.data.pack import Pack, pack
from evaclip.data.shards import Shards


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of 23 pictures; every third has two captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(23):
        (folder / f"{n:02}.{'JPG' if n == 5 else 'jpg'}").write_bytes(jpeg(n))
        (folder / f"{n:02}.txt").write_text(f"number {n}\n" + (f"zahl {n} ü\n" if n % 3 == 0 else ""), encoding="utf-8")
    return folder


def pairs(shards: Path) -> dict[bytes, list[str]]:
    found = Shards(str(shards), cache=shards / "cache")
    return dict(found.read(i, sample) for i in range(len(found)) for sample in found.samples(i))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.tar"))}


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("table", [None, "t.csv", "t.jsonl", "t.parquet"])
def test_what_is_packed_can_be_read_back(images, tmp_path, table):
    source, expected = images, ImageCaptions(images)
    rows = list(zip([p.name for p in expected.images], expected.captions, strict=True))
    if table == "t.csv":
        lines = [f'{name},"{caption}"\n' for name, captions in rows for caption in captions]
        (images / table).write_text("image,caption\n" + "".join(lines), encoding="utf-8")
    elif table == "t.jsonl":
        lines = [json.dumps({"image": name, "caption": captions}) + "\n" for name, captions in rows]
        (images / table).write_text("".join(lines))
    elif table == "t.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {
            "image": [{"bytes": (images / n).read_bytes(), "path": None} for n, _ in rows],
            "caption": [c for _, c in rows],
        }
        parquet.write_table(pyarrow.table(columns), images / table)
    if table:
        source = images / table
    assert pack(source, tmp_path / "out", Pack(max_samples=10), quiet) == (3, 23)
    assert pairs(tmp_path / "out") == {
        p.read_bytes(): c for p, c in zip(expected.images, expected.captions, strict=True)
    }
    counts = Shards(str(tmp_path / "out"), cache=tmp_path / "cache").counts()
    assert counts.tolist() == [10, 10, 3]


def test_packing_is_deterministic_and_shuffled_by_its_seed(images, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack(images, tmp_path / name, Pack(max_samples=10, seed=seed), quiet)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    order = list(pairs(tmp_path / "a"))
    assert order != [jpeg(n) for n in range(23)] and sorted(order) == sorted(jpeg(n) for n in range(23))


def test_other_programs_read_the_first_caption_of_each(images, tmp_path):
    pack(images, tmp_path / "out", Pack(), quiet)
    with tarfile.open(tmp_path / "out" / "000000.tar") as file:
        members = {m.name: file.extractfile(m).read() for m in file}
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in file.getmembers()} == {(0, 0, 0, "")}
    assert sum(name.endswith(".jpg") for name in members) == sum(name.endswith(".txt") for name in members) == 23
    assert all(text.startswith(b"number") for name, text in members.items() if name.endswith(".txt"))


def test_shards_stay_below_their_size(tmp_path):
    (tmp_path / "in").mkdir()
    for n, size in enumerate([400_000, 400_000, 1_500_000, 300_000, 690_000]):
        (tmp_path / "in" / f"{n}.jpg").write_bytes(bytes(size))
        (tmp_path / "in" / f"{n}.txt").write_text("x")
    assert pack(tmp_path / "in", tmp_path / "out", Pack(max_size=1), quiet)[1] == 5
    for name, data in contents(tmp_path / "out").items():
        with tarfile.open(fileobj=io.BytesIO(data)) as file:
            assert len(file.getmembers()) == 2 or len(data) <= 1_000_000 + 10_240, name  # tar's padding


@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_packing_goes_on_where_it_was_interrupted(images, tmp_path, interrupted, monkeypatch):
    pack(images, tmp_path / "whole", Pack(max_samples=8), quiet)
    done = []

    def read(path):  # dies in the middle of a shard
        done.append(path)
        if len(done) == 8 * interrupted + 5:
            raise OSError("the disk went away")
        return original(path)

    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(OSError, match="went away"):
        pack(images, tmp_path / "out", Pack(max_samples=8), quiet)
    monkeypatch.undo()
    assert len(contents(tmp_path / "out")) == interrupted
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert pack(images, tmp_path / "out", Pack(max_samples=8), quiet) == (3, 23)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_folder_of_other_shards_is_left_alone(images, tmp_path):
    pack(images, tmp_path / "out", Pack(max_samples=8), quiet)
    for changed in (Pack(max_samples=9), Pack(max_samples=8, seed=1)):
        with pytest.raises(ValueError, match="was begun with other images or limits"):
            pack(images, tmp_path / "out", changed, quiet)
    (images / "00.txt").write_text("another caption")
    with pytest.raises(ValueError, match="was begun with other images or limits"):
        pack(images, tmp_path / "out", Pack(max_samples=8), quiet)
    write_shards(tmp_path / "other", [2])
    before = contents(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds shards that `evaclip data pack` did not write \(.*000\.tar\)"):
        pack(images, tmp_path / "other", Pack(), quiet)
    assert contents(tmp_path / "other") == before


def test_what_is_no_image_or_video_is_not_packed(tmp_path):
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "t.csv").write_text("image,caption\nx.pdf,a page\n")
    with pytest.raises(ValueError, match=r"x\.pdf is neither an image \(jpg, .* nor a video \(mp4,"):
        pack(tmp_path / "t.csv", tmp_path / "out", Pack(), quiet)
    with pytest.raises(ValueError, match="max_samples is 0"):
        pack(tmp_path / "t.csv", tmp_path / "out", Pack(max_samples=0), quiet)


def test_check_counts_and_finds_what_is_broken(tmp_path):
    write_shards(tmp_path, [6, 4], broken=[2, 7])
    members = {"a.jpg": jpeg(0), "a.txt": b"x", "b.jpg": jpeg(1), "c.txt": b"y", "d.jpg": jpeg(2), "d.txt": b"\xff"}
    path = write_tar(tmp_path / "002.tar", members)
    path.write_bytes(path.read_bytes() + b"")
    cut = (tmp_path / "003.tar", write_tar(tmp_path / "003.tar", {"e.jpg": jpeg(0), "e.txt": b"x", "f.jpg": jpeg(1)}))[
        0
    ]
    cut.write_bytes(cut.read_bytes()[: 512 + 1024 + 1024 + 600])
    (tmp_path / "004.tar").write_text("no tar")
    said = []
    report = check(str(tmp_path), Check(workers=2, cache=tmp_path / "cache"), said.append)
    assert (report.shards, report.samples, report.left_out) == (5, 13, 2) and not report.sound
    assert [line.split(": ")[1] for line in report.broken] == ["0002", "0007", "d"]
    assert len(report.problems) == 2 and "f.jpg is cut short" in report.problems[0] and "no tar" in report.problems[1]
    assert report.suffixes == {"jpg": 14, "txt": 14}
    text = "\n".join(said)
    assert "samples    13" in text and "3 samples (23.08%), shards with problems: 2" in text and "000.tar: 0002" in text
    undecoded = check(str(tmp_path), Check(workers=1, decode=False, cache=tmp_path / "cache"), quiet)
    assert [line.split(": ")[1] for line in undecoded.broken] == ["d"]


def test_the_command_line_packs_and_checks(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "pack", str(images), "out", "--max-samples", "10"]) == 0
    assert "23 samples in 3 shards. Next: evaclip data check out" in capsys.readouterr().out
    assert main(["data", "check", "out", "--workers", "1", "--output", "report.json"]) == 0
    assert "samples    23" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["samples"] == 23
    (tmp_path / "bad").mkdir()
    write_tar(tmp_path / "bad" / "0.tar", {"a.jpg": BROKEN, "a.txt": b"x"})
    assert main(["data", "check", "bad", "--workers", "1"]) == 1
    assert "bad/0.tar: a: UnidentifiedImageError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "what about data?"),
        (["pac"], "what about data?"),
        (["pack", "nowhere"], "then a folder for shards"),
        (["pack", "nowhere", "out"], "nowhere does not exist"),
        (["pack", "nowhere.parquet", "out"], "nowhere.parquet"),
        (["check"], "which shards?"),
        (["check", "{0..3}.tar"], "4 of the 4 shards {0..3}.tar do not exist"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    if "nowhere.parquet" in arguments:
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_images_may_be_of_any_kind_that_pillow_reads(tmp_path):
    (tmp_path / "in").mkdir()
    for kind in ("png", "webp", "gif", "bmp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "in" / f"{kind}.{kind}")
        (tmp_path / "in" / f"{kind}.txt").write_text(kind)
    pack(tmp_path / "in", tmp_path / "out", Pack(), quiet)
    assert check(str(tmp_path / "out"), Check(workers=1, cache=tmp_path / "cache"), quiet).sound
