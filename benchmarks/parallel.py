"""Training by several processes (gloo), compared with one: losses, resuming with another number of processes, kills.

    python benchmarks/parallel.py losses [CASE ...]   # 20 steps in 2 (and 4) processes: losses of one process to 1e-5
    python benchmarks/parallel.py resume              # N -> M for N, M in (1, 2, 4): equal weights, next loss to 1e-6
    python benchmarks/parallel.py kills [COUNT]       # a worker of torchrun is killed at random: same losses in the end

Prints one line per case, appends it to benchmarks/results/parallel.jsonl, and exits with 1 if one fails.
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
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import BLUEPRINTS, append_record

from sedd_graph.cli import main as cli
from sedd_graph.component.registry import discover
from sedd_graph.runs.open import open_run
from sedd_graph.store.manifest import read_manifest
from sedd_graph.training.checkpoint_reader import stored
from sedd_graph.training.distributed import World
from sedd_graph.training.trainer import Trainer

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
    "uniform": ("sedd-uniform-tiny", []),
    "learned masking": ("genmd4-tiny", []),
    "learned code": ("langflow-tiny", []),
    "diffusion of embeddings": ("diffusion-lm-tiny", []),
    "edits": ("editflow-tiny", []),
    "reversible": ("sedd-reversible-tiny", []),
    "reversible, exact": ("sedd-reversible-tiny", ["nodes.trunk.arithmetic=exact"]),
}
PARALLEL = (2, "{shard: null}"), (2, "{}"), (4, "{shard: null}"), (4, "{replicate: 2, shard: 2}")
MEMORY = {"small": "", "checkpoint": "memory: checkpoint,", "saved": "save: {ports: [x], every: 1, rows: 2, chunk: 4},"}
SHIPPED = "train={steps: 20, batch: 8, warmup: 2, compile: 'off', log_every: 1, evaluate: null, sample: null}"
QUICK = ["--proof", "quick", "--compile", "off", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def fork(work: Callable[[], int], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Call a function in a fork, which has all modules already, and return the process id."""
    if (pid := os.fork()) == 0:
        code = 99
        try:
            os.environ.update(environment or {})
            number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(number, 1)
            os.dup2(number, 2)
            code = work()
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def run(work: Callable[[], int], log: Path, processes: int = 0) -> None:
    """Call a function in several processes, as torchrun would start them, or in one without, and wait for its end."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    logs = [log.with_name(f"{log.name}{rank}") for rank in range(max(processes, 1))]
    started = [fork(work, path, {**shared, "RANK": str(rank)} if processes else None) for rank, path in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    if any(codes):
        said = "".join(path.read_text(errors="replace")[-3000:] for path in logs)
        raise SystemExit(f"{log}: exit codes {codes}\n{said}")


def command(*arguments: str) -> Callable[[], int]:
    return lambda: cli.run(list(arguments))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def build(folder: Path, name: str, *overrides: str) -> Path:
    if name in MEMORY:
        return build_text(folder, SMALL.replace("MEMORY", MEMORY[name]), *overrides)
    for part in ("", "blocks"):
        shutil.copytree(BLUEPRINTS / part, folder / part, dirs_exist_ok=True)
    text = "".join(f"{n} times {n + 7} are {n * (n + 7)}, and no more;\n" for n in range(200))
    (folder / "text.txt").write_text(text)  # of few held-out rows, all of which are evaluated behind the last step
    settings = (SHIPPED, "data.corpus={op: text, files: [text.txt]}", *overrides)
    return build_text(folder, (folder / f"{name}.yaml").read_text(), *settings)


def build_text(folder: Path, blueprint: str, *overrides: str) -> Path:
    """Build a blueprint that is given as text, in a fork, and return the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(blueprint)
    where = ["--runs", str(folder / "runs"), "--path-to", str(folder / "at")]
    run(command("build", str(folder / "run.yaml"), *QUICK, *where, *overrides), folder / "log")
    return Path((folder / "at").read_text())


def torchrun(processes: int, *options: str) -> list[str]:
    """The beginning of a command of torchrun."""
    ports = ["--nproc-per-node", str(processes), "--master-port", free_port()]
    return [sys.executable, "-m", "torch.distributed.run", *ports, *options]


def train(path: Path, processes: int, *arguments: str) -> None:
    run(command("train", str(path), "--device", "cpu", *arguments), path.with_name(f"log-{path.name}-"), processes)


