"""Functions that the tests run in a child process."""

import os
import time
from collections.abc import Iterator


def numbers(count: int) -> Iterator[int]:
    print("printed on the way")
    yield from range(count)


def raises(text: str) -> Iterator[int]:
    yield 1
    raise ValueError(text)


def fills() -> Iterator[int]:
    yield len(bytearray(2**40))


def aborts() -> Iterator[int]:
    yield 1
    os.abort()


def sleeps() -> Iterator[int]:
    yield 1
    time.sleep(600)


def writes(path: str) -> Iterator[int]:
    with open(path, "wb") as stream:
        stream.write(bytes(2**22))
    yield 1
