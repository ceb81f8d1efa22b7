"""Memory and time of output head and loss: at 50,257 tokens, and in training steps compared with another checkout.

    python benchmarks/tail.py memory [CASE ...] [--compile block]
    python benchmarks/tail.py speed BLUEPRINT [KEY=VALUE ...] --base DIR [--rounds N] [--steps N]

``memory``: the largest memory of head, loss and their backward pass for 4 rows of 1,024 positions, beside the weights and the
gradients of the head, for each objective. It is counted operation by operation and, for compiled code, by the
allocator. ``speed``: seconds per training step of this checkout and of the one in DIR, each in a process of its own that has its
own environment (DIR/.venv), in rotation; by the clock, and by the time of the processor, which other processes affect less.
Appends a record to benchmarks/results/tail.jsonl with the hardware named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
BATCH, LENGTH, TOKENS, WIDTH = 4, 1024, 50_257, 768
NETWORK = """blueprint: 1
name: end
axes: {{b: batch, l: length, d: {width}, e: 16, v: {states}}}
inputs: {{tokens: int b l, sigma: float b}}
outputs: {{{output}: head}}
nodes:
  embed: {{op: token_embedding, in: tokens, out: float b l d, with: {{vocab: v, init: kaiming}}}}
  time: {{op: sigma_embedding, in: sigma, out: float b e}}
  norm: {{op: layer_norm, in: embed.out}}
  modulate: {{op: adaln_modulate, in: {{x: norm, c: time}}}}
  head: {head}
