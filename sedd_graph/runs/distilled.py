"""The engine of a run that is distilled from another: its network is trained against a teacher."""

from __future__ import annotations

from sedd_graph.engine.engine import Engine
from sedd_graph.errors import UserError
from sedd_graph.runs.check import Report
from sedd_graph.training.distilling import Distiller

__all__ = ["distiller"]


def distiller(engine: Engine, report: Report) -> Distiller:
    """Return an engine that is trained by the distillation objective of a blueprint; its network is its first teacher.

    Args:
        engine: The student, with the weights of the teacher, not compiled.
        report: Result of checking the blueprint of the student.

    Raises:
        UserError: The blueprint declares no distillation objective, or shards the model.
    """
    part = report.distillation
    if part is None:
        raise UserError("the blueprint has no section 'distill', such as distill: {op: consistency}")
    if report.train.parallel.shard != 1:
        raise UserError(
            "train.parallel.shard: distillation holds student and teacher whole in each process: leave it at 1"
        )
    objective = report.registry.component(part.contract.op)(part.config)
    return Distiller(engine, objective, engine.process.distillable())
