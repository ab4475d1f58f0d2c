from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from headstart.datasets import shards
from headstart.datasets.images import IMAGE_SUFFIXES
from headstart.datasets.shards import Member
from headstart.errors import DataError, ImageError

FILES = {"a.jpg": b"first", "a.json": b"{}", "sub/b.PNG": b"second" * 300, "c.txt": b"words", "d.webp": b"third"}


def entry(name: str, size: int = 0, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def pack(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.addfile(entry(name, len(content)), io.BytesIO(content))
    return path


def read(shard: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    notes: list[str] = []
    return list(shards.images_in(shard, IMAGE_SUFFIXES, notes.append, lambda place: None)), notes


def names(shard: Path) -> list[str]:
    return [name for name, _, _ in read(shard)[0]]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_are_found_where_they_lie(tmp_path: Path, tar_format: int) -> None:
    shard = pack(tmp_path / "s.tar", FILES, tar_format)
    found, notes = read(shard)
    assert notes == []
    assert [name for name, _, _ in found] == ["a.jpg", "sub/b.PNG", "d.webp"]
    for name, offset, size in found:
        with Member(shard, name, offset, size).open() as handle:
            assert handle.read() == FILES[name]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, tar_format: int) -> None:
    wanted = ["x" * 90 + "/" + "y" * 150 + ".jpg", "Фото/写真.jpg"]
    assert names(pack(tmp_path / "s.tar", dict.fromkeys(wanted, b"1"), tar_format)) == wanted


def test_names_are_tidied_and_hidden_files_left_out(tmp_path: Path) -> None:
    files = dict.fromkeys(["./a.jpg", "b//c.jpg", "._a.jpg", ".cache/d.jpg", "b/./e.jpg"], b"1")
    assert names(pack(tmp_path / "s.tar", files)) == ["a.jpg", "b/c.jpg", "b/e.jpg"]


def test_what_is_not_a_plain_file_inside_is_left_out_and_said(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.addfile(entry("good.jpg", 1), io.BytesIO(b"1"))
        archive.addfile(entry("soft.jpg", type=tarfile.SYMTYPE, linkname=str(secret)))
        archive.addfile(entry("hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg"))
        archive.addfile(entry("pipe.jpg", type=tarfile.FIFOTYPE))
        archive.addfile(entry("disk.jpg", type=tarfile.BLKTYPE))
        archive.addfile(entry("folder.jpg", type=tarfile.DIRTYPE))
        archive.addfile(entry("../out.jpg", 1), io.BytesIO(b"1"))
        archive.addfile(entry(str(secret), 1), io.BytesIO(b"1"))
        archive.addfile(entry("\udcff.jpg", 1), io.BytesIO(b"1"))
        archive.addfile(entry("link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
    found, (note,) = read(tmp_path / "s.tar")
    assert [name for name, _, _ in found] == ["good.jpg"]
    assert note == (
        f"{tmp_path}/s.tar: left out 2 devices or pipes, 2 links, "
        "1 with names that are not UTF-8, 2 with names that lead out of it"
    )


def test_sparse_files_are_left_out(tmp_path: Path) -> None:
    header = bytearray(entry("holes.jpg", 512).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"00000000000\x0000000001000\x00"  # one piece: 512 bytes at 0
    header[483:495] = b"00000002000\x00"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + bytes(512) + pack(tmp_path / "r.tar", FILES).read_bytes())
    found, (note,) = read(tmp_path / "s.tar")
    assert [name for name, _, _ in found] == ["a.jpg", "sub/b.PNG", "d.webp"]
    assert note.endswith("left out 1 stored as sparse files")


def test_a_shard_that_ends_too_early_gives_what_is_whole(tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", {f"{i}.jpg": bytes([i]) * 1000 for i in range(5)})
    whole = shard.read_bytes()
    # Each file has a block of header and two of content.
    shard.write_bytes(whole[: 3 * 1536])
    found, (note,) = read(shard)
    assert len(found) == 3
    assert "ends at byte 4,608 without the end mark of a tar, as when its writer was killed" in note
    assert "the 3 images up to there count" in note
    shard.write_bytes(whole[: 3 * 1536 + 512 + 700])
    found, (note,) = read(shard)
    assert "is cut off at byte 5,820, in the middle of a file" in note
    with Member(shard, *found[2]).open() as handle:
        assert handle.read() == bytes([2]) * 1000
    with pytest.raises(ImageError, match=r"s\.tar/3\.jpg: cut off, its shard ends in the middle of it"):
        Member(shard, *found[3]).open()
    shard.write_bytes(whole[: 3 * 1536 + 100])
    assert len(read(shard)[0]) == 3
    assert "ends at byte 4,708 without the end mark" in read(shard)[1][0]


@pytest.mark.parametrize("place", [0, 124, 148, 257])  # name, size, checksum, magic
def test_a_damaged_header_ends_the_shard(tmp_path: Path, place: int) -> None:
    shard = pack(tmp_path / "s.tar", {f"{i}.jpg": bytes([i]) * 1000 for i in range(5)})
    content = bytearray(shard.read_bytes())
    content[3 * 1536 + place : 3 * 1536 + place + 4] = b"\xff\x00\xfe\x01"
    shard.write_bytes(content)
    found, (note,) = read(shard)
    assert len(found) == 3
    assert "is damaged, or cut off, at byte 4,608" in note


def test_a_negative_size_does_not_go_round_in_circles(tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", {f"{i}.jpg": b"1" for i in range(3)})
    content = bytearray(shard.read_bytes())
    header = content[1024:1536]
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024 in base 256: back to the header itself
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    shard.write_bytes(content)
    found, (note,) = read(shard)
    assert [name for name, _, _ in found] == ["0.jpg"]
    assert "is damaged, or cut off, at byte 1,024" in note


def test_compressed_and_other_files_are_refused(tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", FILES)
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match=r"packed\.tar: is compressed \(gzip\); expected a plain \.tar .* Decompress"):
        read(packed)
    (tmp_path / "text.tar").write_text("hello " * 200)
    with pytest.raises(DataError, match=r"text\.tar: not a tar file"):
        read(tmp_path / "text.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.tar: not a tar file \(empty file\)"):
        read(tmp_path / "empty.tar")
    assert read(pack(tmp_path / "none.tar", {})) == ([], [])


def test_a_member_reads_like_a_file_of_its_own(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(5000)
    shard = pack(tmp_path / "s.tar", {"x.jpg": b"before", "y.jpg": content, "z.jpg": b"after"})
    rng = random.Random(1)
    plain = io.BytesIO(content)
    with Member(shard, *read(shard)[0][1]).open() as handle:
        for _ in range(200):
            place, count = rng.randint(0, 6000), rng.randint(0, 2000)
            how = rng.choice([io.SEEK_SET, io.SEEK_END])
            if how == io.SEEK_END:
                place = -min(place, 5000)
            assert handle.seek(place, how) == plain.seek(place, how)
            assert handle.read(count) == plain.read(count)
            assert handle.tell() == plain.tell()
        with pytest.raises(ValueError, match="negative"):
            handle.raw.seek(-1)
