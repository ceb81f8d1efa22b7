"""Tokens per second of sampling compared with the sampling loop of the public SEDD code, in one run.

    python benchmarks/sample.py [--rounds N] [--evaluations N] [--device cuda]

32 rows of 128 tokens, 97 states, six blocks of width 256, random weights. The plain loop is the analytic sampler of SEDD's
code, over the network written by hand (benchmarks/handwritten.py), eager: each level evaluates the whole network, the scores
of all states at all positions, and draws by Gumbel noise. All levels cost the same, so its time is extrapolated from some of
them. Ours: ``analytic`` (a log-score head, the same steps), ``ancestral`` (a head that predicts the clean token: the same
distribution in the same levels, but the rows, levels and positions where a token is revealed are drawn first) and
``first_hitting`` (the distribution of infinitely many levels), each timed whole, with compiled blocks and interleaved timing.
benchmarks/samplers.py measures how far each is from the distribution of the data with a perfect network. Last, for a
vocabulary of 50,257: one level with the head at all positions, and only where it is needed. Prints a table in Markdown, writes it to
benchmarks/results/sample.md, and appends the numbers to benchmarks/results/sample.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import BLUEPRINTS, RESULTS, append_record, token_process
from handwritten import EPS, Sedd
from interleaved import quartiles
from torch import Tensor

from sedd_graph.diffusion.tokens.groups import Groups
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine

ROWS, LENGTH, TOKENS = 32, 128, 96
SIZE = {"dim": 256, "depth": 6, "heads": 4, "cond": 128, "tokens": TOKENS}


@torch.no_grad()
def plain_levels(model: Sedd, states: int, levels: int, count: int, device: torch.device) -> float:
    """Return the seconds of ``levels`` levels of the analytic sampler for the absorbing kernel, from ``count`` spread evenly."""
    mask = states - 1
    times = torch.linspace(1, 1e-5, levels + 1, device=device)
    sigmas = -torch.log1p(-(1 - EPS) * times)
    x = torch.full((ROWS, LENGTH), mask, device=device)
    began = time.perf_counter()
    for level in torch.linspace(0, levels - 1, count).long().tolist():
        sigma, step = sigmas[level].expand(ROWS), sigmas[level] - sigmas[level + 1]
        score = model(x, sigma).exp()
        # (exp(-step Q) score)_y exp(step Q)[x, y], as in the code of SEDD for the absorbing kernel
        extra = (1 - step.exp()) * score.sum(-1)
        score = score * step.exp()
        score[..., mask] += extra
        move = (-step).exp() * torch.nn.functional.one_hot(x, states).float()
        move = move + torch.where(x == mask, 1 - (-step).exp(), 0.0)[..., None]
        probabilities = (score * move).clamp(min=0)
        gumbel = 1e-10 - torch.log(torch.rand_like(probabilities) + 1e-10)
        x = (probabilities / gumbel).argmax(-1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * levels / count


def made(name: str, sampler: str, device: torch.device, tokens: int = TOKENS) -> Engine:
    """Return a tiny blueprint at this benchmark's size, with random weights (none of them zero)."""
    changes = [f"params.{k}={v}" for k, v in {**SIZE, "tokens": tokens}.items()]
    changes += [f"data.tokenizer={{op: characters, size: {tokens}}}", f"sample={{op: {sampler}}}"]
    report = check(BLUEPRINTS / f"{name}.yaml", changes)
    engine = make_engine(report, device=device, compile="off")
    engine.compile("block", everywhere=True)
    for i, p in enumerate(engine.model.parameters()):
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator(device).manual_seed(i))
    return engine


def timed(engine: Engine, levels: int | None, seed: int) -> float:
    """Return the seconds of one batch."""
    began = time.perf_counter()
    engine.sample(ROWS, LENGTH, steps=levels, seed=seed)
    return time.perf_counter() - began


