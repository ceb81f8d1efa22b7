"""Counters of the server, in the text format that Prometheus reads."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from sedd_graph.runs.serve.wire import Outcome

__all__ = ["Histogram", "Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """A histogram: numbers of values up to each bound, their sum and their number.

    Args:
        bounds: Upper bounds, in ascending order.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the lines of the text format."""
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counters of one server. All methods may be called by any thread."""

    def __init__(self) -> None:
        self._lock, self._outcomes, self._totals = threading.Lock(), Counter[str](), Counter[str]()
        self._gauges = Counter[str]()
        self._latency, self._rows = Histogram(SECONDS), Histogram(ROWS)

    def count(self, outcome: Outcome, seconds: float) -> None:
        """Count a completion request that ended, and the seconds since it arrived."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._latency.add(seconds)

    def batch(self, rows: int) -> None:
        """Count a batch of rows that is about to be sampled."""
        with self._lock:
            self._rows.add(rows)

    def add(self, name: str, value: int) -> None:
        """Add to the total ``prompt_tokens``, ``completion_tokens`` or ``network_evaluations``."""
        with self._lock:
            self._totals[name] += value

    def gauge(self, name: str, value: int) -> None:
        """Set the gauge ``queue_requests`` or ``running_rows``."""
        with self._lock:
            self._gauges[name] = value

    def text(self) -> str:
        """Return all counters in the text format of Prometheus."""
        with self._lock:
            return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        def head(name: str, kind: str, what: str) -> str:
            return f"# HELP sedd_graph_{name} {what}\n# TYPE sedd_graph_{name} {kind}"

        yield head("requests_total", "counter", "Completion requests that ended, by outcome.")
        for outcome in ("ok", "refused", "failed", "cancelled", "timeout"):
            yield f'sedd_graph_requests_total{{outcome="{outcome}"}} {self._outcomes[outcome]}'
        for name, what in (
            ("queue_requests", "Requests that wait to be sampled."),
            ("running_rows", "Rows that are being sampled."),
        ):
            yield f"{head(name, 'gauge', what)}\nsedd_graph_{name} {self._gauges[name]}"
        for name, what in (
            ("prompt_tokens", "Given tokens of the prompts that were answered."),
            ("completion_tokens", "Tokens that the model wrote in answers."),
            ("network_evaluations", "Evaluations of the network, summed over rows."),
        ):
            yield f"{head(name + '_total', 'counter', what)}\nsedd_graph_{name}_total {self._totals[name]}"
        yield head("request_seconds", "histogram", "Seconds from the arrival of a request to its end.")
        yield from self._latency.lines("sedd_graph_request_seconds")
        yield head("batch_rows", "histogram", "Rows of a batch.")
        yield from self._rows.lines("sedd_graph_batch_rows")