def losses(path: Path) -> dict[int, float]:
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def difference(ours: dict[int, float], theirs: dict[int, float]) -> float:
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)


def tensors(path: Path, step: int) -> dict[str, torch.Tensor]:
    where = path / "checkpoints" / f"step-{step:08d}"
    manifest = read_manifest(where)
    kinds = ("model", "ema", "optimizer")
    return {f"{kind}/{name}": t for kind in kinds for name, t in stored(where, kind, manifest).tensors().items()}


def compare_losses(folder: Path, names: list[str]) -> bool:
    good = True
    for name in names or CASES:
        blueprint, overrides = CASES[name]
        fresh = build(folder / name, blueprint, *overrides)
        one = shutil.copytree(fresh, folder / f"{name}-one")
        train(one, 0)
        for count, parallel in PARALLEL[: 4 if blueprint in MEMORY else 2]:
            other = shutil.copytree(fresh, folder / f"{name}-{count}-{parallel}")
            train(other, count, f"train.parallel={parallel}", "--resume", "auto")
            found = difference(losses(other), losses(one))
            good &= found <= 1e-5
            record("losses", case=name, processes=count, parallel=parallel, difference=found)
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
            record("resume", processes=n, resumed_by=m, equal_weights=loaded, difference=found)
    return good


def rewrite(path: Path) -> int:
    """Load the newest checkpoint of a run and write it again, as of two steps later, without a step."""
    world = World.from_environment(torch.device("cpu"))
    opened = open_run(path, device="cpu", compile="off", weights="fresh")
    trainer = Trainer(opened.engine, opened.data(), opened.report.train, path, world, print)
    trainer.resume()
    trainer.step += 2
    trainer.save()
    world.close()
    return 0


def probe(first: Path, other: Path, processes: int) -> bool:
    """Whether M processes that load a checkpoint and write it again write the same bits."""
    shutil.copytree(first, other)
    run(lambda: rewrite(other), other.with_name(f"log-{other.name}-"), processes)
    ours, theirs = tensors(other, 7), tensors(first, 5)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], t) for name, t in theirs.items())


def kill_workers(folder: Path, count: int) -> bool:
    """Kill workers of torchrun at random moments; every run must end with the losses of an unbroken one."""
    settings = ("train.steps=200", "train.checkpoint={every: 10}", LR, "train.parallel.shard=null")
    fresh = build(folder / "fresh", "small", *settings)
    whole = shutil.copytree(fresh, folder / "whole")
    arguments = ["--device", "cpu", "--resume", "auto"]
    subprocess.run([*torchrun(2), "-m", "sedd_graph", "train", str(whole), *arguments], env=ENVIRONMENT, check=True)
    kills, number, good, rng = 0, 0, True, random.Random()
    while kills < count:
        number += 1
        other, before = shutil.copytree(fresh, folder / f"run{number}"), kills
        options = torchrun(2, "--max-restarts", "3")
        with subprocess.Popen(
            [*options, "-m", "sedd_graph", "train", str(other), *arguments], env=ENVIRONMENT
        ) as agent:
            for _ in range(min(3, count - kills)):
                if not wait_for_step(other, rng.randint(0, 40), agent):
                    break
                time.sleep(rng.uniform(0, 0.5))
                if workers := children(agent.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rng.choice(workers), signal.SIGKILL)
                        kills += 1
            agent.wait()
        found = difference(losses(other), losses(whole)) if agent.returncode == 0 else float("inf")
        good &= found == 0.0
        record("kills", code=agent.returncode, kills=kills - before, difference=found)
    return good


def wait_for_step(path: Path, more: int, agent: subprocess.Popen[bytes]) -> bool:
    """Wait until training has done a number of steps more than now (of all attempts), or until the agent has ended."""

    def lines() -> int:
        return (path / "metrics.jsonl").read_bytes().count(b"\n") if (path / "metrics.jsonl").exists() else 0

    last = lines() + more
    while lines() < last and agent.poll() is None:
        time.sleep(0.05)
    return agent.poll() is None


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def record(what: str, **found: object) -> None:
    line = {"measure": what, **found}
    append_record("parallel", line)
    print(json.dumps(line), flush=True)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("losses", "resume", "kills"):
        raise SystemExit(__doc__)
    what, *rest = sys.argv[1:]
    discover()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = {
            "losses": lambda: compare_losses(folder, rest),
            "resume": lambda: compare_resumed(folder),
            "kills": lambda: kill_workers(folder, int(rest[0]) if rest else 10),
        }[what]()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