def head_alone(device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Return seconds of one level that reveals one token per row at a vocabulary of 50,257: head everywhere, and only there."""
    engine = made("mdlm-tiny", "first_hitting", device, tokens=50_257)
    x = torch.full((ROWS, LENGTH), 50_257, device=device)
    sigma = torch.ones(ROWS, device=device)
    inputs = {"tokens": x, "sigma": sigma, "t": sigma, "attend": torch.ones_like(x, dtype=torch.bool)}
    at, row = torch.randint(0, LENGTH, (ROWS, 1), device=device), torch.arange(ROWS, device=device)
    groups = Groups(row, row, at, torch.ones_like(at, dtype=torch.bool))
    ways: dict[str, Callable[[], Tensor]] = {
        "everywhere": lambda: engine.network.run(inputs)["log_x0"].exp().sum(),
        "where it is needed": lambda: engine.network.begin(inputs).at(groups)["log_x0"].exp().sum(),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    engine.model.eval()
    with torch.no_grad():
        for number in range(rounds + 1):
            for way, run in ways.items():
                began = time.perf_counter()
                float(run())
                if number:  # the first compiles
                    found[way].append(time.perf_counter() - began)
    return found


def main() -> None:
    """Time, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--evaluations", type=int, default=16, help="timed levels of the plain loop")
    parser.add_argument("--device")
    arguments = parser.parse_args()
    device = torch.device(arguments.device) if arguments.device else pick_device("auto")
    dim, depth, heads, cond = (SIZE[k] for k in ("dim", "depth", "heads", "cond"))
    plain = Sedd(states=TOKENS + 1, dim=dim, depth=depth, heads=heads, cond=cond, dropout=0.0, length=LENGTH)
    plain.to(device).eval()
    contestants = {
        ("analytic", 64): made("sedd-tiny", "analytic", device),
        ("ancestral", 64): made("mdlm-tiny", "ancestral", device),
        ("ancestral", 1024): made("mdlm-tiny", "ancestral", device),
        ("first_hitting", 1024): made("sedd-tiny", "first_hitting", device),
    }
    plain_levels(plain, TOKENS + 1, 64, 2, device)
    for (sampler, _), engine in contestants.items():
        timed(engine, None if sampler == "first_hitting" else 2, 0)  # compiles
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in [("plain", 64), ("plain", 1024), *contestants]}
    for number in range(arguments.rounds):
        for levels in (64, 1024):
            seconds["plain", levels].append(plain_levels(plain, TOKENS + 1, levels, arguments.evaluations, device))
        for (sampler, levels), engine in contestants.items():
            seconds[sampler, levels].append(timed(engine, None if sampler == "first_hitting" else levels, number))
    head = head_alone(device, arguments.rounds)

    hardware = describe_hardware(device)
    lines = [
        f"{ROWS} x {LENGTH} tokens, {TOKENS + 1} states, six blocks of width 256; {hardware}, torch {torch.__version__}; "
        f"{arguments.rounds} rounds, the plain loop extrapolated from {arguments.evaluations} levels.",
        "",
        "| levels | sampler | tokens per second | relative to the plain loop (quartiles) | evaluations per row |",
        "|---|---|---|---|---|",
    ]
    record: dict[str, object] = {"hardware": hardware, "torch": torch.__version__, **vars(arguments)}
    for (sampler, levels), found in seconds.items():
        middle, low, high = quartiles(seconds["plain", levels], found)
        rate = ROWS * LENGTH / statistics.median(found)
        ours = contestants.get((sampler, levels))
        evaluations = levels if ours is None else token_process(ours).sampler.evaluations / ROWS
        cells = f"{levels:,} | {sampler} | {rate:,.1f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {evaluations:,.1f}"
        lines.append(f"| {cells} |")
        record[f"{sampler} {levels}"] = found
    middle, low, high = quartiles(head["everywhere"], head["where it is needed"])
    lines += [
        "",
        f"Vocabulary of 50,257, one level that reveals one token per row: {statistics.median(head['everywhere']):.2f} s with the "
        f"head everywhere, {statistics.median(head['where it is needed']):.2f} s where it is needed, {middle:.2f} ({low:.2f}-{high:.2f}) times as fast.",
    ]
    record["head"] = head
    text = "\n".join(lines)
    print(text)
    (RESULTS / "sample.md").write_text(
        f"# Sampling speed\n\nMade by `python benchmarks/sample.py`.\n\n{text}\n", encoding="utf-8"
    )
    append_record("sample", record)


if __name__ == "__main__":
    main()
