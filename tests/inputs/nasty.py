"""Nasty files at every place that takes one, each read in a fork with limits of time and memory.

    python -m tests.inputs.nasty --count 600 --seed 1

prints how many were refused and accepted, the slowest and the largest. A traceback, a signal, more than 1.5 GB of memory
or more than 60 s of processor time is a failure.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

READ = """
import sys
from pathlib import Path
import numpy as np
from sedd_graph.errors import SeddGraphError
from sedd_graph.cli.terminal import say
from sedd_graph.data.config import DataConfig, PointsConfig
from sedd_graph.data.sources import read_corpus
place, path = sys.argv[1], Path(sys.argv[2])
try:
    if place in ("text", "jsonl", "parquet"):
        config = DataConfig.model_validate({"corpus": {"op": place, "files": [path.name]}})
        print(len(read_corpus(config.corpus, root=path.parent)))
    elif place == "tokenizer":
        config = DataConfig.model_validate({"tokenizer": {"op": "file", "path": path.name}})
        made = config.tokenizer.make((), root=path.parent)
        print(made.decode(made.encode("some text, 12 é " * 1000)[:99]))
    elif place == "points":
        config = PointsConfig.model_validate({"points": {"op": "npy", "path": path.name}})
        print(config.points.points(path.parent, np.random.default_rng(0)).shape)
    elif place in ("frequencies", "classifier"):
        from sedd_graph_registry.noise._frequencies import load_numbers
        print(load_numbers(path.name, 1 if place == "frequencies" else 2).shape)
    elif place == "weights":
        from sedd_graph.runs.weight_files import read_tensors
        print(len(read_tensors(path)))
    elif place == "include":
        from sedd_graph.blueprint.load import load
        main = path.parent / "main.yaml"
        main.write_text("blueprint: 1\\nname: m\\nuse: {a: %s}\\ninputs: {x: float b d}\\noutputs: {y: n}\\nnodes: {n: {op: scale, in: x}}\\n" % path.name)
        load(main)
    else:
        from sedd_graph.runs.check import check
        check(path)
except SeddGraphError as error:
    text = str(error)
    assert path.name in text or "outside" in text or place in ("blueprint", "include", "tokenizer", "text", "jsonl", "parquet", "points"), text
    say("refused: " + text[:300])
    sys.exit(2)
