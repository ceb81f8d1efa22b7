"""Reading of untrusted ``.npy`` files, whose header is checked against the size of the file before memory is allocated.

A file is read whole (:func:`read_npy`), or mapped into memory (:func:`map_npy`), of which only what is used is read.
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sedd_graph.errors import UserError
from sedd_graph.inputs.files import open_file, size_text

__all__ = ["map_npy", "prefetch", "read_npy", "release_pages"]

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MAX_AXES = 32


def read_npy(path: Path, *, limit: int) -> npt.NDArray[Any]:
    """Return the array of numbers in a ``.npy`` file. Nothing is unpickled.

    Args:
        path: The file.
        limit: Largest accepted size of the file in bytes.

    Returns:
        The array, of integers or floating-point numbers, with the shape and the byte order of the file.

    Raises:
        UserError: The file is not a regular one, is too large, is not in the ``.npy`` format, does not hold numbers, or
            has fewer bytes than its header declares.
    """
    with open_file(path, limit=limit) as stream:
        shape, fortran, dtype = _header(stream, path)
        return _content(stream, path, shape, dtype, fortran=fortran, limit=limit)


def map_npy(path: Path, *, limit: int, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map the array in a ``.npy`` file into memory, read-only. Nothing is unpickled.

    Pages of the file are read when they are used. If the file is cut short afterwards, using the missing part ends the
    process (SIGBUS).

    Args:
        path: The file.
        limit: Largest accepted size of the file in bytes.
        dtypes: Accepted data types with byte order, such as ``<u2``.
        shape: The expected shape.

    Returns:
        The array in C order.

    Raises:
        UserError: The file is not a regular one, is too large, is not in the ``.npy`` format, has another type or shape,
            or has another size than its header declares.
    """
    with open_file(path, limit=limit) as stream:
        found, fortran, dtype = _header(stream, path)
        if dtype.str not in dtypes or found != shape or (fortran and len(shape) > 1):
            wanted = f"{' or '.join(dtypes)} of shape {shape}"
            raise UserError(f"{path}: holds {str(dtype.str)[:60]} of shape {str(found)[:60]}, not {wanted}")
        start, size = stream.tell(), os.fstat(stream.fileno()).st_size
        if size != start + math.prod(shape) * dtype.itemsize:
            declared = start + math.prod(shape) * dtype.itemsize
            raise UserError(f"{path}: has {size:,} bytes, not the {declared:,} that its header declares")
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        array = np.asarray(np.memmap(stream, dtype=dtype, mode="r", offset=start, shape=shape))
        if hasattr(mmap, "MADV_RANDOM"):  # else each use would read a hundred kilobytes around it
            _map_of(array).madvise(mmap.MADV_RANDOM)
        return array


def _map_of(array: npt.NDArray[Any]) -> mmap.mmap:
    """Return the memory map of an array of :func:`map_npy` that is not empty."""
    base: Any = array
    while not isinstance(base, mmap.mmap):
        base = base.base
    return base


def prefetch(array: npt.NDArray[Any], start: int, stop: int) -> None:
    """Ask the system to read items ``start`` to ``stop`` of a one-dimensional array of :func:`map_npy`, without waiting."""
    if not array.size or not hasattr(mmap, "MADV_WILLNEED"):
        return
    found = _map_of(array)
    before = len(found) - array.nbytes  # the header, which numpy maps too
    first = (before + start * array.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
    found.madvise(mmap.MADV_WILLNEED, first, min(len(found), before + stop * array.itemsize) - first)


def release_pages(array: npt.NDArray[Any]) -> None:
    """Remove the pages of an array of :func:`map_npy` from the memory of this process.

    They stay in the system's cache of files, and are mapped again when they are used. Without this, a process that reads a
    large file at random places would come to hold all of it. Does nothing where the system has no ``madvise``.
    """
    if array.size and hasattr(mmap, "MADV_DONTNEED"):
        _map_of(array).madvise(mmap.MADV_DONTNEED)


def _header(stream: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a ``.npy`` file of numbers: shape, whether the order is Fortran's, and data type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers by Python 2
            version = np.lib.format.read_magic(stream)
            if version not in _READERS:
                raise ValueError(f"version {version[0]}.{version[1]} of the format is not read")
            shape, fortran, dtype = _READERS[version](stream)
    except Exception as error:  # the header is a Python literal, which fails to parse in many ways
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path}: cannot be read as a .npy file: {reason}") from None
    if dtype.hasobject or dtype.kind not in "fiu" or dtype.subdtype is not None:
        raise UserError(f"{path}: cannot be read as a .npy file of numbers: its type is {str(dtype)[:60]}")
    return shape, fortran, dtype


def _content(
    stream: BinaryIO, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, fortran: bool, limit: int
) -> npt.NDArray[Any]:
    if len(shape) > _MAX_AXES or any(size < 0 for size in shape):
        raise UserError(f"{path}: cannot be read as a .npy file: its shape is {str(shape)[:60]}")
    declared = math.prod(shape) * dtype.itemsize
    if declared > limit:
        raise UserError(f"{path}: its header declares {size_text(declared)}; the limit is {size_text(limit)}")
    # in pieces: the header is not believed before the bytes are there
    raw = bytearray()
    while len(raw) < declared and (piece := stream.read(min(2**24, declared - len(raw)))):
        raw += piece
    if len(raw) < declared:
        raise UserError(
            f"{path}: cannot be read as a .npy file: its header declares {size_text(declared)}, and {size_text(len(raw))} follow"
        )
    try:
        return np.frombuffer(raw, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    except ValueError as error:  # an axis of 0 beside axes that are too long
        raise UserError(f"{path}: cannot be read as a .npy file: {error}") from None
