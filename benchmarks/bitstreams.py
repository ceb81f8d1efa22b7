"""Round trips and sizes of bitstreams: text to noise and back, for every kernel, read from disk by another process.

    python benchmarks/bitstreams.py [--rows N] [--altered N]

For each kernel, lines of the built-in corpus (UTF-8 bytes, up to 64 per line) and as many random lines are noised, written
to files, and recovered by another process with another number of threads. The size of each record is compared with the
entropy of what noise erased, computed from the transition matrix or, for strings, from the deletions that were made. Small
bitstreams are altered by one byte, with a new digest, and must be refused or still exact. Prints a table in Markdown, and writes
it to benchmarks/results/bitstreams.md and its numbers to bitstreams.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, append_record
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.diffusion.bitstream.laws import reference_of
from sedd_graph.diffusion.bitstream.noise import denoise, levels, noise
from sedd_graph.diffusion.bitstream.strings import denoise_strings, noise_strings
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.kernel import StringKernel
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import UserError

REGISTRY = discover()
LENGTH, TIME = 64, 0.5
TOKENS = (
    "absorb",
    "uniform",
    "unigram",
    "mixture",
    "power",
    "learned_power",
    "spindle",
    "neighbours",
    "ordinal",
    "rates",
    "steps",
)
ALIGNED = "edit_flow, noise strings"
"""Edit flows from noise strings of 32 tokens on average, to which text is aligned."""
STRINGS = ("delete", "indel", "mask_delete", "edit_flow", ALIGNED)


@dataclasses.dataclass(frozen=True)
class Case:
    """Lines of one kind under one kernel: clean tokens [b, l], the number of tokens of each line, and reference weights."""

    op: str
    lines: str
    tokens: Tensor
    lengths: Tensor
    reference: Tensor | None

    @property
    def real(self) -> Tensor:
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]


def made(op: str) -> Any:
    """Construct a component with its example Config, for bytes."""
    config = (
        {"mean_length": 32.0}
        if op == ALIGNED
        else {"steps": 100, "beta_first": 1e-4, "beta_last": 0.02}
        if op == "steps"
        else {}
    )
    cls: Any = REGISTRY.component(op.split(",")[0])
    states = 4 if op == "rates" else 258 if op == "mask_delete" else 257
    if op in ("uniform", "unigram", "neighbours", "ordinal", "steps"):
        states = 256
    return cls(cls.Config.model_validate({**getattr(cls, "example", {}), **config}), Context({"n": states}))


def schedule(kernel: Kernel | StringKernel) -> Schedule:
    """Construct the schedule of a kernel that has its own, or `loglinear`."""
    config = dict(kernel.own_schedule(kernel.config) or {"op": "loglinear"})
    cls: Any = REGISTRY.component(config.pop("op"))
    found: Schedule = cls(cls.Config.model_validate(config), Context({}))
    return found


def cases(op: str, rows: int) -> list[Case]:
    """Return real and random lines as tokens of the kernel."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    lines = [line.encode()[:LENGTH] for name in sorted(topics) for line in topics[name].splitlines() if line.strip()]
    text = torch.zeros(rows, LENGTH, dtype=torch.int64)
    lengths = torch.zeros(rows, dtype=torch.int64)
    for row, line in enumerate(lines[:rows]):
        text[row, : len(line)], lengths[row] = torch.tensor(list(line)), len(line)
    counts = torch.bincount(text[torch.arange(LENGTH) < lengths[:, None]], minlength=256).double() + 1
    random = torch.randint(256, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = torch.full_like(lengths, LENGTH)
    if op == "rates":  # four states: the digits of each byte to the base 4
        text, random = (torch.stack([x // 64, x // 16 % 4, x // 4 % 4, x % 4], -1).flatten(1) for x in (text, random))
        lengths, whole, counts = 4 * lengths, 4 * whole, torch.ones(4, dtype=torch.float64)
    if op == "indel":  # it has a reference of its own, its prior
        prior = made(op).prior(rows, longest=LENGTH, generator=torch.Generator().manual_seed(1), allowed=None)
        random, whole = prior.tokens[:, 1:].clamp(max=255), prior.lengths
    return [Case(op, "real", text, lengths, None if op == "indel" else counts), Case(op, "random", random, whole, None)]


def strings_of(kernel: StringKernel, case: Case) -> Strings:
    """Return the lines of a case as strings."""
    tokens = torch.where(case.real, case.tokens, kernel.start)
    first = torch.full_like(tokens[:, :1], kernel.start)
    return Strings(torch.cat([first, tokens], 1), torch.cat([first == kernel.start, case.real], 1))


def forward(case: Case, times: list[float], seed: int) -> tuple[np.ndarray, np.ndarray, Bitstream]:
    """Noise a case: noisy tokens [b, w], their number in each line, and the bitstream."""
    kernel, (rows, length) = made(case.op), case.tokens.shape
    new = Bitstream.new(seed, rows, length)
    if isinstance(kernel, Kernel):
        y, bitstream = noise(
            kernel, schedule(kernel), case.tokens, times, new, corrupt=case.real, reference=case.reference
        )
        return y.numpy(), case.lengths.numpy(), bitstream
    s, bitstream = noise_strings(
        kernel, schedule(kernel), strings_of(kernel, case), times, new, reference=case.reference
    )
    return s.tokens.numpy(), s.lengths.numpy(), bitstream


def backward(case: Case, times: list[float], noisy: np.ndarray, lengths: np.ndarray, bitstream: Bitstream) -> int:
    """Denoise a case, and return the number of lines that are wrong."""
    kernel, tokens = made(case.op), torch.from_numpy(noisy)
    if isinstance(kernel, Kernel):
        z, _ = denoise(kernel, schedule(kernel), tokens, times, bitstream, corrupt=case.real, reference=case.reference)
        return int((z != case.tokens).any(-1).sum())
    strings = Strings(tokens, torch.arange(tokens.shape[1]) <= torch.from_numpy(lengths)[:, None])
    found, _ = denoise_strings(kernel, schedule(kernel), strings, times, bitstream, reference=case.reference)
    old = strings_of(kernel, case)
    width = min(old.tokens.shape[1], found.tokens.shape[1])
    same = (found.tokens[:, :width] == old.tokens[:, :width]).all(-1) & (found.lengths == old.lengths)
    return int((~same).sum())


def restore(folder: Path, rows: int, op: str, times: list[float]) -> None:
    """Denoise the cases of a kernel from files, and print the number of wrong lines of each."""
    torch.set_num_threads(2)
    for case in cases(op, rows):
        held = np.load(folder / f"{case.lines}.npz", allow_pickle=False)
        bitstream = Bitstream.from_bytes((folder / f"{case.lines}.bitstream").read_bytes())
        print(backward(case, times, held["noisy"], held["lengths"], bitstream))


@torch.no_grad()
def entropy(case: Case, noisy_lengths: np.ndarray) -> float:
    """Return the entropy in bits of what one step of noise erases from random lines of the case's reference."""
    kernel = made(case.op)
    sigma = levels(schedule(kernel), [TIME])[0]
    many, size = case.lengths.double(), float(case.lengths.sum())
    if isinstance(kernel, Kernel):
        joint = kernel.transition_matrix(sigma).clamp(min=0) * torch.from_numpy(reference_of(kernel, case.reference))
        given = joint / joint.sum(1, keepdim=True).clamp(min=1e-300)
        return size * float(-torch.xlogy(joint, given).sum()) / math.log(2)
    fates = kernel.fates(sigma)
    if fates is None:  # no closed form: a sum over all pairs of strings with an alignment
        return math.nan
    law = (
        torch.full((256,), 1 / 256, dtype=torch.float64)
        if case.reference is None
        else case.reference / case.reference.sum()
    )
    token = float(-torch.xlogy(law, law).sum()) / math.log(2)
    left = torch.from_numpy(noisy_lengths).double()
    if (
        fates.birth
    ):  # the process is reversible: what is erased from strings of the prior has the entropy of what is drawn
        return math.nan if case.lines == "real" else _drawn(fates, many)
    gone = many - left
    places = torch.lgamma(many + 1) - torch.lgamma(gone + 1) - torch.lgamma(left + 1)
    masked = float(fates.hide[0] / (fates.survive[0] + fates.hide[0])) * float(left.sum())
    return float(places.sum()) / math.log(2) + (float(gone.sum()) + masked) * token


def _drawn(fates: Fates, lengths: Tensor) -> float:
    """Return the entropy in bits of the fates of the tokens of strings, and of the tokens that are born."""

    def bits(*chances: float) -> float:
        return -sum(p * math.log2(p) for p in chances if p > 0)

    b, alive, many = fates.birth, float(fates.survive[0]), float(lengths.sum())
    parents = len(lengths) + many * (alive + fates.replace)
    born = parents * b / (1 - b) + many * fates.replace
    each = bits(alive, float(fates.vanish[0]), fates.replace)
    return many * each + parents * bits(b, 1 - b) / (1 - b) + born * bits(*fates.law.tolist())


def altered(op: str, count: int, times: list[float]) -> tuple[int, int]:
    """Alter one byte of a small bitstream, with a new digest; return how often that is refused, and silently wrong."""
    case = cases(op, 2)[0]
    noisy, lengths, bitstream = forward(case, times, seed=3)
    data, numbers = bitstream.to_bytes()[:-32], np.random.default_rng(4)
    refused = wrong = 0
    for place in numbers.integers(0, len(data), count):
        other = bytearray(data)
        other[place] ^= int(numbers.integers(1, 256))
        try:
            read = Bitstream.from_bytes(bytes(other) + hashlib.sha256(other).digest())
            wrong += backward(case, times, noisy, lengths, read) > 0
        except UserError:
            refused += 1
    return refused, wrong


def main() -> None:
    """Noise, write, recover in another process, alter; print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--altered", type=int, default=1_000)
    parser.add_argument("--kernels", nargs="*", default=[*TOKENS, *STRINGS])
    parser.add_argument("--restore", nargs=2, metavar=("FOLDER", "KERNEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    times = [TIME]
    if arguments.restore:
        restore(Path(arguments.restore[0]), arguments.rows, arguments.restore[1], times)
        return
    for op in arguments.kernels:
        for record in measured(op, arguments.rows, arguments.altered, times):
            print(json.dumps(record), flush=True)
            append_record("bitstreams", record)
        table()


def measured(op: str, rows: int, count: int, times: list[float]) -> list[dict[str, Any]]:
    """Return a record for the real lines, and one for the random ones, under a kernel."""
    with tempfile.TemporaryDirectory() as name:
        found = list[dict[str, Any]]()
        for seed, case in enumerate(cases(op, rows)):
            noisy, lengths, bitstream = forward(case, times, seed)
            np.savez(Path(name) / f"{case.lines}.npz", noisy=noisy, lengths=lengths)
            (Path(name) / f"{case.lines}.bitstream").write_bytes(data := bitstream.to_bytes())
            bound = entropy(case, lengths)
            record = {"kernel": op, "lines": case.lines, "rows": rows, "tokens": int(case.lengths.sum())}
            record |= {"bits": bitstream.bits, "entropy": None if math.isnan(bound) else bound, "file": 8 * len(data)}
            found.append(record | {"drawn": 16 * int(bitstream.supply.at.sum())})
        command = [sys.executable, __file__, "--rows", str(rows), "--restore", name, op]
        wrong = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    refused, silent = altered(op, count, times)
    more = {"altered": count, "refused": refused, "silently_wrong": silent}
    return [record | {"wrong": int(failures)} | more for record, failures in zip(found, wrong, strict=True)]


def table() -> None:
    """Write the table of the last record of each kernel and kind of lines."""
    lines = (RESULTS / "bitstreams.jsonl").read_text(encoding="utf-8").splitlines()
    last = {(r["kernel"], r["lines"]): r for r in map(json.loads, lines)}
    text = [
        "# Bitstreams of reversible noise",
        "",
        f"Lines of the built-in corpus (up to {LENGTH} bytes) and random lines, one step to t = {TIME}, schedule `loglinear` (`steps`: 50 of 100 steps); bits per token of",
        "the clean lines. Recovered by another process from files. `altered`: a byte of a bitstream is altered, with a matching digest.",
        "",
        "| kernel | lines | wrong | record | entropy | ratio | file | drawn | altered: refused, silently wrong |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for op in (*TOKENS, *STRINGS):
        for kind in ("real", "random"):
            if (r := last.get((op, kind))) is None:
                continue
            n, bound = r["tokens"], r["entropy"]
            ratio = "" if kind == "real" or bound is None else f"{r['bits'] / bound:.4f}"
            sizes = [f"{r['bits'] / n:.4f}", "" if bound is None else f"{bound / n:.4f}", ratio]
            sizes += [f"{r['file'] / n:.4f}", f"{r['drawn'] / n:.4f}"]
            text.append(
                f"| `{op}` | {r['rows']:,} {kind} | {r['wrong']} | {' | '.join(sizes)} | "
                f"{r['refused']:,}, {r['silently_wrong']} of {r['altered']:,} |"
            )
    (RESULTS / "bitstreams.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
