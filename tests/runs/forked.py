"""The command line in a process of its own, without the seconds that its start takes: a fork of this one."""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import sedd_graph.report.html
import sedd_graph.runs.build
import sedd_graph.runs.judge
import sedd_graph.runs.sample
import sedd_graph.runs.train  # noqa: F401  (so that no fork imports torch)
from sedd_graph.cli import main as cli
from sedd_graph.component.registry import discover

discover()

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
"""Audit events of a change to a folder, beside those of a file that is opened to be written."""


def count_changes(counter: Path, die_at: int | None) -> None:
    """Count this process's changes to files and folders, as a length of the file ``counter``, and die at one of them.

    The process is killed before the change is made.
    """
    number = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    done = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            done += 1
            if done == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(number, b".")

    sys.addaudithook(hook)


class Forked:
    """A command that runs in a fork.

    Args:
        arguments: Arguments of the command line.
        log: File that gets what the command prints.
        environment: Additional environment variables.
        die_at: Number of the change to files or folders at which the command is killed, from 1; None: it is not.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        die_at: int | None = None,
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.log, self.code, self._counter = log, 0, log.with_name(f"{log.name}-changes")
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.environ.update(environment or {})
                warnings.simplefilter("default")  # as outside of pytest, and as the command line prints them
                warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
                number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(number, 1)
                os.dup2(number, 2)
                sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
                sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                count_changes(self._counter, die_at)
                code = cli.run(list(arguments))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        self.running = True

    def poll(self) -> bool:
        """Return whether the command has ended."""
        if self.running:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.running, self.code = False, os.waitstatus_to_exitcode(status)
        return not self.running

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end and return the exit code, negative for a signal; kill the command after ``seconds``."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.log.read_text())
            time.sleep(0.002)
        return self.code

    def kill(self) -> None:
        """Kill the command, unless it has ended."""
        if not self.poll():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.running, self.code = False, os.waitstatus_to_exitcode(status)

    def text(self) -> str:
        """Return what the command has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def changes(self) -> int:
        """Number of changes to files and folders that the command has made."""
        return self._counter.stat().st_size if self._counter.exists() else 0
