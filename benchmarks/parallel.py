"""Training by several processes (gloo), compared with one: losses, resuming with another number of processes, kills.

    python benchmarks/parallel.py losses [CASE ...]   # 20 steps in 2 and 4 processes: losses of one process to 1e-5
    python benchmarks/parallel.py resume              # N -> M for N, M in (1, 2, 4): equal weights, next loss to 1e-6
    python benchmarks/parallel.py kills [COUNT]       # a worker of torchrun is killed at random: same losses in the end
    python benchmarks/parallel.py writing             # memory and stall of asynchronous checkpoints

Prints one line per case, and exits with 1 if one fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SMALL = """\
blueprint: 1
name: small
params: {dim: 32, heads: 2, depth: 2, tokens: 128}
axes: {b: batch, l: length, d: "${params.dim}", v: "${params.tokens}+1"}
inputs: {tokens: int b l, attend: bool b l}
outputs: {log_x0: head}
blocks:
  layer:
    params: {heads: 2}
    inputs: {x: float b l d, attend: bool b l}
    outputs: {x: fed}
    nodes:
      norm: {op: rms_norm, in: x}
      attention: {op: attention, in: {x: norm, attend: attend}, with: {heads: "${params.heads}"}}
      attended: {op: add, in: [x, attention]}
      mlp: {op: feed_forward, in: attended, with: {hidden: 2*d}}
      fed: {op: add, in: [attended, mlp]}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  trunk: {block: layer, MEMORY repeat: "${params.depth}", in: {x: embed, attend: attend}, with: {heads: "${params.heads}"}}
  head: {op: x0_head, in: {x: trunk, tokens: tokens}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: masked_count}
sample: {op: ancestral, steps: 8}
data: {tokenizer: {op: characters, size: 128}, length: 32}
train: {steps: 20, batch: 8, warmup: 2, compile: "off", log_every: 1, evaluate: null, checkpoint: {every: 3}}
"""
LR = "train.optimizer.lr=0.01"
CASES: dict[str, tuple[str, list[str]]] = {
    "adamw": ("small", [LR]),
    "accumulation": ("small", [LR, "train.accumulate=2"]),
    "no average": ("small", [LR, "train.ema=null"]),
    "muon": ("small", ["train.optimizer={op: muon, lr: 0.02}"]),
    "checkpointed": ("checkpoint", [LR]),
    "learned schedule": ("small", [LR, "objective.op=nelbo", "process.schedule.op=learned"]),
    "saved activations": ("saved", [LR]),
    "uniform": ("sedd-uniform-tiny", [LR]),
    "learned masking": ("genmd4-tiny", []),
    "learned code": ("langflow-tiny", []),
    "diffusion of embeddings": ("diffusion-lm-tiny", []),
    "edits": ("editflow-tiny", []),
    "reversible": ("sedd-reversible-tiny", []),
    "reversible, exact": ("sedd-reversible-tiny", ["nodes.trunk.arithmetic=exact"]),
}
MEMORY = {"small": "", "checkpoint": "memory: checkpoint,", "saved": "save: {ports: [x], every: 1, rows: 2, chunk: 4},"}
SHIPPED = "train={steps: 20, batch: 8, warmup: 2, compile: 'off', log_every: 1, evaluate: null, sample: null}"
QUICK = ["--proof", "quick", "--compile", "off", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
MODULE = [sys.executable, "-m"]


def run(command: list[str], *, check: bool = True) -> int:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.returncode


def build(folder: Path, name: str, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    blueprint = name
    if name in MEMORY:
        (folder / "small.yaml").write_text(SMALL.replace("MEMORY", MEMORY[name]))
        blueprint = str(folder / "small.yaml")
    else:
        overrides = (SHIPPED, *overrides)
    where = ["--runs", str(folder / "runs"), "--path-to", str(folder / "at")]
    run([*MODULE, "sedd_graph", "build", blueprint, *QUICK, *where, *overrides])
    return Path((folder / "at").read_text())


def launch(processes: int, *options: str) -> list[str]:
    """The command of torchrun, or of one process without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port, *options, "-m"]
    return [*MODULE, *(torchrun if processes else []), "sedd_graph"]


def train(path: Path, processes: int, *arguments: str) -> None:
    run([*launch(processes), "train", str(path), "--device", "cpu", *arguments])


def losses(path: Path) -> dict[int, float]:
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def difference(ours: dict[int, float], theirs: dict[int, float]) -> float:
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)


def tensors(path: Path, step: int) -> dict[str, torch.Tensor]:
    from sedd_graph.store.manifest import read_manifest
    from sedd_graph.training.checkpoint_reader import stored

    where = path / "checkpoints" / f"step-{step:08d}"
    manifest = read_manifest(where)
    kinds = ("model", "ema", "optimizer")
    return {f"{kind}/{name}": t for kind in kinds for name, t in stored(where, kind, manifest).tensors().items()}


def compare_losses(folder: Path, names: list[str]) -> bool:
    good = True
    for name in names or CASES:
        blueprint, overrides = CASES[name]
        one = build(folder / name / "one", blueprint, *overrides)
        train(one, 0)
        for count, parallel in ((2, "{shard: null}"), (4, "{shard: null}"), (4, "{replicate: 2, shard: 2}"), (2, "{}")):
            other = build(folder / name / f"{count}{parallel}", blueprint, *overrides, f"train.parallel={parallel}")
            train(other, count)
            found = difference(losses(other), losses(one))
            good &= found <= 1e-5
            print(f"{name:24} {count} processes {parallel:24} losses differ by {found:.1e}", flush=True)
    return good


