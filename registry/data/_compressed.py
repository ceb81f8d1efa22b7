"""Opening of files of text that may be compressed (``.gz``, ``.zst``). Imports no torch."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from sedd_graph.data.reading import import_extra, unreadable
from sedd_graph.errors import UserError
from sedd_graph.inputs.files import open_file

MAX_FILE = 2**50
"""Size limit of a file that is read as a stream, in bytes."""


@contextmanager
def open_stream(path: Path, *, limit: int = MAX_FILE) -> Iterator[BinaryIO]:
    """Open a regular file for reading; its content is decompressed if its name ends in ``.gz`` or ``.zst``.

    Args:
        path: The file.
        limit: Largest accepted size of the file, as it lies on the disk, in bytes.

    Raises:
        UserError: The file cannot be read, or is not compressed as its name says; also from the ``with`` block, where the
            file is read.
        MissingExtraError: The file ends in ``.zst``, and the extra ``datasets`` is not installed.
    """
    with open_file(path, limit=limit) as raw:
        try:
            yield _decompressed(raw, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: cannot be decompressed: {error}") from None
        except OSError as error:
            if path.suffix == ".zst":
                raise UserError(f"{path}: cannot be decompressed: {error}") from None
            raise unreadable(path, error) from None


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix != ".zst":
        return raw
    pyarrow = import_extra("pyarrow", "a file compressed with Zstandard", extra="datasets")
    stream: IO[bytes] = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(cast(io.RawIOBase, _Reader(stream)), 2**20)


class _Reader(io.RawIOBase):
    """Stream of pyarrow as one that a buffer can read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # any writable buffer
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)
