"""Corpora beyond memory: opening and training on a large set of shards, and tokenising text into shards.

    python benchmarks/shards.py [--gigabytes N] [--megabytes N] [--text FILE] [--processes N] [--steps N] [--kills N]

- **Open**: seconds and resident memory to open a sparse set of ``--gigabytes`` in a new process.
- **Read**: resident memory after rows all over the set have been read, and microseconds per row.
- **Train**: peak resident memory of ``sedd-graph train`` on that set, beyond that on a set of a few rows.
- **Tokenise**: megabytes of text a second, by wall clock and by processor time, with bytes and with BPE of 16,000 tokens.
  The text is ``--text``, or is drawn from the words of the built-in corpus by Zipf's law, one word in 30 being new.
- **Kills**: tokenising that is killed (SIGKILL) at random moments, and whether the shards are those of an unbroken run.

Bars: opened in under 1 s; trained in under 500 MB beyond the model; 20 MB of text a second on two processors. Appends a
record to benchmarks/results/shards.jsonl with the hardware named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from common import append_record

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.data.sources import read_corpus

SHARD, DOCUMENT, LENGTH = 2**27, 2**17, 1024
BLUEPRINT = """\
blueprint: 1
name: large
params: {dim: 32, heads: 2}
axes: {b: batch, l: length, d: "${params.dim}", v: 258}
inputs: {tokens: int b l}
outputs: {log_x0: head}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  mlp: {op: feed_forward, in: embed, with: {hidden: 2*d}}
  head: {op: x0_head, in: {x: mlp, tokens: tokens}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: masked_count}
sample: {op: ancestral, steps: 8}
"""
DATA = """\
data:
  corpus: {op: tokens, files: [NAME]}
  heldout: {op: tokens, files: [small]}
  tokenizer: bytes
  length: LENGTH
train: {steps: STEPS, batch: 8, warmup: 2, compile: "off", evaluate: null}
"""


def sparse_set(folder: Path, tokens: int) -> None:
    """Make a set of shards of zeros, as files with holes."""
    from sedd_graph.data.shard_index import INDEX, Index, Shard, TokenizerFacts
    from sedd_graph.store.files import write_json, write_text

    folder.mkdir()
    write_text(folder / "tokenizer.json", json.dumps({"kind": "bytes"}))
    shards, zero = [], {"tokens": "0" * 64, "documents": "0" * 64, "characters": "0" * 64}
    for number in range(-(-tokens // SHARD)):
        count, name = min(SHARD, tokens - number * SHARD), f"{number:05d}"
        with (folder / f"{name}.tokens.npy").open("wb") as stream:
            head = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(stream, head)
            stream.truncate(stream.tell() + 2 * count)
        ends = np.minimum(np.arange(1, -(-count // DOCUMENT) + 1) * DOCUMENT, count)
        np.save(folder / f"{name}.documents.npy", np.stack([ends, ends], axis=1))
        np.save(folder / f"{name}.characters.npy", np.array([[0, count]]))
        shards.append(
            Shard.model_validate(
                {
                    "name": name,
                    "tokens": count,
                    "documents": len(ends),
                    "characters": count,
                    "alphabet": 1,
                    "sha256": zero,
                }
            )
        )
    sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    index = Index(
        dtype="uint16",
        tokenizer=TokenizerFacts(sha256=sha256, size=257),
        separator=[],
        text_sha256="0" * 64,
        shards=shards,
    )
    write_json(folder / INDEX, index.model_dump(mode="json"))


def resident() -> float:
    """Return the resident memory of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def read_rows(folder: Path, root: Path) -> None:
    """In a process of its own: open the set and read rows in the order of training; print a line of JSON."""
    keys = {
        "corpus": {"op": "tokens", "files": [folder.name]},
        "tokenizer": "bytes",
        "length": LENGTH,
        "holdout": 0.001,
    }
    config = DataConfig.model_validate(keys)
    before, began = resident(), time.perf_counter()
    data = open_data(config, root=root)
    opened, memory = time.perf_counter() - began, resident()
    began, peak, rows = time.perf_counter(), memory, 64
    for step in range(800):
        data.batch(step * rows, rows)
        if step % 20 == 0:
            peak = max(peak, resident())
    seconds = (time.perf_counter() - began) / 800 / rows
    found = {"open_s": opened, "open_mb": memory - before, "read_mb": peak - before, "us_per_row": 1e6 * seconds}
    print(json.dumps(found | {"rows": data.train.count}))


def trained(root: Path, name: str, steps: int) -> float:
    """Return the peak resident memory of training on a set, MB."""
    text = BLUEPRINT + DATA.replace("NAME", name).replace("STEPS", str(steps)).replace("LENGTH", str(LENGTH))
    (root / f"{name}.yaml").write_text(text)
    command = [sys.executable, "-m", "sedd_graph", "build", str(root / f"{name}.yaml"), "--proof", "quick"]
    here = ["--runs", str(root / "runs"), "--device", "cpu", "--path-to", str(root / "at")]
    subprocess.run([*command, *here], check=True, stdout=subprocess.DEVNULL)
    script = (
        "import resource, sys; from sedd_graph.cli.main import run; code = run(sys.argv[1:]); "
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    train = [sys.executable, "-c", script, "train", (root / "at").read_text(), "--device", "cpu"]
    done = subprocess.run(train, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.rpartition("PEAK ")[2]) / 1024


def drawn_text(path: Path, megabytes: int) -> None:
    """Write documents as JSON Lines: words of the built-in corpus by Zipf's law, and new ones."""
    builtin = read_corpus(DataConfig().corpus, root=Path())
    words = np.array(
        sorted({word for document in builtin for word in document.text.split()}, key=lambda w: (len(w), w))
    )
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, len(words) + 1)
    share /= share.sum()
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    size = 0
    with path.open("w") as stream:
        while size < megabytes * 10**6:
            found = generator.choice(words, size=4000, p=share).tolist()
            for place in np.flatnonzero(generator.random(len(found)) < 1 / 30):
                found[place] = "".join(generator.choice(letters, size=generator.integers(3, 11)))
            line = json.dumps({"text": " ".join(found)}) + "\n"
            size += stream.write(line)


