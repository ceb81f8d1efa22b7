"""Plans of processes made by hand."""

from functools import partial
from typing import Any

from sedd_graph.component.outputs import LOG_SCORE, LOG_X0
from sedd_graph.component.registry import Registry, discover
from sedd_graph.families import tokens
from sedd_graph.families.plan import Part, ProcessPlan

OUTPUTS = {"log_score": LOG_SCORE, "log_x0": LOG_X0}


def token_plan(kernel: Part, schedule: Part, objective: Part, sampler: Part, states: int, output: str) -> ProcessPlan:
    """Rows of tokens, with one of the standard outputs."""
    return ProcessPlan("tokens", kernel, schedule, objective, sampler, states, (OUTPUTS[output],))


def string_plan(
    kernel: Part, schedule: Part, objective: Part, sampler: Part, states: int, registry: Registry | None = None
) -> ProcessPlan:
    """Strings, with all outputs that the kernel reads."""
    cls = (registry or discover()).component(kernel.contract.op)
    return ProcessPlan("strings", kernel, schedule, objective, sampler, states, cls.parametrizations(kernel.config)[0])


def maker(plan: ProcessPlan, registry: Registry) -> Any:
    """The factory that proofs of rows of tokens call."""
    return partial(tokens.make_parts, plan, registry)