process: {{op: {kernel}, schedule: {{op: {schedule}}}}}
objective: {{op: {objective}}}
sample: {{op: analytic, steps: 8}}
"""
SCORES = "{op: score_head, in: {x: modulate, tokens: tokens, sigma: sigma}, out: float b l v}"
X0 = "{op: x0_head, in: {x: modulate, tokens: tokens}, out: float b l v}"
LOGITS = "{op: x0_head, in: {x: modulate, tokens: tokens}, out: float b l v, with: {mask: none}}"
CASES = {
    # name: kernel, output, head, objective, schedule
    "score_entropy": ("absorb", "log_score", SCORES, "score_entropy", "loglinear"),
    "nelbo": ("absorb", "log_x0", X0, "nelbo", "loglinear"),
    "masked_count": ("absorb", "log_x0", X0, "masked_count", "loglinear"),
    "d3pm": ("absorb", "log_x0", X0, "d3pm", "loglinear"),
    "uniform": ("uniform", "log_x0", LOGITS, "nelbo", "geometric"),
}


def memory(names: list[str], mode: str) -> dict[str, object]:
    """Print and return the memory of each case, GB."""
    import sedd_graph
    from sedd_graph.diffusion.batch import Batch, Randomness
    from sedd_graph.engine.peak import PeakMemory, allocated_peak

    record: dict[str, object] = {}
    print(f"{BATCH} rows of {LENGTH}, {TOKENS:,} tokens, width {WIDTH}, compile={mode}; one tensor of all logits has "
          f"{4 * BATCH * LENGTH * TOKENS / 1e9:.2f} GB")  # fmt: skip
    for name in names or CASES:
        kernel, output, head, objective, schedule = CASES[name]
        fields = {"kernel": kernel, "output": output, "head": head, "objective": objective, "schedule": schedule}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "end.yaml"
            path.write_text(NETWORK.format(width=WIDTH, states=TOKENS + 1, **fields))
            engine = sedd_graph.build(path, device="cpu", compile=mode)  # type: ignore[arg-type]
        engine.model.train()
        generator = torch.Generator().manual_seed(0)
        batch = Batch.of(torch.randint(0, TOKENS, (BATCH, LENGTH), generator=generator))
        draw = engine.draw(batch, random=Randomness(generator))
        own = sum(4 * p.numel() for n, p in engine.model.named_parameters() if n.startswith("head."))

        def step() -> None:
            engine.model.zero_grad(set_to_none=True)
            engine.trained(draw, batch)[0].sum().backward()

        began = time.perf_counter()
        counter = PeakMemory(engine.model.parameters())
        if mode == "off":
            with counter:
                step()
            peak = counter.peak
        else:
            step()  # compiles
            engine.model.zero_grad(set_to_none=True)
            peak = allocated_peak(step, engine.device)[0] or 0
        found = (peak - own) / 1e9
        record[name] = found
        print(f"{name:16}{found:6.2f} GB  ({time.perf_counter() - began:.0f} s)", flush=True)
    return record


def work(arguments: list[str]) -> None:
    """Train: for each number on the standard input so many steps, whose mean times are printed."""
    from sedd_graph.runs.check import check
    from sedd_graph.runs.open import make_engine, read_data
    from sedd_graph.training.distributed import World
    from sedd_graph.training.trainer import Trainer

    name, *overrides = arguments
    report = check(name, overrides)
    with tempfile.TemporaryDirectory() as cache:
        data = read_data(report, root=Path(cache))
    engine = make_engine(report, device=torch.device("cpu"), compile="auto")
    trainer = Trainer(engine, data, report.train, HERE.parent, World.single(), print)
    engine.model.train()
    for line in sys.stdin:
        count, clock, processor = int(line), time.perf_counter(), time.process_time()
        for _ in range(count):
            trainer.train_step()
            trainer.update(0.0)
            trainer.step += 1
        print(
            json.dumps([(time.perf_counter() - clock) / count, (time.process_time() - processor) / count]), flush=True
        )


def speed(base: Path, rounds: int, steps: int, arguments: list[str]) -> dict[str, object]:
    """Print and return the ratios of the base's seconds per step to those of this checkout, by clock and by processor."""
    pythons = {"base": base / ".venv/bin/python", "this": Path(sys.executable)}
    workers = {
        name: subprocess.Popen(
            [str(python), str(HERE), "work", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=base if name == "base" else HERE.parent.parent,
        )
        for name, python in pythons.items()
    }

    def run(name: str, count: int) -> tuple[float, float]:
        inner, outer = workers[name].stdin, workers[name].stdout
        if inner is None or outer is None:
            raise SystemExit("no pipes")
        inner.write(f"{count}\n")
        inner.flush()
        for line in outer:
            if line.startswith("["):
                clock, processor = json.loads(line)
                return clock, processor
        raise SystemExit(f"the process of {name!r} ended")

    for name in workers:
        run(name, 2)  # compiles
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for number in range(rounds):
        for name in list(workers)[:: 1 if number % 2 else -1]:
            seconds[name].append(run(name, steps))
    for worker in workers.values():
        worker.communicate()
    record: dict[str, object] = {"arguments": arguments, "seconds": seconds}
    for place, what in enumerate(("clock", "processor")):
        ratios = [a[place] / b[place] for a, b in zip(seconds["base"], seconds["this"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        record[what] = [low, middle, high]
        each = {name: statistics.median(s[place] for s in found) for name, found in seconds.items()}
        print(f"{what:10} {each['base']:.3f} s at the base, {each['this']:.3f} s here: {middle:.2f} times as fast "
              f"(quartiles {low:.2f} to {high:.2f}, {rounds} rounds of {steps})")  # fmt: skip
    return record


def main() -> None:
    """Measure, print, record."""
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2:])
        return
    from common import append_record

    from sedd_graph.engine.hardware import describe_hardware

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("memory", "speed"))
    parser.add_argument("names", nargs="*", help="cases, or a blueprint and changes to it")
    parser.add_argument("--compile", choices=("off", "block"), default="off")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "memory":
        found = memory(arguments.names, arguments.compile)
        record = {"memory_gb": found, "compile": arguments.compile}
    elif arguments.base is None or not arguments.names:
        raise SystemExit("give a blueprint, and --base, a checkout with an environment in .venv")
    else:
        record = speed(arguments.base.resolve(), arguments.rounds, arguments.steps, arguments.names)
    hardware = {"hardware": describe_hardware(torch.device("cpu")), "threads": torch.get_num_threads()}
    append_record("tail", {**record, **hardware, "torch": torch.__version__})


if __name__ == "__main__":
    main()
