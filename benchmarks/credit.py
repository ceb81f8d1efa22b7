"""Noise of the gradient of `idlm` by what a drawn token answers for (`credit`), at the newest checkpoint of a student.

    python benchmarks/credit.py STUDENT [--batches 48] [--corpus DIR] [--threads 1]

STUDENT is a run folder that `sedd-graph distill TEACHER distill.op=idlm` made. Its newest checkpoint gives student, teacher and
follower; all kinds of credit have the same noisy rows, drawn tokens and noise. Prints, for each, the trace of the covariance of
a batch's gradient over the squared norm of the mean gradient: the number of batches whose mean has as much noise as signal.
Appends a record to benchmarks/results/credit.jsonl.
"""

import argparse
import functools
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import torch
from common import append_record, text_data, token_process
from safetensors.torch import load_file
from sedd_graph_registry.training.distillation import IDLM
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.distillation import Networks, Outputs
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.engine.regions import Model
from sedd_graph.evaluation.bound import to_batch
from sedd_graph.runs.distilled import distiller
from sedd_graph.runs.open import open_run
from sedd_graph.training.checkpoint import latest_checkpoint
from sedd_graph.training.distilling import Helpers

CREDITS = get_args(IDLM.Config.model_fields["credit"].annotation)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--corpus", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    run = open_run(given.student, device="cpu", compile="off", weights="model", root=given.corpus)
    engine = distiller(run.engine, run.report)
    checkpoint = latest_checkpoint(given.student / "checkpoints")
    helpers, process = engine.helpers, engine.process.distillable()
    if checkpoint is None or not isinstance(helpers, Helpers) or helpers.follower is None:
        raise SystemExit(f"{given.student} has no follower: distil with distill.op=idlm")
    helpers.load_state_dict(load_file(checkpoint / "helpers.safetensors"))
    teacher, follower = helpers.teacher, helpers.follower
    data, rows = text_data(run.report, root=given.corpus), run.report.train.batch
    weights = [p for p in engine.model.parameters() if p.requires_grad]
    found: dict[str, list[Tensor]] = {name: [] for name in CREDITS}

    def evaluate(model: Model, at: object, batch: object) -> Outputs:
        return process.run(model, at, batch, None)[0]

    networks = Networks(*(functools.partial(evaluate, model) for model in (engine.model, teacher, follower)))
    for number in range(given.batches):
        batch = to_batch(data.batch(number * rows, rows, start=0, stop=rows), engine.process, torch.device("cpu"))
        for name in CREDITS:
            objective = IDLM(IDLM.Config(credit=name))
            draw = objective.draw(process, batch, 0, Randomness(torch.Generator().manual_seed(number)))
            loss = objective.loss(process, networks, draw, batch).sum() / (rows * batch.width)
            found[name].append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    means = {name: torch.stack(each).mean(0) for name, each in found.items()}
    record: dict[str, dict[str, float | None]] = {}
    for name, each in found.items():
        noise = float(torch.stack(each).var(0).sum())
        signal = max(0.0, float(means[name].square().sum()) - noise / len(each))
        needed = noise / signal if signal else None
        record[name] = {"noise": noise**0.5, "signal": signal**0.5, "batches": needed}
        said = f"{needed:.3g}" if needed else f"more than {given.batches}"
        print(f"{name:10s} noise {noise**0.5:.4g}, signal {signal**0.5:.4g}: {said} batches")
    facts = {"hardware": describe_hardware(torch.device("cpu")), "batches": given.batches}
    kernel = type(token_process(engine).kernel).__name__
    time = datetime.now(UTC).isoformat(timespec="seconds")
    append_record("credit", {"time": time, **facts, "kernel": kernel, "credit": record})


if __name__ == "__main__":
    main()