def compare_resumed(folder: Path) -> bool:
    """Train 5 steps by N processes, then one more by M: weights of step 5 and the loss of step 6."""
    good, start = True, build(folder / "start", "small", "train.steps=5", LR, "train.parallel.shard=null")
    for n in (1, 2, 4):
        first = folder / str(n)
        shutil.copytree(start, first)
        train(first, n)
        expected: float | None = None
        for m in (n, *({1, 2, 4} - {n})):
            other = folder / f"{n}-{m}"
            shutil.copytree(first, other)
            train(other, m, "train.steps=6", "train.checkpoint.keep=9", "--resume")
            loaded = probe(first, folder / f"probe{n}-{m}", m)
            loss = losses(other)[6]
            expected = loss if expected is None else expected
            found = abs(loss - expected) / expected
            good &= loaded and found <= 1e-6
            print(
                f"{n} -> {m}: weights equal after loading and writing: {loaded}; next loss differs by {found:.1e}",
                flush=True,
            )
    return good


def probe(first: Path, other: Path, processes: int) -> bool:
    """Let M processes resume, and write their state again without a step: the bits of the checkpoint."""
    shutil.copytree(first, other)
    code = (
        "import sys, torch; from pathlib import Path; from sedd_graph.runs.open import open_run;"
        "from sedd_graph.training.distributed import World; from sedd_graph.training.trainer import Trainer;"
        "path = Path(sys.argv[1]); world = World.from_environment(torch.device('cpu'));"
        "run = open_run(path, device='cpu', compile='off', weights='fresh');"
        "trainer = Trainer(run.engine, run.data(), run.report.train, path, world, print); trainer.resume();"
        "trainer.step = 7; trainer.save(); world.close()"
    )
    script = other.with_suffix(".py")
    script.write_text(code)
    command = launch(processes)[:-2]
    run([*command, str(script), str(other)])
    ours, theirs = tensors(other, 7), tensors(first, 5)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], t) for name, t in theirs.items())


def kill_workers(folder: Path, count: int) -> bool:
    """Kill workers of torchrun at random moments; every run must end with the losses of an unbroken one."""
    settings = ("train.steps=200", "train.checkpoint={every: 10}", LR, "train.parallel.shard=null")
    whole, fresh = build(folder / "whole", "small", *settings), folder / "fresh"
    shutil.copytree(whole, fresh)
    began = time.monotonic()
    train(whole, 2)
    seconds, kills, good, rng = time.monotonic() - began, 0, True, random.Random(0)
    number = 0
    while kills < count:
        number += 1
        other = folder / f"run{number}"
        shutil.copytree(fresh, other)
        command = [*launch(2, "--max-restarts", "3"), "train", str(other), "--device", "cpu", "--resume", "auto"]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as agent:
            for _ in range(min(3, count - kills)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    agent.wait(rng.uniform(0.3, 0.9) * seconds)
                workers = children(agent.pid)
                if agent.poll() is not None or not workers:
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    kills += 1
            _, said = agent.communicate()
        found = difference(losses(other), losses(whole)) if agent.returncode == 0 else float("inf")
        good &= found == 0.0
        print(
            f"run {number}: exit code {agent.returncode} after {kills} kills in all, losses differ by {found:.1e}",
            flush=True,
        )
        if agent.returncode:
            print(said.decode()[-2000:])
    return good


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def measure_writing(folder: Path) -> bool:
    """Memory beyond the training state while a checkpoint is written, and the share of time that steps lose to it."""
    from sedd_graph.training.checkpoint import State, Window
    from sedd_graph.training.checkpoint_writer import CheckpointWriter, Shard
    from sedd_graph.training.distributed import World

    count = 64
    state = {
        f"w{i}": torch.randn(1024, 1024) for i in range(count)
    }  # one rank's share, of four tensors of 64 MiB a name
    kinds = {"model": state, "ema": {k: v + 1 for k, v in state.items()}}
    kinds["optimizer"] = {f"{k}/{m}": v + 2 for k, v in state.items() for m in ("exp_avg", "exp_avg_sq")}
    share = sum(t.numel() * 4 for named in kinds.values() for t in named.values())
    writer = CheckpointWriter(folder, World.single(), Shard(0, 1), keep=1)
    a, peak = torch.randn(768, 768), 0

    def steps(seconds: float) -> float:
        nonlocal peak
        done, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            a @ a
            done += 1
            peak = max(peak, resident())
        return done / (time.monotonic() - began)

    before = resident()
    alone = steps(5)
    peak, began = 0, time.monotonic()
    state_of = State(step=1, seconds=0.0, average_count=0, world=1, window=Window(), train={})
    writer.begin(kinds, state_of)
    copied = time.monotonic() - began
    while writer.writing:
        steps(0.1)
    wrote = time.monotonic() - began
    writer.finish()
    print(f"share {share / 2**20:,.0f} MiB: copied in {copied:.2f} s, written in {wrote:.2f} s")
    print(f"memory beyond the state: {(peak - before) / share:.2f} of the share")
    print(f"steps alone {alone:.1f}/s; the copy takes {copied / 1800:.2%} of half an hour between checkpoints")
    return (peak - before) / share <= 1.2


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")  # without pages of files


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("losses", "resume", "kills", "writing"):
        raise SystemExit(__doc__)
    what, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = {
            "losses": lambda: compare_losses(folder, rest),
            "resume": lambda: compare_resumed(folder),
            "kills": lambda: kill_workers(folder, int(rest[0]) if rest else 10),
            "writing": lambda: measure_writing(folder),
        }[what]()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
