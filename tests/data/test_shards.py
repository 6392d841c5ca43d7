"""Shards: which files a source stands for, which members are a sample, and copies of what lies elsewhere."""

import os
import pickle
import sys
from pathlib import Path

import pytest
from shard_files import jpeg, write_shards, write_tar

from evaclip.data import DataError
from evaclip.data.copies import Copies
from evaclip.data.shards import Shards, are_shards, expand


def touch(folder: Path, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{b,a}/{0..1}.tar", ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]),
        ("a/*.tar", ["a/0.tar", "a/1.tar"]),
        ("a/[1-9].tar::b/{0..0}.tar", ["a/1.tar", "b/0.tar"]),
        ("a", ["a/0.tar", "a/1.tar"]),
        ("a::b/1.tar", ["a/0.tar", "a/1.tar", "b/1.tar"]),
        ("pipe:cat {0..1}.tar", ["pipe:cat 0.tar", "pipe:cat 1.tar"]),
        ("s3://bucket/{0..1}.tar::pipe:echo ${HOME}", ["s3://bucket/0.tar", "s3://bucket/1.tar", "pipe:echo ${HOME}"]),
    ],
)
def test_patterns_are_written_out(source, names, tmp_path, monkeypatch):
    touch(tmp_path, "a/1.tar", "a/0.tar", "a/0.tar.index", "a/pack.json", "b/0.tar", "b/1.tar")
    monkeypatch.chdir(tmp_path)
    assert expand(source) == names and are_shards(source)


