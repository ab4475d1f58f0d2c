"""Tar shards (as webdataset's and img2dataset's): where each image lies in them; read in place, never unpacked."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from headstart.errors import DataError, ImageError

BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


@dataclass(frozen=True)
class Member:
    """A file in a shard: ``size`` bytes at ``offset``."""

    shard: Path
    name: str  # inside the shard, /-separated
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def open(self) -> BinaryIO:
        """Its bytes as a seekable file.

        The shard is opened anew each time: a handle kept open would be shared, position and all, with forked
        processes.

        Raises:
            ImageError: the shard ends before the file does.
            OSError: the shard can't be read.
        """
        handle = open(self.shard, "rb", buffering=0)  # noqa: SIM115 - closed by the stream that is returned
        if handle.seek(0, io.SEEK_END) < self.offset + self.size:
            handle.close()
            raise ImageError(f"{self}: cut off, its shard ends in the middle of it")
        return io.BufferedReader(_Region(handle, self.offset, self.size))


class _Region(io.RawIOBase):
    """Bytes [offset, offset + size) of a file as a file."""

    def __init__(self, handle: io.FileIO, offset: int, size: int) -> None:
        self._handle, self._offset, self._size = handle, offset, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative position {start + offset}")
        self._place = start + offset
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(0, self._size - self._place))
        self._handle.seek(self._offset + self._place)
        count = self._handle.readinto(memoryview(buffer)[:wanted])
        self._place += count
        return count

    def close(self) -> None:
        self._handle.close()
        super().close()


def images_in(
    shard: Path, suffixes: frozenset[str], note: Callable[[str], None], reached: Callable[[int], None]
) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the images in ``shard``, in their order there, from the headers alone.

    A name may come twice: the later one counts, as when the shard is unpacked. Other files, folders and hidden
    files are left out. What is not a plain file inside the shard (links, devices, sparse files, names that lead
    outside) is left out with a note; so is what comes after a damaged place.

    Args:
        suffixes: of images, lower case.
        note: is told what is wrong with the shard.
        reached: is told now and then how many bytes have been passed.

    Raises:
        DataError: no tar file, compressed, or not readable.
    """
    left_out: Counter[str] = Counter()
    found = 0
    with _opened(shard) as archive:
        start = 0
        while True:
            try:
                info = archive.next()
            # Damaged headers make tarfile raise much besides TarError: ValueError, OverflowError, RecursionError ...
            except Exception as error:
                note(f"{shard}: {_ending(shard, start, found, str(error) or type(error).__name__)}")
                break
            if info is None:
                if problem := _ending(shard, archive.offset, found):
                    note(f"{shard}: {problem}")
                break
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if archive.offset <= info.offset or info.size < 0:  # it would come back here for ever
                note(f"{shard}: {_ending(shard, info.offset, found, 'a file of negative size')}")
                break
            start = archive.offset
            reached(start)
            path = PurePosixPath(info.name)
            hidden = any(part.startswith(".") and part != ".." for part in path.parts)
            if info.isdir() or hidden or path.suffix.lower() not in suffixes:
                continue
            if why := _unusable(info, path):
                left_out[why] += 1
            else:
                found += 1
                yield str(path), info.offset_data, info.size
    if left_out:
        what = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
        note(f"{shard}: left out {what}")


def _unusable(info: tarfile.TarInfo, path: PurePosixPath) -> str | None:
    if info.issparse():
        return "stored as sparse files"
    if info.issym() or info.islnk():
        return "links"
    if not info.isreg():
        return "devices or pipes"
    if path.is_absolute() or ".." in path.parts:
        return "with names that lead out of it"
    try:
        info.name.encode("utf-8")
    except UnicodeEncodeError:
        return "with names that are not UTF-8"
    return None


def _opened(shard: Path) -> tarfile.TarFile:
    try:
        with open(shard, "rb") as handle:
            beginning = handle.read(8)
        kind = next((kind for magic, kind in _COMPRESSED.items() if beginning.startswith(magic)), None)
        if kind is not None:
            raise compressed(shard, kind)
        return tarfile.open(shard, "r:")
    except tarfile.TarError as error:
        raise DataError(f"{shard}: not a tar file ({error})") from None
    except OSError as error:
        raise DataError(f"{shard}: can't be read ({error.strerror or error})") from None


def compressed(shard: Path, kind: str = "") -> DataError:
    return DataError(
        f"{shard}: is compressed{kind and f' ({kind})'}; expected a plain .tar file. Decompress it: images are "
        "compressed already, so that it hardly grows, and only then can one image be read without all before it."
    )


def _ending(shard: Path, offset: int, found: int, reason: str = "") -> str:
    """What is wrong where tarfile found no further header; "" when the shard ends as it should."""
    with open(shard, "rb") as handle:
        total = handle.seek(0, io.SEEK_END)
        handle.seek(min(offset, total))
        block = handle.read(BLOCK)
    if not reason and len(block) == BLOCK and not any(block):
        return ""
    used = f"what follows is lost, the {found:,} images up to there count"
    if offset > total:
        return f"is cut off at byte {total:,}, in the middle of a file; {used}"
    if len(block) < BLOCK:
        return f"ends at byte {total:,} without the end mark of a tar, as when its writer was killed; {used}"
    return f"is damaged, or cut off, at byte {offset:,}{reason and f' ({reason})'}; {used}"
