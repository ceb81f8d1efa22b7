"""Construction of the components of a process on vectors, and the reasons why some do not fit each other."""

from __future__ import annotations

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.vectors.classifier import VectorClassifier
from sedd_graph.diffusion.vectors.objective import VectorObjective
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.diffusion.vectors.reversible import ReversibleSampler
from sedd_graph.diffusion.vectors.sampler import VectorSampler
from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.text import make_components, problem

__all__ = ["make_parts"]


def make_parts(plan: ProcessPlan, registry: Registry, states: int | None = None) -> VectorParts:
    """Construct the components of a process on vectors.

    Args:
        plan: Validated description of the process.
        registry: The installed components.
        states: Number of tokens of a small example for verification, for which no classifier is constructed; None for
            the number that the blueprint declares.

    Returns:
        The components, on the CPU.

    Raises:
        BlueprintError: The components are incompatible. The error lists every reason.
    """
    kernel, schedule, objective, sampler = made = make_components(plan, registry, states=states)
    problems = [
        problem(key, f"{part.name!r} cannot work with the output {plan.output!r}; it reads {' or '.join(reads)}")
        for key, part, reads in (
            ("objective", plan.objective, objective.reads),
            ("sample", plan.sampler, sampler.reads),
        )
        if plan.output not in reads
    ]
    problems += [
        problem(key, f"{part.name!r} needs {lack}")
        for key, part, lack in (
            ("objective", plan.objective, objective.lacks(kernel, schedule)),
            ("sample", plan.sampler, sampler.lacks(kernel, schedule)),
        )
        if lack is not None
    ]
    if kernel.contextual:
        problems += _unfit(plan, objective, sampler)
    if problems:
        raise BlueprintError(problems)
    return VectorParts(*made, None if states else _make_classifier(plan, registry))


def _unfit(plan: ProcessPlan, objective: VectorObjective, sampler: VectorSampler) -> list[Problem]:
    """Return why components do not fit a kernel whose vectors depend on the whole row.

    Args:
        plan: Validated description of the process.
        objective: The objective, which must train the network to read tokens from vectors.
        sampler: The sampler, which must not need embeddings of single tokens.
    """
    name, found = plan.kernel.name, []
    if objective.decoding is None:
        what = f"{plan.objective.name!r} does not train the network to read tokens from vectors, which {name!r} needs; 'elf' does"
        found.append(problem("objective", what))
    table = f"the vectors of {name!r} depend on the whole row: there is no table of embeddings"
    if sampler.config.clamp:
        found.append(problem("sample.clamp", f"{table} that an estimate could be clamped to; take clamp: false"))
    if isinstance(sampler, ReversibleSampler):
        found.append(problem("sample", f"{table}, which {plan.sampler.name!r} walks from; take another sampler"))
    if plan.classifier is not None:
        found.append(problem("sample.classifier", f"{table} for a classifier to read; leave it out"))
    return found


def _make_classifier(plan: ProcessPlan, registry: Registry) -> VectorClassifier | None:
    """Construct the classifier, if one is declared. Raises :class:`BlueprintError` for a bad file or label."""
    if plan.classifier is None:
        return None
    try:
        context = Context({"n": plan.states})
        made: VectorClassifier = registry.component(plan.classifier.contract.op)(plan.classifier.config, context)
    except UserError as error:
        raise BlueprintError([problem("sample.classifier", str(error))]) from None
    if made.config.label >= made.labels:
        message = (
            f"there is no label {made.config.label}: this classifier has {made.labels}, from 0 to {made.labels - 1}"
        )
        raise BlueprintError([problem("sample.classifier.label", message)])
    return made
