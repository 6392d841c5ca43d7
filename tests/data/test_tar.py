"""The index of a tar against Python's tarfile, and what becomes of it when the tar changes or is damaged."""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from shard_files import write_tar

from evaclip.data import tar

LONG = "folder/" * 30 + "a name of a picture"


def contents(path, index):
    file = os.open(path, os.O_RDONLY)
    found = [tar.read(file, o, s) for o, s in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)]
    os.close(file)
    return dict(zip(index.names, found, strict=True))


def by_tarfile(path):
    with tarfile.open(path) as file:
        return {m.name: file.extractfile(m).read() for m in file if m.isreg()}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_contents_are_tarfiles(tmp_path, format):
    members = {"a.jpg": b"x" * 511, "a.txt": b"", "b.jpg": b"y" * 512, "sub/é.txt": b"z" * 513, "c.txt": b"\0" * 1024}
    members["d" * 90 + "/" + "e" * 90] = b"in ustar's prefix"
    if format != tarfile.USTAR_FORMAT:
        members |= {LONG + "1.jpg": b"long", "short": b"after", LONG + "2.jpg": b"longer"}
    path = write_tar(tmp_path / "a.tar", members, format)
    index = tar.scan(path)
    assert contents(path, index) == by_tarfile(path) == members
    assert list(members) == index.names and not index.problems


def test_folders_and_links_have_no_content(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("f", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "f"
            member.size = 3 if name == "f" else 0
            out.addfile(member, io.BytesIO(b"abc"))
    assert contents(tmp_path / "a.tar", tar.scan(tmp_path / "a.tar")) == {"f": b"abc"}


def test_sizes_in_base_256_and_in_pax_records_are_understood(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a": b"x" * 700, "b": b"y"})
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert contents(path, tar.scan(path)) == by_tarfile(path) == {"a": b"x" * 700, "b": b"y"}

    member = tarfile.TarInfo("a")
    member.pax_headers = {"size": "700"}  # counts in place of the header's
    record = member.create_pax_header({**member.get_info(), "size": 0}, "utf-8")
    path.write_bytes(record + b"x" * 700 + bytes(324) + tarfile.TarInfo("b").tobuf() + bytes(1024))
    assert contents(path, tar.scan(path)) == by_tarfile(path) == {"a": b"x" * 700, "b": b""}


def test_a_tar_that_is_cut_short_gives_what_is_whole_and_says_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a": b"x" * 600, "b": b"y" * 600})
    whole = path.read_bytes()
    for length, names, problem in (
        (3072, ["a", "b"], "without an end mark"),
        (512 + 1024 + 512 + 599, ["a"], "b is cut short: it has 599 of 600 bytes"),
        (512 + 1024 + 100, ["a"], "without an end mark"),
        (512 + 599, [], "a is cut short: it has 599 of 600 bytes"),
        (0, [], "without an end mark"),
    ):
        path.write_bytes(whole[:length])
        index = tar.scan(path)
        assert index.names == names and len(index.problems) == 1 and problem in index.problems[0]
    path.write_bytes(whole[:1536] + b"garbage!" * 64 + whole[2048:])
    assert tar.scan(path).names == ["a"]
    assert "no header at byte 1536" in tar.scan(path).problems[0]


def test_what_is_no_plain_tar_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a": b"x"})
    packed = tmp_path / "b.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"b\.tar is gzip; only a plain \.tar"):
        tar.scan(packed)
    packed.write_bytes(b"image,caption\n" * 100)
    with pytest.raises(ValueError, match=r"b\.tar is no tar"):
        tar.scan(packed)


def equal(a, b):
    return a.names == b.names and a.problems == b.problems and all(map(np.array_equal, a[1:3], b[1:3]))


def test_an_index_is_kept_until_the_tar_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", {"a\n.jpg": b"x", "é.txt": b"yy"})
    first = tar.index(path, tmp_path / "cache")
    assert equal(first, tar.scan(path)) and (tmp_path / "a.tar.index").exists() and not (tmp_path / "cache").exists()
    scan, scanned = tar.scan, []
    monkeypatch.setattr(tar, "scan", lambda path: scanned.append(path) or scan(path))
    assert equal(tar.index(path, tmp_path / "cache"), first) and not scanned
    time = path.stat().st_mtime_ns
    write_tar(path, {"b": b"z", "c": b"zz"})  # as many bytes
    os.utime(path, ns=(time, time + 1))
    assert tar.index(path, tmp_path / "cache").names == ["b", "c"]
    write_tar(path, {"b": b"z" * 20000})
    os.utime(path, ns=(time, time + 1))
    assert tar.index(path, tmp_path / "cache").names == ["b"]
    (tmp_path / "a.tar.index").write_bytes(b"PK\x03\x04 damaged")
    assert tar.index(path, tmp_path / "cache").names == ["b"] and len(scanned) == 3


def test_an_index_goes_to_the_cache_where_there_is_no_room_beside_the_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a": b"x"})
    (tmp_path / "a.tar.index").mkdir()  # nothing can be written there
    assert tar.index(path, tmp_path / "cache").names == ["a"]
    assert [p.name[:6] for p in (tmp_path / "cache" / "indexes").iterdir()] == ["a.tar-"]
    (tmp_path / "cache").rename(tmp_path / "other")
    (tmp_path / "cache").write_text("")  # nor there
    assert tar.index(path, tmp_path / "cache").names == ["a"]
    assert not list(tmp_path.rglob("*.partial"))
