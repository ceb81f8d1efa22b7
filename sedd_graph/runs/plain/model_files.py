"""The Python files of an exported model, as the transformers library loads them with ``trust_remote_code``.

``configuration_*.py`` has the config class; ``modeling_*.py`` the network, one class per block; ``generation_*.py`` the
noise process and its samplers, if the model generates token rows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sedd_graph.component.base import Component
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs, hold_prompt
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.walk import T_MIN
from sedd_graph.engine.regions import Model
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import listed
from sedd_graph.graph.model import Graph
from sedd_graph.runs.plain import templates
from sedd_graph.runs.plain.class_source import ClassSource, other_classes
from sedd_graph.runs.plain.names import Names, NotExportable
from sedd_graph.runs.plain.network_source import NetworkSource, camel, state_names
from sedd_graph.runs.plain.process_source import ProcessSource

__all__ = ["ModelFiles", "exported_names", "write_model"]

TAKEN = frozenset(
    [
        "config",
        "device",
        "dtype",
        "generate",
        "generation_config",
        "forward",
        "network",
        "loss",
        "framework",
        "main_input_name",
        "base_model",
        "name_or_path",
        "post_init",
        "init_weights",
        "can_generate",
        "train",
        "eval",
        "process",
    ]
)
"""Names of attributes of the library's models, and of ours, which no node may have."""


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The exported code of a model.

    Attributes:
        files: Text of the Python files by name.
        auto_map: Class of each of the library's ``Auto`` classes.
        architecture: Name of the main class.
        model_type: Name of the model's kind in the library.
        tensors: Tables of kernel and schedule.
        samplers: Names of the exported samplers.
        left_out: Reason why a sampler or a condition on text is not exported, by its name.
        state: Exported path of each node by its path in the graph.
    """

    files: dict[str, str]
    auto_map: dict[str, str]
    architecture: str
    model_type: str
    tensors: Mapping[str, Any]
    samplers: tuple[str, ...]
    left_out: Mapping[str, str]
    state: Mapping[str, str]


def write_model(
    graph: Graph, model: Model, parts: TokenParts, *, samplers: Mapping[str, Any], name: str, description: str
) -> ModelFiles:
    """Write the code of a model of token rows.

    Args:
        graph: The typed graph.
        model: Its module.
        parts: Kernel, schedule, objective and sampler.
        samplers: The samplers to export by name, the default one first.
        name: Name of the blueprint.
        description: What the model is, in one sentence.

    Raises:
        NotExportable: Nodes, the kernel or the schedule cannot be exported; the message lists every reason.
    """
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "model"
    slug = slug if not slug[0].isdigit() else f"model_{slug}"
    names, other = Names(), Names()
    network = NetworkSource(graph, dict(_components(model)), names, TAKEN)
    made, run, returned = network.root()
    process = _process(parts, samplers, other, [*_unsuitable(graph, parts), *network.problems])
    block, masks, output = parts.objective.block, parts.kernel.mask is not None, next(iter(graph.root.outputs))
    scope = ClassSource(object, names, what="the model")
    for function in (mix_seed, *((block_inputs, hold_prompt) if block is not None else ())):
        names.function(function, scope)
    low, high = parts.schedule.sigma(torch.tensor([T_MIN, 1.0], dtype=torch.float64)).tolist()
    architecture = f"{camel(name)}ForMaskedLM" if output == "log_x0" and masks else f"{camel(name)}Model"
    own = tuple(k for k in process.makes if k not in ("kernel", "schedule"))
    values: dict[str, Any] = {
        "name": _safe(name),
        "description": _safe(description),
        "slug": slug,
        "camel": camel(name),
        "architecture": architecture,
        "inputs": tuple(graph.root.inputs),
        "output": output,
        "block": block,
        "masks": masks,
        "states": parts.kernel.states,
        "mask": parts.kernel.mask,
        "low": low,
        "high": high,
        "made": made,
        "run": [*run, f"return {returned[0]}"],
        "default": own[0],
        "spread": tuple(k for k in own if samplers[k].config.spread),
        "steps": parts.sampler.steps,
    }
    classes = [*other_classes(names).values(), *network.classes.values()]
    files = {
        f"configuration_{slug}.py": templates.configuration(values),
        f"modeling_{slug}.py": templates.modeling(values, _top(names), classes),
        f"generation_{slug}.py": templates.generation(values, _top(other), [*process.classes.values()], process.makes),
    }
    auto = {"AutoConfig": f"configuration_{slug}.{camel(name)}Config", "AutoModel": f"modeling_{slug}.{architecture}"}
    if masks:
        auto["AutoModelForMaskedLM"] = f"modeling_{slug}.{camel(name)}ForMaskedLM"
    left = process.left_out
    return ModelFiles(files, auto, architecture, slug, process.tensors, own, left, exported_names(graph))


def _unsuitable(graph: Graph, parts: TokenParts) -> list[str]:
    """Return why a process cannot be exported whatever its code: outputs or states that exported models do not have."""
    problems = []
    if len(graph.root.outputs) != 1 or type(parts.kernel).translate is not Kernel.translate:
        problems.append(f"the outputs {listed(graph.root.outputs)} cannot be exported: give log_x0 or log_score alone")
    if parts.kernel.extra_states:
        problems.append(f"kernel {type(parts.kernel).__name__} cannot be exported: it has states without an output")
    return problems


def _process(parts: TokenParts, samplers: Mapping[str, Any], names: Names, problems: list[str]) -> ProcessSource:
    """Return the source of the process. Raises :class:`NotExportable` with all reasons, those of ``problems`` included."""
    try:
        process = ProcessSource(parts.kernel, parts.schedule, samplers, names)
    except NotExportable as error:
        raise NotExportable("\n".join([*problems, str(error)])) from None
    if not process.makes.keys() - {"kernel", "schedule"}:
        problems = [*problems, *process.left_out.values()]
    if problems:
        raise NotExportable("\n".join(problems))
    return process


def exported_names(graph: Graph) -> dict[str, str]:
    """Return the path of each node in exported code by its path in the graph."""
    return state_names(graph.root, TAKEN)


def _components(model: Any, prefix: str = "") -> list[tuple[str, Component]]:
    """Return all components of a network with their paths."""
    found: list[tuple[str, Component]] = []
    for name, child in model._modules.items():
        if isinstance(child, Component):
            found.append((f"{prefix}{name}", child))
        else:
            found += _components(child, f"{prefix}{name}.")
    return found


def _top(names: Names) -> tuple[Sequence[str], str]:
    """Return the imports of a file, and the text of its constants and functions."""
    parts = ["\n".join(names.constants.values())] if names.constants else []
    return sorted(names.imports), "\n\n\n".join([*parts, *names.functions.values()])


def _safe(text: str) -> str:
    """Return text of a blueprint as one line that cannot end the docstring in which it stands."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(kept.replace("\\", "/").replace('"', "'").split())[:400]
