"""Source of a network as classes of plain torch code: one class per block, and one per kind of component.

The edges of a block become the body of its ``forward``. A node becomes an attribute of its name, so that the state dict
has the keys of the graph; a name that torch's modules use themselves gets an underscore at its end.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping, Sequence

from torch import nn

from sedd_graph.component.base import Component
from sedd_graph.errors import listed
from sedd_graph.graph.model import Graph, Op, Ref, Region, Step
from sedd_graph.runs.plain.class_source import class_text
from sedd_graph.runs.plain.component_source import ComponentSource
from sedd_graph.runs.plain.names import Names, NotExportable

__all__ = ["NetworkSource", "attribute_name", "camel", "number_text", "state_names"]


def camel(text: str) -> str:
    """Return a class name for the name of a blueprint, block or node: ``MdlmTiny`` for ``mdlm-tiny``."""
    made = "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", text))
    return made if made and not made[0].isdigit() else f"Model{made}"


def attribute_name(name: str, taken: frozenset[str] = frozenset()) -> str:
    """Return the attribute by which exported code calls a node: its name, with an underscore where that is in use.

    Raises:
        NotExportable: The name is no identifier of Python.
    """
    _require_identifier(name)
    busy = hasattr(nn.Module, name) or name in taken or keyword.iskeyword(name) or name in ("training", "config")
    return f"{name}_" if busy else name


def state_names(region: Region, taken: frozenset[str], prefix: str = "", exported: str = "") -> dict[str, str]:
    """Return the exported path of each node by its path in the graph.

    Args:
        region: A region of the graph.
        taken: Names that no node of the region may have.
        prefix: Path of the region in the graph, with a dot at its end, or empty.
        exported: Path of the region in the exported module.
    """
    found: dict[str, str] = {}
    for step in region.steps:
        own = step.name if region.repeat else attribute_name(step.name, taken)
        if isinstance(step.body, Region):
            found |= state_names(step.body, frozenset(), f"{prefix}{step.name}.", f"{exported}{own}.")
        else:
            found[f"{prefix}{step.name}"] = f"{exported}{own}"
    return found


class NetworkSource:
    """The classes of a network.

    Args:
        graph: The typed graph.
        components: The component at each path of the graph.
        names: Collects what the classes read at the top of their file.
        taken: Names that no node at the top of the graph may have as an attribute.

    Attributes:
        classes: Source of the classes by name, each after those that it uses.
        problems: Reasons why nodes cannot be exported.
    """

    def __init__(self, graph: Graph, components: Mapping[str, Component], names: Names, taken: frozenset[str]) -> None:
        self.graph, self.components, self.names, self.taken = graph, components, names, taken
        self.classes: dict[str, str] = {}
        self.problems: list[str] = []
        self._regions: dict[int, str] = {}

    def root(self) -> tuple[list[str], list[str], list[str]]:
        """Return the statements of the network's constructor and of its forward pass, and the names of its outputs."""
        return self._region(self.graph.root, "", self.taken)

    def _class(self, wanted: str, source: str, text: str) -> str:
        """Add a class, and return its name: ``wanted``, or with a number where another class has that name."""
        number, name = 1, wanted
        while name in self.classes and self.classes[name] != text.replace(source, name, 1):
            number += 1
            name = f"{wanted}{number}"
        self.classes.setdefault(name, text.replace(source, name, 1))
        return name

    def _component(self, op: Op, step: Step, path: str) -> str:
        """Add the class of a component, and return the expression that constructs it."""
        component = self.components[path]
        optional = [p.name for p in op.signature.inputs if not step.inputs.get(p.name) and not p.variadic]
        kind = type(component).__name__
        given = [p.name for p in op.signature.inputs if step.inputs.get(p.name) and not p.variadic]
        what = f"{path} ({op.contract.name})"
        try:
            source = ComponentSource(component, self.names, what=what, dropped=optional, given=given)
            source.add("__init__", "forward") if "__init__" in _own(component) else source.add("forward")
            name = self._class(kind, kind, source.class_source(kind, "nn.Module"))
        except NotExportable as error:
            self.problems.append(str(error))
            return "None"
        arguments = ", ".join(f"{key}={number_text(value)}" for key, value in source.numbers.items())
        return f"{name}({arguments})"

    def _block(self, region: Region, prefix: str) -> str:
        """Add the class of a block, and return its name."""
        if id(region) in self._regions:
            return self._regions[id(region)]
        made, run, returned = self._region(region, prefix, frozenset())
        init = "\n    ".join(["def __init__(self):", "super().__init__()", *made])
        forward = "\n    ".join(
            [f"def forward(self, {', '.join(map(_variable, region.inputs))}):", *run, f"return {', '.join(returned)}"]
        )
        if len(returned) == 1 and run[-1].startswith(f"{returned[0]} = self."):
            forward = "\n    ".join([*forward.splitlines()[:-2], f"return {run[-1].partition(' = ')[2]}"]).replace(
                "\n        ", "\n    "
            )
        wanted = camel(region.label)
        doc = region.description or f"Block {region.label!r}."
        name = self._class(wanted, wanted, class_text(wanted, "nn.Module", doc, [init, forward]))
        self._regions[id(region)] = name
        return name

    def _region(self, region: Region, prefix: str, taken: frozenset[str]) -> tuple[list[str], list[str], list[str]]:
        values: dict[Ref, str] = {Ref("", name): _variable(name) for name in region.inputs}
        variables = set(values.values())
        made, run = [], []
        used = {ref for step in region.steps for refs in step.inputs.values() for ref in refs}
        used |= set(region.outputs.values())
        for step in region.steps:
            path, attribute = f"{prefix}{step.name}", attribute_name(step.name, taken)
            if step.running.exact:
                self.problems.append(f"{path} cannot be exported: 'arithmetic: exact' rounds values to a grid")
            if isinstance(step.body, Region):
                ports, outputs = list(step.body.inputs), list(step.body.outputs)
            else:
                ports = [p.name for p in step.body.signature.inputs if step.inputs.get(p.name)]
                outputs = [p.name for p in step.body.signature.outputs]
            results = []
            for port in outputs:
                ref = Ref(step.name, port)
                single = sum(Ref(step.name, p) in used for p in outputs) < 2
                name = _variable(step.name if single else f"{step.name}_{port}")
                while name in variables:
                    name += "_"
                variables.add(name)
                values[ref] = name
                results.append(name if ref in used else "_")
            arguments = [values[ref] for port in ports for ref in step.inputs[port]]
            if isinstance(step.body, Region) and step.body.repeat:
                block = self._block(step.body.steps[0].body, f"{path}.0.")  # type: ignore[arg-type]  # a repeat is a region
                made.append(f"self.{attribute} = nn.ModuleList({block}() for _ in range({step.body.repeat}))")
                run += _loop(step.body, attribute, arguments, results)
                continue
            if isinstance(step.body, Region):
                made.append(f"self.{attribute} = {self._block(step.body, path + '.')}()")
            else:
                made.append(f"self.{attribute} = {self._component(step.body, step, path)}")
            skipped = _skips(step, ports)
            call = ", ".join(
                a if not skipped else f"{p}={a}" for p, a in zip(_repeated(step, ports), arguments, strict=True)
            )
            run.append(f"{', '.join(results)} = self.{attribute}({call})")
        return made, run, [values[ref] for ref in region.outputs.values()]