@pytest.mark.parametrize("source", ["b", "b/x.csv", "digits", "a.tar.gz", "b/tar", "0.tar::b"])
def test_other_sources_are_no_shards(source, tmp_path, monkeypatch):
    touch(tmp_path, "b/x.csv")
    monkeypatch.chdir(tmp_path)
    assert not are_shards(source)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x/*.tar", r"no file matches x/\*\.tar"),
        ("{3..1}.tar", r"\{3\.\.1\} in \{3\.\.1\}\.tar counts down"),
        ("{0..4}.tar", r"4 of the 5 shards \{0\.\.4\}\.tar do not exist: 1\.tar, 2\.tar, 3\.tar and 1 more"),
        ("0.tar::*.tar", r"names 1 shard\(s\) twice"),
    ],
)
def test_a_source_that_cannot_be_is_an_error(source, sentence, tmp_path, monkeypatch):
    touch(tmp_path, "0.tar")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        Shards(source, cache=tmp_path / "cache")


def members(tmp_path, names) -> Shards:
    path = write_tar(tmp_path / "a.tar", {name: name.encode() for name in names})
    return Shards(str(path), cache=tmp_path / "cache")


def test_a_sample_is_an_image_and_a_caption_of_one_key(tmp_path):
    names = "a.jpg a.txt a.json b.txt c.PNG c.TXT d/e.f/g.seg.png d/e.f/g.webp d/e.f/g.caption h.cls h.txt .i.jpg noext"
    shards = members(tmp_path, [*names.split(), "j.jpeg", "k.txt"])
    found = shards.samples(0)
    assert [(s.key, s.media_suffix, s.caption_suffix) for s in found] == [
        ("a", "jpg", "txt"),
        ("c", "png", "txt"),
        ("d/e.f/g", "webp", "caption"),
    ]
    assert [shards.read(0, s) for s in found] == [
        (b"a.jpg", ["a.txt"]),
        (b"c.PNG", ["c.TXT"]),
        (b"d/e.f/g.webp", ["d/e.f/g.caption"]),
    ]
    assert shards.counts().tolist() == [3]


def test_samples_are_those_of_the_webdataset_package(tmp_path):
    wds = pytest.importorskip("webdataset")
    source = write_shards(tmp_path, [3, 2])
    names = {
        "x/1.jpg": jpeg(1),
        "x/1.txt": b"\xc3\xa9 one",
        "x/2.TXT": b"two",
        "x/2.Png": jpeg(2),
        "3.txt": b"no image",
    }
    write_tar(tmp_path / "002.tar", names)
    source = source.replace("001}", "002}")
    theirs = list(wds.WebDataset(source, shardshuffle=False))
    theirs = [(s["__key__"], s.get("jpg") or s["png"], s["txt"].decode()) for s in theirs if "jpg" in s or "png" in s]
    shards = Shards(source, cache=tmp_path / "cache")
    ours = [(s.key, *shards.read(i, s)) for i in range(3) for s in shards.samples(i)]
    assert [(key, image, captions[0]) for key, image, captions in ours] == theirs and len(ours) == 7


def test_of_several_captions_all_are_offered(tmp_path):
    write_tar(
        tmp_path / "a.tar", {"a.jpg": b"x", "a.txt": b"one", "a.captions.json": b'{"captions": ["one", " two "]}'}
    )
    shards = Shards(str(tmp_path / "a.tar"), cache=tmp_path / "cache")
    assert shards.read(0, shards.samples(0)[0]) == (b"x", ["one", "two"])


def test_shards_can_be_sent_to_another_process(tmp_path):
    shards = Shards(write_shards(tmp_path, [2, 1]), cache=tmp_path / "cache")
    read = shards.read(1, shards.samples(1)[0])
    again = pickle.loads(pickle.dumps(shards))
    assert again.read(1, again.samples(1)[0]) == read


def test_counts_are_kept_until_a_shard_changes(tmp_path, monkeypatch):
    source, cache = write_shards(tmp_path, [2, 1]), tmp_path / "cache"
    assert Shards(source, cache=cache).counts().tolist() == [2, 1]
    monkeypatch.setattr(Shards, "_grouped", lambda self, shard: pytest.fail("read again"))
    assert Shards(source, cache=cache).counts().tolist() == [2, 1]
    monkeypatch.undo()
    write_shards(tmp_path, [2, 3])
    assert Shards(source, cache=cache).counts().tolist() == [2, 3]


def test_a_pipe_is_copied_once(tmp_path):
    source = write_shards(tmp_path / "far", [2, 3])
    command = f"pipe:echo x >> {tmp_path}/called && cat {source}"
    for _ in range(2):
        shards = Shards(command, cache=tmp_path / "cache")
        assert shards.counts().tolist() == [2, 3]
        near = Shards(source, cache=tmp_path / "other")
        assert shards.read(1, shards.samples(1)[2]) == near.read(1, near.samples(1)[2])
    assert (tmp_path / "called").read_text() == "x\n" * 2
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 2


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            f"{sys.executable} -c \"raise OSError('no such bucket')\"",
            r"failed 3 times; exit code 1: OSError: no such bucket",
        ),
        ("head -c 100 /dev/zero; exit 3", "exit code 3: no message"),
        ("false | echo half", "exit code 1: no message"),
        ("true", "it wrote nothing"),
    ],
)
def test_a_command_that_fails_leaves_no_shard(command, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match=sentence):
        Copies(tmp_path).use(f"pipe:{command}", lambda path: pytest.fail("there is no copy"))
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_a_command_that_fails_once_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    flag = tmp_path / "flag"
    command = f"if [ -e {flag} ]; then echo tar; else touch {flag}; echo half; exit 1; fi"
    assert Copies(tmp_path / "copies").use(f"pipe:{command}", Path.read_text) == "tar\n"


def test_addresses_become_commands(tmp_path, monkeypatch):
    for name in ("aws", "gcloud", "curl"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0 $@"')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    called = [
        Copies(tmp_path / "cache").use(url, Path.read_text).removeprefix(f"{tmp_path}/").strip()
        for url in ("s3://b/a b.tar", "gs://b/1.tar", "https://x/'1'.tar")
    ]
    assert called == [
        "aws s3 cp --only-show-errors s3://b/a b.tar -",
        "gcloud storage cat gs://b/1.tar",
        "curl -fsSL https://x/'1'.tar",
    ]


def test_a_shard_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "a.tar").write_text("x" * 600)
    with pytest.raises(DataError, match=r"the shard .*a\.tar cannot be read: .* is no tar"):
        Shards(str(tmp_path / "a.tar"), cache=tmp_path / "cache").counts()


def copies_of(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.glob("*.tar"))


def test_copies_used_longest_ago_make_room_for_a_new_one(tmp_path):
    copies = Copies(tmp_path, room=20)
    a, b, c = (f"pipe:echo x >> {tmp_path}/called-{name} && printf {name * 8}" for name in "abc")
    for url in (a, b, a):
        copies.use(url, Path.read_text)
    assert copies.use(c, Path.read_text) == "c" * 8
    assert copies_of(tmp_path) == [b"a" * 8, b"c" * 8]
    assert copies.use(b, Path.read_text) == "b" * 8  # made again
    assert copies_of(tmp_path) == [b"b" * 8, b"c" * 8]
    assert [(tmp_path / f"called-{name}").read_text().count("x") for name in "abc"] == [1, 2, 1]
    assert Copies(tmp_path, room=1).use(a, Path.read_text) == "a" * 8  # larger than the room
    assert copies_of(tmp_path) == [b"a" * 8]


def test_a_copy_that_is_removed_before_it_is_opened_is_made_again(tmp_path):
    def read(path):
        if not (tmp_path / "flag").exists():
            (tmp_path / "flag").touch()
            path.unlink()
        return path.read_text()

    assert Copies(tmp_path).use("pipe:echo tar", read) == "tar\n"
    with pytest.raises(FileNotFoundError):
        Copies(tmp_path).use("pipe:echo tar", lambda path: path.unlink() or path.read_text())


def test_samples_are_the_same_however_little_room_there_is(tmp_path):
    source = write_shards(tmp_path / "far", [3, 2, 4])
    shards = Shards(f"pipe:cat {source}", cache=tmp_path / "cache", room=1)
    near = Shards(source, cache=tmp_path / "other")
    assert shards.counts().tolist() == [3, 2, 4]
    for shard in (0, 2, 1, 0, 2, 1):
        for sample in near.samples(shard):
            assert shards.read(shard, sample) == near.read(shard, sample)
    left = list((tmp_path / "cache" / "shards").glob("*.tar*"))
    assert len([path for path in left if path.suffix == ".tar"]) == 1 and len(left) <= 2  # its index beside it
