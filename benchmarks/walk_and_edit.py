"""Text to noise and back: round trips of tapes by sampler and kernel, and edits by strength.

    python benchmarks/walk_and_edit.py trips --lines 10000 [--only SAMPLER ...] >> benchmarks/results/walk_and_edit.jsonl
    python benchmarks/walk_and_edit.py edits RUN [--count 200] [--judge FOLDER] >> benchmarks/results/walk_and_edit.jsonl

``trips`` inverts as many lines of CPython's own source text, and as many lines that the sampler draws itself, with tiny
untrained networks; each tape is read and restored in another process. A line of the record counts the lines that did not
come back; ``changes`` of a tape of vectors are its numbers. ``edits`` replaces one
word in held-out lines of a trained run: the share of the other tokens that stay, of
target words that are there, and the bound of the edited texts under the model and their perplexity under a judge, by
strength; the texts themselves, with the word replaced and nothing else, are the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Rows
from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.diffusion.tokens.noise_record import FINAL
from sedd_graph.evaluation.judge import Judge, open_judge
from sedd_graph.evaluation.quality import judge_statistics
from sedd_graph.runs.check import LOCK, check, lock_text
from sedd_graph.runs.edit import Span, edit_run
from sedd_graph.runs.invert import invert_run
from sedd_graph.runs.open import Run, open_run, read_data
from sedd_graph.store.tape import read_tape

TINY = ["params.dim=16", "params.depth=1", "params.heads=2"]
STEPS = 6
MASKED = ["ancestral", "first_hitting", "remdm", "confidence", "entropy_bound", "psi"]
SCORES = ["analytic", "euler", "tau_leaping", "predictor_corrector", "uniformization"]
KERNELS = ("bd3lm", "d3pm", "mixture", "spindle", "power", "rates", "ordinal", "neighbours", "unigram", "genmd4")
CASES = [
    *(("mdlm-tiny", name) for name in MASKED),
    *(("sedd-tiny", name) for name in SCORES),
    *(("sedd-uniform-tiny", name) for name in SCORES),
    *((f"{name}-tiny", None) for name in KERNELS),
    ("langflow-tiny", "reversible_heun"),
    ("diffusion-lm-tiny", "reversible_heun"),
]
RANDOM_TIMES = ("first_hitting", "entropy_bound", "uniformization")


def opened(name: str, sampler: str | None, folder: Path) -> Run:
    """A run folder of a shipped blueprint with a tiny, untrained network."""
    steps = "" if sampler in RANDOM_TIMES else f", steps: {STEPS}"
    random_times = name == "bd3lm-tiny"  # its sampler has no number of steps
    own = [] if random_times else [f"sample.steps={STEPS}"] if sampler is None else [f"sample={{op: {sampler}{steps}}}"]
    cond = [] if name == "diffusion-lm-tiny" else ["params.cond=16"]
    report = check(name, [*TINY, *cond, *own])
    if not isinstance(report.data, DataConfig):
        raise TypeError(name)
    folder.mkdir(parents=True)
    (folder / LOCK).write_text(lock_text(report))
    made = read_data(report, root=folder).tokenizer
    if made is None:
        raise TypeError(name)
    (folder / TOKENIZER).write_text(made.to_json())
    return open_run(folder, device="cpu", compile="off")


def lines(run: Run, count: int, longest: int) -> list[str]:
    """Different lines of CPython's source text, in a random order."""
    tokenizer, found = run.text_tokenizer(), set[str]()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.update(path.read_text(encoding="utf-8", errors="ignore").splitlines())
    forbidden, chosen = set(tokenizer.forbidden), list[str]()
    for line in random.Random(0).sample(sorted(found), len(found)):
        if 0 < len(line) <= longest and not forbidden & set(tokenizer.encode(line).tolist()):
            chosen.append(line)
        if len(chosen) == count:
            break
    return chosen


def restored(run: Path, tapes: list[Path]) -> list[list[str]]:
    """The texts of tapes, restored in another process."""
    code = "import sys; from sedd_graph.cli.main import run\nfor tape in sys.argv[2:]:\n"
    code += "    assert run(['restore', tape, '--run', sys.argv[1], '-o', tape + '.txt', '--device', 'cpu']) == 0"
    subprocess.run([sys.executable, "-c", code, str(run), *map(str, tapes)], check=True, capture_output=True)
    return [Path(f"{tape}.txt").read_bytes().decode().split("\n") for tape in tapes]