def _own(component: Component) -> set[str]:
    """Return the names that the classes of a component define, without those of its base class."""
    found: set[str] = set()
    for owner in type(component).__mro__:
        if owner is Component:
            return found
        found |= set(owner.__dict__)
    raise TypeError(listed(found))


def _repeated(step: Step, ports: Sequence[str]) -> list[str]:
    return [port for port in ports for _ in step.inputs[port]]


def _skips(step: Step, ports: Sequence[str]) -> bool:
    """Return True if arguments are passed by name, since an optional port before one of them is not connected."""
    if isinstance(step.body, Region):
        return False
    inputs = step.body.signature.inputs
    last = max((i for i, p in enumerate(inputs) if p.name in ports), default=-1)
    return any(p.name not in ports for p in inputs[:last]) and not any(p.variadic for p in inputs)


def _variable(name: str) -> str:
    """Return a name of a variable for an input or a node. Raises :class:`NotExportable` if it is no identifier."""
    _require_identifier(name)
    return f"{name}_" if keyword.iskeyword(name) or name in ("self", "torch", "nn") else name


def _require_identifier(name: str) -> None:
    """Raise :class:`NotExportable` unless ``name``, which comes from a blueprint, is an identifier of Python."""
    if not name.isidentifier() or not name.isascii():
        raise NotExportable(
            f"{name!r} cannot be exported: it is no identifier of Python, as names of nodes and inputs must be"
        )


def number_text(value: float) -> str:
    """Return a number as it is written in Python."""
    return repr(value) if math.isfinite(value) else f"float({str(value)!r})"


def _loop(region: Region, attribute: str, arguments: Sequence[str], results: Sequence[str]) -> list[str]:
    """Return the statements that apply the repeats of a block one after another."""
    carried = dict(zip(region.outputs, results, strict=True))
    starts = dict(zip(region.inputs, arguments, strict=True))
    carried = {port: name if name != "_" else f"_{port}" for port, name in carried.items()}
    first = [f"{', '.join(carried.values())} = {', '.join(starts[port] for port in carried)}"]
    call = ", ".join(carried.get(port, value) for port, value in starts.items())
    return [*first, f"for layer in self.{attribute}:", f"    {', '.join(carried.values())} = layer({call})"]