def tokenised(root: Path, source: Path, tokenizer: list[str], processes: int) -> dict[str, float]:
    """Tokenise a file, and return megabytes a second by wall clock, and by processor time for each processor."""
    folder = Path(tempfile.mkdtemp(dir=root)) / "shards"
    command = [sys.executable, "-m", "sedd_graph", "tokenize", str(source), "-o", str(folder), *tokenizer]
    before, began = os.times(), time.perf_counter()
    subprocess.run([*command, "--processes", str(processes)], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    size = source.stat().st_size / 1e6
    return {"mb_per_s": size / wall, "mb_per_cpu_s": size / used, "processors_busy": used / wall}


def killed(root: Path, source: Path, processes: int, kills: int) -> tuple[int, bool]:
    """Return how many kills met tokenising alive, and whether the shards are those of an unbroken run."""

    def command(name: str) -> list[str]:
        sizes = ["--shard-tokens", "2000000", "--processes", str(processes)]
        here = ["-o", str(root / name), "--tokenizer", "bytes", *sizes]
        return [sys.executable, "-m", "sedd_graph", "tokenize", str(source), *here]

    quiet, generator, met = subprocess.DEVNULL, random.Random(0), 0
    began = time.perf_counter()
    subprocess.run(command("unbroken"), check=True, stdout=quiet)
    seconds = time.perf_counter() - began
    for _ in range(kills):
        process = subprocess.Popen(command("broken"), stdout=quiet, stderr=quiet)
        time.sleep(generator.uniform(0.1, 0.6) * seconds)
        process.kill()
        met += process.wait() == -signal.SIGKILL
    if not (root / "broken" / "index.json").exists():
        subprocess.run(command("broken"), check=True, stdout=quiet)
    same = [(root / name / "index.json").read_bytes() for name in ("unbroken", "broken")]
    return met, same[0] == same[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--reading", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reading:
        read_rows(*arguments.reading)
        return
    record: dict[str, object] = {"gigabytes": arguments.gigabytes, "megabytes": arguments.megabytes}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sparse_set(root / "large", int(arguments.gigabytes * 1e9 / 2))
        sparse_set(root / "small", 64 * LENGTH)
        command = [sys.executable, __file__, "--reading", str(root / "large"), str(root)]
        reading: Mapping[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        show(record, "open", f"{reading['open_s']:.3f} s, {reading['open_mb']:.1f} MB (bar: 1 s)", reading["open_s"])
        show(record, "read", f"{reading['us_per_row']:.0f} us a row, {reading['read_mb']:.1f} MB", reading["read_mb"])
        peaks = [trained(root, which, arguments.steps) for which in ("large", "small")]
        text = f"{peaks[0]:.0f} MB at most, {peaks[0] - peaks[1]:.0f} MB beyond a set of 64 rows (bar: 500 MB)"
        show(record, "train", text, peaks[0] - peaks[1])
        source = arguments.text or root / "text.jsonl"
        if arguments.text is None:
            drawn_text(source, arguments.megabytes)
        for kind, options in (("bytes", []), ("bpe", ["--tokens", "16000"])):
            fitted = ["--tokenizer", kind, *options]
            if kind == "bpe":  # fitted before, on the built-in corpus
                (root / "fit.txt").write_text("".join(d.text for d in read_corpus(DataConfig().corpus, root=root)))
                fit = [sys.executable, "-m", "sedd_graph", "tokenize", str(root / "fit.txt"), "-o", str(root / "fit")]
                subprocess.run([*fit, *fitted], check=True, stdout=subprocess.DEVNULL)
                fitted = ["--tokenizer", str(root / "fit")]
            found = tokenised(root, source, fitted, arguments.processes)
            text = (
                f"{found['mb_per_s']:.1f} MB/s, {found['mb_per_cpu_s']:.1f} MB per second of a processor, of which "
                f"{found['processors_busy']:.1f} were busy (bar: 20 MB/s on two)"
            )
            show(record, f"tokenise, {kind}", text, found)
        if arguments.kills:
            met, same = killed(root, source, arguments.processes, arguments.kills)
            show(record, "kills", f"{met} of {arguments.kills} while it ran; shards as unbroken: {same}", same)
    append_record("shards", record | {"processors": os.cpu_count(), "load": os.getloadavg()[0]})


def show(record: dict[str, object], name: str, text: str, value: object) -> None:
    record[name] = value
    print(f"{name:<16} {text}", flush=True)


if __name__ == "__main__":
    main()
