"""Running of a parser on untrusted input in a child process, with limits on memory, processor time and waiting time.

A parser in C or Rust can abort, overflow its stack or allocate gigabytes for a small file. No exception handler catches
that; in a child process, only the child dies. The child is a new Python interpreter: it has no threads and no open
files of its parent, runs a single function, and returns JSON values.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Any

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.inputs.files import size_text

__all__ = ["first_limited", "main", "run_limited"]

_START = "from sedd_graph.inputs.child import main; main()"
MAX_CPU_S = 3600
"""Default limit of the processor time of a child, in seconds."""
_QUIET = {
    # threads and memory pools reserve address space, which the limit counts
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
    "RUST_BACKTRACE": "0",
}
_MAX_FRAME = 2**31


def run_limited(
    function: Callable[..., Iterator[Any]],
    *arguments: Any,
    what: str,
    memory: int,
    silence_s: float,
    cpu_s: int = MAX_CPU_S,
) -> Iterator[Any]:
    """Run ``function(*arguments)`` in a child process, and yield what it yields.

    Args:
        function: A generator function at the top level of an importable module.
        arguments: JSON values.
        what: Name of the input, for messages.
        memory: Limit of the child's memory (address space), in bytes. Not enforced on Windows and macOS.
        silence_s: Longest time between two values, in seconds.
        cpu_s: Limit of the child's processor time, in seconds. Not enforced on Windows.

    Yields:
        The values of ``function``, as JSON values.

    Raises:
        UserError: ``function`` raised an exception, was ended by a signal (as for an overflow of the stack), needed more
            memory, or yielded nothing for too long.
        EnvironmentFault: No process can be started.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-P", "-B", "-c", _START]  # -P: no module from the working directory
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic in Rust prints a hundred lines
            env={**os.environ, **_QUIET, "PYTHONPATH": path},
        )
    except OSError as error:
        raise EnvironmentFault(f"no process can be started to read {what}: {error.strerror or error}") from None
    task = {
        "module": function.__module__,
        "name": function.__qualname__,
        "arguments": arguments,
        "memory": memory,
        "cpu_s": cpu_s,
    }
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(silence_s, stop)
    timer.start()
    try:
        if process.stdin is None or process.stdout is None:
            raise EnvironmentFault(f"no pipe to the process that reads {what}")
        with suppress(BrokenPipeError), process.stdin as stream:
            _send(stream, task)
        while True:
            frame = _receive(process.stdout)
            timer.cancel()
            if frame is None:
                raise UserError(f"{what}: {_ended(process.wait(), memory, silence_s, cpu_s, late=late.is_set())}")
            if "end" in frame:
                return
            if "error" in frame:
                text = "it needs more memory than a file of its size may" if frame["memory"] else frame["error"]
                raise UserError(f"{what}: {text}")
            yield frame["value"]
            timer = threading.Timer(silence_s, stop)
            timer.start()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def first_limited(
    function: Callable[..., Iterator[Any]],
    *arguments: Any,
    what: str,
    memory: int,
    silence_s: float,
    cpu_s: int = MAX_CPU_S,
) -> Any:
    """Return the first value of :func:`run_limited`, which takes the same arguments; None if there is none."""
    found = run_limited(function, *arguments, what=what, memory=memory, silence_s=silence_s, cpu_s=cpu_s)
    try:
        return next(found, None)
    finally:
        found.close()  # type: ignore[attr-defined]  # a generator


def _ended(code: int, memory: int, silence_s: float, cpu_s: int, *, late: bool) -> str:
    if late:
        return f"reading it took more than {silence_s:.0f} s without progress"
    if code in (-getattr(signal, "SIGXCPU", 0), -9):  # the limits of processor time: soft and hard
        return f"reading it took more than {cpu_s} s of processor time"
    if code < 0:
        return f"its reader was stopped by signal {-code}, within the limit of {size_text(memory)} of memory"
    return f"its reader ended without a result (exit code {code})"


def _send(stream: IO[bytes], value: Any) -> None:
    raw = json.dumps(value).encode()
    stream.write(len(raw).to_bytes(8, "little") + raw)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Return the next value, or None at the end of the stream."""
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > _MAX_FRAME:
        return None
    raw = stream.read(size)
    return json.loads(raw) if len(raw) == size else None


def main() -> None:
    """Run one task, which standard input describes, in a child process: the entry point of :func:`run_limited`."""
    # what a library prints does not come between the values
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    task = _receive(sys.stdin.buffer)
    if task is None:
        return
    _limit(task["memory"], task["cpu_s"])
    try:
        function = getattr(importlib.import_module(task["module"]), task["name"])
        for value in function(*task["arguments"]):
            _send(output, {"value": value})
        _send(output, {"end": True})
    except BrokenPipeError:
        pass
    except BaseException as error:  # a panic in Rust is no Exception
        text = " ".join(str(error).split())[:500] or type(error).__name__
        with suppress(BrokenPipeError):
            _send(output, {"error": text, "memory": isinstance(error, MemoryError)})
    with suppress(BrokenPipeError):
        output.close()
    os._exit(0)  # without the destructors of what was read


def _limit(memory: int, cpu_s: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_FSIZE, 2**20)]
    if sys.platform != "darwin":
        limits.append((resource.RLIMIT_AS, memory))
    for name, value in limits:
        with suppress(ValueError, OSError):  # a smaller limit is in effect
            resource.setrlimit(name, (value, value))