"""
PLACES = (
    "text",
    "jsonl",
    "parquet",
    "tokenizer",
    "points",
    "frequencies",
    "classifier",
    "weights",
    "blueprint",
    "include",
)
SUFFIX = {"parquet": ".parquet", "tokenizer": ".json", "points": ".npy", "frequencies": ".npy", "classifier": ".npy", "weights": ".safetensors", "blueprint": ".yaml", "include": ".yaml", "jsonl": ".jsonl", "text": ".txt"}  # fmt: skip


def good(place: str) -> bytes:
    """Return a small valid file for ``place``."""
    stream = io.BytesIO()
    if place in ("points", "classifier", "frequencies"):
        np.save(stream, np.arange(8.0) if place == "frequencies" else np.arange(8.0).reshape(4, 2))
    elif place == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": ["one", "two", "three"] * 20}), stream)
    elif place == "weights":
        from safetensors.numpy import save

        return bytes(save({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}))
    elif place == "tokenizer":
        from tests.inputs.test_child import words

        return json.dumps(words(unk_token="a")).encode()
    elif place in ("blueprint", "include"):
        from tests.conftest import SMALL

        return SMALL.encode()
    elif place == "jsonl":
        return b"".join(json.dumps({"text": f"t{i}"}).encode() + b"\n" for i in range(20))
    else:
        return b"some text\n" * 20
    return stream.getvalue()


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Return ``raw`` after one to four changes of bytes."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(8), rng.randrange(len(data) or 1)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at : at + 8] = rng.choice(
                [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\xff\xff\xff\xff\xff\xff\xff\x7f"]
            )
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.choice([1, 3, 500])
        elif kind == 4:
            data[at:at] = rng.choice(
                [b"9" * 30, b"1" * 20_000, b"[" * 5000, b'{"a":' * 5000, b"\xed\xa0\x80", b"\x1b[31m", b"\0"]
            )
        elif kind == 5:
            digits = [i for i, c in enumerate(data) if 48 <= c <= 57]
            if digits:
                place = rng.choice(digits)
                data[place : place + 1] = rng.choice([b"4000000000", b"-1", b"99999999999999999999", b"1e308", b"0"])
        elif kind == 6:
            quoted = [i for i, c in enumerate(data) if c == 34]
            if quoted:
                place = rng.choice(quoted)
                data[place:place] = rng.choice([b"null,", b'"', b"x" * 100_000, b"\\ud800", b"(a+)+$"])
        else:
            del data[at : at + rng.randrange(1, 50)]
    return bytes(data)


def special(path: Path, rng: random.Random) -> str:
    """Put something at ``path`` that is no ordinary file, and return its name."""
    kinds: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(path),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "urandom": lambda: path.symlink_to("/dev/urandom"),
        "tty": lambda: path.symlink_to("/dev/tty"),
        "kmsg": lambda: path.symlink_to("/proc/kmsg"),
        "passwd": lambda: path.symlink_to("/etc/passwd"),
        "self": lambda: path.symlink_to(path),
        "folder": lambda: path.mkdir(),
        "sparse": lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40),
        "empty": lambda: path.write_bytes(b""),
        "random": lambda: path.write_bytes(rng.randbytes(100_000)),
        "secret": lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0)),
    }
    name = rng.choice(list(kinds))
    kinds[name]()
    return name


def forked(place: str, path: Path) -> tuple[int, resource.struct_rusage, str]:
    """Run :data:`READ` in a fork of this process; return its exit code, the resources it used, and what it printed."""
    said = path.with_suffix(".out")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            number = os.open(said, os.O_CREAT | os.O_WRONLY)
            os.dup2(number, 1)
            os.dup2(number, 2)
            os.chdir(path.parent)
            sys.argv = ["read", place, str(path)]
            exec(compile(READ, "read", "exec"), {})
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    start = time.monotonic()
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used, said.read_text(errors="replace")
        if time.monotonic() - start > 300:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def run(count: int, seed: int, folder: Path, *, places: tuple[str, ...] = PLACES) -> collections.Counter[str]:
    """Read ``count`` files, at each place in turn. Raises :class:`AssertionError` for the first that does harm."""
    rng, outcome = random.Random(seed), collections.Counter[str]()
    largest = slowest = 0.0
    for index in range(count):
        place = places[index % len(places)]
        path = folder / f"nasty{index}{SUFFIX[place]}"
        kind = special(path, rng) if rng.random() < 0.25 else "mutated"
        if kind == "mutated":
            path.write_bytes(mutated(good(place), rng))
        code, used, said = forked(place, path)
        seconds = used.ru_utime + used.ru_stime
        slowest, largest = max(slowest, seconds), max(largest, used.ru_maxrss / 2**20)
        report = (place, kind, seed, index, code, said[-3000:])
        assert code in (0, 2), report
        assert "Traceback" not in said, report
        assert seconds < 60, (seconds, report)
        assert largest < 1.5, (largest, report)
        outcome["refused" if code else "accepted"] += 1
        if index % 20 == 19:
            print(
                index + 1,
                dict(outcome),
                f"slowest {slowest:.1f} s, largest {largest:.2f} GiB",
                flush=True,
            )
    return outcome


def main() -> None:
    import sedd_graph.runs.check
    import sedd_graph.runs.weight_files  # noqa: F401 - once for all forks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(dict(run(arguments.count, arguments.seed, Path(folder))))


if __name__ == "__main__":
    main()
