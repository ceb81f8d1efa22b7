"""Rows are prepared one micro-batch ahead, and are those of their step whatever is asked for."""

import dataclasses
import threading

import numpy as np
import pytest

from sedd_graph.training.prefetch import Prefetcher


@dataclasses.dataclass
class Rows:
    values: np.ndarray


def test_rows_are_prepared_ahead_by_a_thread() -> None:
    made: list[tuple[int, int, str]] = []
    ready = threading.Event()

    def make(step: int, part: int) -> Rows:
        made.append((step, part, threading.current_thread().name))
        if (step, part) == (0, 1):
            ready.set()
        return Rows(np.array([step, part]))

    rows = Prefetcher(make, pinned=False)
    assert rows.take((0, 0), (0, 1)).values.tolist() == [0, 0]
    assert ready.wait(10)  # nobody has asked for it
    assert rows.take((0, 1), (1, 0)).values.tolist() == [0, 1]
    assert rows.take((5, 0), (5, 1)).values.tolist() == [5, 0]  # a resumed run asks for another
    assert rows.take((5, 1), None).values.tolist() == [5, 1]
    rows.close()
    assert [name.startswith("rows") for step, part, name in made if (step, part) in ((0, 1), (1, 0), (5, 1))] == [True] * 3  # fmt: skip
    assert not any(name.startswith("rows") for step, part, name in made if (step, part) in ((0, 0), (5, 0)))


def test_an_error_of_the_thread_is_raised_where_rows_are_taken() -> None:
    def make(step: int, part: int) -> Rows:
        if step:
            raise OSError("gone")
        return Rows(np.zeros(1))

    rows = Prefetcher(make, pinned=False)
    rows.take((0, 0), (1, 0))
    with pytest.raises(OSError, match="gone"):
        rows.take((1, 0), None)
    rows.close()