def trips(count: int, only: list[str]) -> Iterator[dict[str, Any]]:
    for name, sampler in CASES:
        if only and not {name, sampler} & set(only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = opened(name, sampler, Path(folder) / "run")
            real = lines(run, count, 24)
            drawn = run.engine.sample(count, 16, seed=1)
            sampled = [text.replace("\n", " ") for text in run.decode(drawn)]
            texts, start = {"real": real, "sampled": sampled}, time.perf_counter()
            tapes = [invert_run(run, texts[kind], batch=1000, where=Path(folder) / f"{kind}.zarr") for kind in texts]
            for kind, tape, back in zip(texts, tapes, restored(run.path, tapes), strict=True):
                found = read_tape(tape)
                vectors = found.facts.kind == "vectors"
                yield {
                    "measured": "trips",
                    "blueprint": name,
                    "sampler": run.plan.sampler_op,
                    "lines": kind,
                    "count": len(back),
                    "tokens": int(found.arrays["lengths"].sum()),
                    "changes": found.arrays["states"].size if vectors else len(found.arrays["call"]),
                    "stored": len(found.arrays["place"]) if vectors else int((found.arrays["state"] == FINAL).sum()),
                    "failures": sum(a != b for a, b in zip(back, texts[kind], strict=True)),
                    "seconds": round(time.perf_counter() - start, 1),
                }


def words(texts: list[str]) -> list[tuple[int, Span]]:
    """For each text with a word of three letters or more: its index, and the word's replacement by one of another text."""
    random_, found = random.Random(1), []
    every = sorted({w for text in texts for w in re.findall(r"[a-z]{3,}", text)})
    for index, text in enumerate(texts):
        places = list(re.finditer(r"\b[a-z]{3,}\b", text))
        if places:
            place = random_.choice(places)
            others = [w for w in every if w != place[0] and len(w) == len(place[0])] or [
                w for w in every if w != place[0]
            ]
            found.append((index, Span(place.start(), place.end(), random_.choice(others))))
    return found


def edits(path: Path, count: int, folder_of_judge: Path | None) -> Iterator[dict[str, Any]]:
    run = open_run(path, device="cpu", compile="off")
    judge = None if folder_of_judge is None else open_judge(folder_of_judge, device=torch.device("cpu"))
    tokenizer, held = run.text_tokenizer(), run.data().heldout
    rows = held.take(np.arange(min(held.count, 2 * count)), 0)
    if not isinstance(rows, Rows):
        raise TypeError("the run has no text")
    texts = [tokenizer.decode(row) for row in rows.tokens.tolist()]
    chosen = words(texts)[:count]
    texts = [texts[index] for index, _ in chosen]
    spans = {text: span for text, (_, span) in zip(texts, chosen, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        tape = read_tape(invert_run(run, texts, where=Path(folder) / "t.zarr"))
    for strength in (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0):
        stored = edit_run(run, tape, lambda text: (spans[text],), where=path, strength=strength)
        made = [str(t) for t in np.asarray(zarr.open_group(str(stored), mode="r")["text"])]
        kept = total = hits = 0
        for text, new in zip(texts, made, strict=True):
            span = spans[text]
            hits += new[span.start : span.start + len(span.new)] == span.new
            before, after = (
                text[: span.start] + text[span.stop :],
                new[: span.start] + new[span.start + len(span.new) :],
            )
            total += len(before)
            kept += sum(a == b for a, b in zip(before, after, strict=False))
        yield {
            "measured": "edits",
            "strength": strength,
            "texts": len(texts),
            "equal": sum(a == b for a, b in zip(texts, made, strict=True)),
            "kept": round(kept / total, 4),
            "hit": round(hits / len(texts), 4),
            "bits_per_character": round(bound(run, made), 3),
            **judged(judge, made),
        }
    made = [text[: spans[text].start] + spans[text].new + text[spans[text].stop :] for text in texts]
    yield {
        "measured": "replaced",
        "texts": len(texts),
        "bits_per_character": round(bound(run, made), 3),
        **judged(judge, made),
    }


def judged(judge: Judge | None, texts: list[str]) -> dict[str, float]:
    """Perplexity of texts under a judge, with its standard error; nothing without a judge."""
    if judge is None:
        return {}
    found = judge_statistics(judge.read([[text] for text in texts]))
    return {
        "perplexity": round(found["generative_perplexity"], 1),
        "perplexity_standard_error": round(found["generative_perplexity_standard_error"], 1),
    }


def bound(run: Run, texts: list[str]) -> float:
    """Bits per character of texts of one length or more under the model's own bound, averaged over 8 draws."""
    nats = characters = 0.0
    by_length: dict[int, list[list[int]]] = {}
    for text in texts:
        tokens = run.text_tokenizer().encode(text).tolist()
        by_length.setdefault(len(tokens), []).append(tokens)
    for length, rows in by_length.items():
        found = run.engine.bound_rows(torch.tensor(rows), seed=0, draws=8)
        nats, characters = nats + float(found.sum()), characters + length * len(rows)
    return nats / characters / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("trips", "edits"))
    parser.add_argument("run", nargs="?")
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--judge", type=Path)
    arguments = parser.parse_args()
    found = (
        trips(arguments.lines, arguments.only)
        if arguments.what == "trips"
        else edits(Path(arguments.run), arguments.count, arguments.judge)
    )
    for record in found:
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
