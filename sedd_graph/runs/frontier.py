"""Subcommand ``eval --frontier``: generative perplexity over temperatures and steps, and at the entropy of held-out text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sedd_graph.component.progress import progress
from sedd_graph.engine.hardware import describe_hardware
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.evaluation.frontier import AtEntropy, FrontierPoint, Judged, at_entropy, judged
from sedd_graph.evaluation.judge import Ids, Judge, open_judge
from sedd_graph.evaluation.quality import documents
from sedd_graph.evaluation.record import FRONTIER
from sedd_graph.runs.judge import held_out
from sedd_graph.runs.memory import require_sampling_memory
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.precision import choose_dtype, dtype_name
from sedd_graph.runs.provenance import revision, version_of
from sedd_graph.runs.sample_section import sampler_settings
from sedd_graph.store.json_lines import JsonLines

__all__ = ["TEMPERATURES", "FrontierSettings", "frontier_run"]

TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1)
"""Temperatures of a frontier by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierSettings:
    """Which samples a frontier is made of.

    Attributes:
        temperatures: Temperatures of the sampler, at least two.
        steps: Numbers of steps; empty: that of the blueprint alone.
        rows: Number of samples of each.
        at_once: Largest number of rows that are sampled together.
        seed: Seed of the samples; all temperatures and steps have the same.
    """

    temperatures: tuple[float, ...] = TEMPERATURES
    steps: tuple[int, ...] = ()
    rows: int = 64
    at_once: int = 64
    seed: int = 0


def frontier_run(
    path: Path,
    *,
    judge: Path,
    settings: FrontierSettings,
    device: torch.device,
    weights: str,
    say: Callable[[str], None],
    corpus: Path | None = None,
    dtype: str | None = None,
    overrides: Sequence[str] = (),
) -> list[AtEntropy]:
    """Sample at several temperatures, judge the samples, and interpolate their perplexity at the entropy of held-out text.

    The result is printed, and appended to ``frontier.jsonl`` in the run folder. Samples are not stored: seed, weights and
    settings are recorded, with which they can be drawn again.

    Args:
        path: The run folder.
        judge: Folder of a causal language model (:func:`sedd_graph.evaluation.judge.open_judge`).
        settings: The samples.
        device: Device of the run and of the judge.
        weights: Weights of the run, as of :func:`sedd_graph.runs.open.open_run`.
        say: Function that prints a line for the user.
        corpus: Folder to which file names of the data are relative, if it has moved since the run was built.
        dtype: Precision of the network.
        overrides: Changes of the ``sample`` section (:func:`~sedd_graph.runs.sample_section.sample_overrides`).

    Returns:
        For each number of steps the perplexity at the entropy of held-out text.

    Raises:
        UserError: There is no held-out text, the sampler has no temperature, or the judge cannot be read.
    """
    if len(set(settings.temperatures)) < 2:
        raise UserError("a frontier needs at least two temperatures: --temperatures 0.8 1")
    run = open_run(path, overrides=overrides, device=device, compile="off", weights=weights, root=corpus)
    choose_dtype(run, dtype)
    tokenizer, reader = run.text_tokenizer(), open_judge(judge, device=device)
    length = int(run.report.data.length)
    held, why_not = held_out(run, settings.rows, length)
    if held is None:
        raise UserError(f"a frontier is read at the entropy of held-out text, and there is none: {why_not}")
    reference = judged(reader.read(documents(held[: settings.rows], tokenizer)))
    points, found = [FrontierPoint.of(reference, temperature=None, steps=None)], list[AtEntropy]()
    counts: Sequence[int | None] = settings.steps or (run.engine.process.steps,)
    with progress("sampling", total=settings.rows * len(settings.temperatures) * len(counts), unit="row") as advance:
        for steps in counts:
            texts = [_judged(run, reader, settings, t, steps, length, advance, say) for t in settings.temperatures]
            points += [
                FrontierPoint.of(t, temperature=v, steps=steps)
                for t, v in zip(texts, settings.temperatures, strict=True)
            ]
            found.append(at_entropy(texts, settings.temperatures, reference, steps=steps, seed=settings.seed))
    _print(points, found, say)
    records = JsonLines(path / FRONTIER)
    records.append(_record(run, reader, settings, overrides, points, found))
    records.close()
    say(f"stored in {path / FRONTIER}")
    return found


def _judged(
    run: Run,
    reader: Judge,
    settings: FrontierSettings,
    temperature: float,
    steps: int | None,
    length: int,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> Judged:
    """Draw samples at one temperature and number of steps, and judge them."""
    rows = list[Ids]()
    with sampler_settings(run, temperature=temperature):
        for start in range(0, settings.rows, settings.at_once):
            count = min(settings.at_once, settings.rows - start)
            request = SampleRequest(batch=count, length=length, steps=steps, seed=settings.seed + start)
            require_sampling_memory(run, request, trajectory=False, ignore=False, say=say)
            rows.append(run.engine.generate(request).rows.numpy())
            advance(count)
    texts = [text for part in rows for text in documents(part, run.text_tokenizer())]
    found = judged(reader.read(texts))
    if not len(found.nats):
        raise UserError(f"samples at temperature {temperature:g} have no text that the judge counts")
    return found


def _print(points: Sequence[FrontierPoint], found: Sequence[AtEntropy], say: Callable[[str], None]) -> None:
    say("temperature  steps  generative perplexity  unigram entropy, nats per token of the judge")
    for point in points:
        name = "held out" if point.temperature is None else f"{point.temperature:g}"
        error = point.perplexity * point.nats_standard_error
        perplexity = f"{point.perplexity:.2f} +- {error:.2f}"
        steps = "" if point.steps is None else str(point.steps)
        say(f"{name:11}  {steps:5}  {perplexity:21}  {point.entropy:.4f} +- {point.entropy_standard_error:.4f}")
    for each in found:
        steps = "" if each.steps is None else f", {each.steps} steps"
        if each.perplexity is None:
            say(f"at the entropy of held-out text{steps}: unknown, since {each.why_not}")
            continue
        say(
            f"at the entropy of held-out text{steps}: perplexity {each.perplexity:.2f} +- {each.standard_error:.2f}, "
            f"+- {each.sample_error:.2f} beside this text (temperature {each.temperature:.3f})"
        )
        if each.why_not is not None:
            say(f"no error: {each.why_not}")


def _record(
    run: Run,
    reader: Judge,
    settings: FrontierSettings,
    overrides: Sequence[str],
    points: Sequence[FrontierPoint],
    found: Sequence[AtEntropy],
) -> Mapping[str, Any]:
    return {
        "points": [dataclasses.asdict(point) for point in points],
        "at_entropy": [dataclasses.asdict(each) for each in found],
        "judge": dataclasses.asdict(reader.facts()),
        "protocol": {
            "sampler": run.plan.sampler_op,
            **run.plan.sampling(),
            "overrides": list(overrides),
            **dataclasses.asdict(settings),
            "length": int(run.report.data.length),
            "weights": run.weights,
            "blueprint": run.digest,
            "dtype": dtype_name(run),
            "hardware": describe_hardware(run.engine.device),
            "revision": revision(),
            "versions": {name: version_of(name) for name in ("sedd_graph", "torch", "transformers")},
        },
    }
