"""The declared noise process made: its four components, or every reason why they do not go together."""

from __future__ import annotations

from typing import NamedTuple

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.diffusion.tokens.conditions import lacks
from sedd_graph.diffusion.tokens.process import Kernel, Objective, Schedule
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.families.plan import FED, ProcessPlan
from sedd_graph.graph.model import Graph

__all__ = ["Process", "hold_inputs", "make_process"]


class Process(NamedTuple):
    """The four components of a noise process, and a classifier of noised rows where samples are drawn towards a label."""

    kernel: Kernel
    schedule: Schedule
    objective: Objective
    sampler: Sampler
    classifier: NoisyClassifier | None = None


def make_process(plan: ProcessPlan, registry: Registry, *, states: int | None = None) -> Process:
    """Build the process, for the declared number of states or (for a proof) another. Raises :class:`BlueprintError`."""
    context = Context({"n": states or plan.states})
    noise = registry.component(plan.kernel.contract.op)
    kernel = noise(plan.kernel.config if states is None else noise.toy(plan.kernel.config, states), context)
    goal = registry.component(plan.objective.contract.op)
    objective = goal(plan.objective.config if states is None else goal.toy(plan.objective.config), context)
    schedule, sampler = (registry.component(p.contract.op)(p.config, context) for p in (plan.schedule, plan.sampler))
    # a proof is of the sampler without it
    classifier = _classifier(plan, registry, context) if states is None else None
    process = Process(kernel, schedule, objective, sampler, classifier)
    problems = [
        Problem(
            "blueprint",
            0,
            0,
            key,
            f"{part.contract.name!r} cannot work with the output {plan.output!r}; it reads {' or '.join(reads)}",
        )
        for key, part, reads in (
            ("objective", plan.objective, objective.reads),
            ("sample", plan.sampler, sampler.reads),
        )
        if plan.output not in reads
    ]
    problems += [
        Problem("blueprint", 0, 0, key, f"{part.contract.name!r} needs {lack}, not {plan.kernel.contract.name!r}")
        for key, part, lack in (
            ("objective", plan.objective, objective.lacks(kernel)),
            ("sample", plan.sampler, sampler.lacks(kernel)),
            ("sample", plan.sampler, lacks(sampler.config, kernel)),
        )
        if lack is not None
    ]
    if schedule.learned and not objective.steady:
        message = (
            f"{plan.schedule.contract.name!r} learns from losses that are integrals over time, such as nelbo's and "
            f"score_entropy's; {plan.objective.contract.name!r} is none: take another schedule, such as loglinear"
        )
        problems.append(Problem("blueprint", 0, 0, "process.schedule", message))
    if classifier is not None and plan.classifier is not None and (lack := _hinders(process)) is not None:
        message = f"{plan.classifier.contract.name!r} needs {lack}"
        problems.append(Problem("blueprint", 0, 0, "sample.classifier", message))
    if problems:
        raise BlueprintError(problems)
    return process


def _classifier(plan: ProcessPlan, registry: Registry, context: Context) -> NoisyClassifier | None:
    """The declared classifier, which knows the declared label. Raises :class:`BlueprintError`."""
    if plan.classifier is None:
        return None
    try:
        made: NoisyClassifier = registry.component(plan.classifier.contract.op)(plan.classifier.config, context)
    except UserError as error:  # a file that cannot be read, or is of another model
        raise BlueprintError([Problem("blueprint", 0, 0, "sample.classifier", str(error))]) from None
    label = plan.classifier.config.label  # type: ignore[attr-defined]
    if label >= made.labels:
        message = f"there is no label {label}: this classifier has {made.labels}, from 0 to {made.labels - 1}"
        raise BlueprintError([Problem("blueprint", 0, 0, "sample.classifier.label", message)])
    return made


def _hinders(process: Process) -> str | None:
    """What guidance by the process's classifier needs and does not have here."""
    kernel, objective, sampler, classifier = process.kernel, process.objective, process.sampler, process.classifier
    assert classifier is not None
    if objective.block is not None:
        return "text that is drawn as a whole, not in blocks"
    if (kernel.mask is None or not kernel.clamp_safe) and "log_score" not in sampler.reads:
        return "a sampler that reads log_score, such as analytic: where seen tokens move, it gives factors for scores"
    return classifier.lacks(kernel)


def hold_inputs(process: Process, graph: Graph) -> None:
    """What a graph is fed must be what its objective is about. Raises :class:`BlueprintError`."""
    names, block = graph.root.inputs, process.objective.block
    problems = []

    def refuse(key: str, message: str) -> None:
        problems.append(Problem("blueprint", 0, 0, key, message))

    for name in ("clean", "places", "sees"):
        if block is None and name in names:
            refuse(f"inputs.{name}", f"{name!r} is for an objective of blocks, such as block_nelbo")
        elif block is not None and name not in names and name != "places":
            refuse("objective", f"an objective of blocks needs a graph with the input {name!r}: {FED[name]}")
    for name in ("t", "attend"):
        if block is not None and name in names:
            refuse(
                f"inputs.{name}",
                f"an objective of blocks feeds no {name!r}: it is not the same for all blocks of a row",
            )
    if problems:
        raise BlueprintError(problems)
