"""Schema of a blueprint as frozen pydantic models: the keys that may be written, before names are resolved.

The Configs of components (``with:``) and the sections ``data``, ``train`` and ``store`` are validated by models of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from sedd_graph.component.strict import Strict

__all__ = ["Block", "Blueprint", "ConfigKeys", "Invertible", "Library", "Node", "OpSpec", "SaveSpec", "Scalar"]

MAX_NAME = 64
"""Largest number of characters in a name."""

Name = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=MAX_NAME)]
Title = Annotated[str, pydantic.Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=MAX_NAME)]
Ref = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?$", max_length=130)]
OpName = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*(\.v[1-9][0-9]{0,3})?$", max_length=80)]
TypeText = Annotated[str, pydantic.Field(max_length=256)]
Scalar = bool | int | float | str
"""Value of a parameter."""
ConfigKeys = Mapping[str, Any]
"""Keys of a component's Config as written in the blueprint, not validated yet."""


class Frozen(Strict):
    """Base class of the pydantic models of a blueprint. Fields may be given by name or alias; errors do not quote the input."""

    model_config = pydantic.ConfigDict(populate_by_name=True, hide_input_in_errors=True)


class SaveSpec(Frozen):
    """Saved activations: outputs of a node that training writes to ``activations.zarr``."""

    ports: Annotated[list[Name], pydantic.Field(min_length=1, max_length=16)]
    """Output ports of the node."""
    every: Annotated[int, pydantic.Field(ge=1, le=10**9)] = 100
    """Training steps from one record to the next."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format on disk."""
    rows: Annotated[int, pydantic.Field(ge=1, le=65536)] | None = None
    """Number of rows of the batch that are saved; all if null."""
    chunk: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1
    """Records per chunk of the array."""


class Node(Frozen):
    """One node of a graph: exactly one of ``op`` (a registered component) or ``block``."""

    op: OpName | None = None
    """Name of a component: ``attention`` (its highest version) or ``attention.v1``."""
    block: Ref | None = None
    """Name of a block: ``layer``, or ``alias.layer`` for a block of an included file."""
    in_: Ref | list[Ref] | dict[Name, Ref | list[Ref]] | None = pydantic.Field(default=None, alias="in")
    """Values that feed the inputs: one, a list in the order of the ports, or a mapping by port. A value is an input of the
    graph or block, ``node``, or ``node.port``."""
    out: TypeText | dict[Name, TypeText] | None = None
    """Declared type of the first output, or of outputs by port, such as ``float b l d``."""
    with_: dict[Name, Any] = pydantic.Field(default_factory=dict, alias="with")
    """Config keys of the component, or parameters of the block."""
    repeat: int | Annotated[str, pydantic.Field(max_length=256)] | None = None
    """Of a block: how many times it is applied in sequence, each time with weights of its own."""
    memory: Literal["auto", "store", "checkpoint", "reversible"] | None = None
    """Of a block: what is saved for the backward pass. ``store``: all activations. ``checkpoint``: the inputs of each repeat.
    ``reversible``: the outputs alone, from which an invertible block's inputs are reconstructed. ``auto`` (the default):
    ``reversible`` for an invertible block, else ``store``."""
    arithmetic: Literal["float", "exact"] | None = None
    """Of an invertible block: ``exact`` rounds its streams to a grid, so that reconstruction is exact to the last bit."""
    save: SaveSpec | None = None
    """Outputs that training writes to disk."""

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> Node:
        if (self.op is None) == (self.block is None):
            raise ValueError("give exactly one of 'op' and 'block'")
        if self.op is not None and self.repeat is not None:
            raise ValueError("'repeat' is for blocks: put the op into a block of its own")
        if self.op is not None and (self.memory or self.arithmetic):
            raise ValueError("'memory' and 'arithmetic' are for blocks: put the op into a block of its own")
        return self


class Invertible(Frozen):
    """A block's claim that its inputs can be reconstructed from its outputs. Checking derives the inverse, or says why there is none."""

    given: Annotated[list[Name], pydantic.Field(max_length=64)] = pydantic.Field(default_factory=list)
    """Inputs that the inverse receives too, such as conditioning."""
    level: Literal["injective", "bijective", "volume_preserving"] = "injective"
    """The strongest property that is claimed: ``volume_preserving`` is a bijection with ``|det| = 1``."""
    on_failure: Literal["error", "checkpoint"] = "error"
    """Action of ``build`` if the derived inverse is too inaccurate numerically: refuse, or warn and checkpoint the block."""


class Block(Frozen):
    """A subgraph with typed inputs and outputs that nodes can use. Its axis names are bound by the values that feed it."""

    description: str = ""
    """Text for readers and drawings."""
    params: dict[Name, Scalar | None] = pydantic.Field(default_factory=dict)
    """Parameters with their defaults. One whose default is null must be given by the node that uses the block."""
    inputs: Annotated[dict[Name, TypeText], pydantic.Field(min_length=1, max_length=64)]
    """Types of the inputs."""
    outputs: Annotated[dict[Name, Ref], pydantic.Field(min_length=1, max_length=64)]
    """The value that each output returns: ``node``, ``node.port`` or an input."""
    nodes: Annotated[dict[Name, Node], pydantic.Field(min_length=1, max_length=4096)]
    """The nodes, in any order."""
    invertible: bool | Invertible | None = None
    """Claim that the block is invertible; ``true`` is the claim with its defaults."""


class OpSpec(pydantic.BaseModel):
    """A component of the noise process, written inline: ``op`` and its Config keys side by side."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)
    op: OpName
    """Name of the component."""

    @property
    def config(self) -> ConfigKeys:
        """The Config keys."""
        return dict(self.__pydantic_extra__ or {})


class ProcessSpec(OpSpec):
    """The noise process: a kernel, its Config keys, and its noise schedule."""

    schedule: OpSpec
    """The noise schedule."""


class SampleSpec(OpSpec):
    """The sampler, its Config keys, and optionally a classifier."""

    classifier: OpSpec | None = None
    """Classifier that guides sampling towards a label."""


class Library(Frozen):
    """A file that only holds blocks for other files to use."""

    blueprint: Literal[1]
    """Version of the format."""
    description: str = ""
    """Text for readers."""
    use: Annotated[dict[Name, Annotated[str, pydantic.Field(max_length=1024)]], pydantic.Field(max_length=64)] = (
        pydantic.Field(default_factory=dict)
    )
    """Included files by alias: paths relative to this file, or ``sedd_graph:blocks/dit.yaml`` from the package."""
    blocks: Annotated[dict[Name, Block], pydantic.Field(max_length=1024)] = pydantic.Field(default_factory=dict)
    """Blocks by name."""


class Blueprint(Library):
    """A whole model: its graph, its noise process, and how it is trained, sampled and stored."""

    name: Title
    """Name of the model."""
    params: dict[Name, Scalar] = pydantic.Field(default_factory=dict)
    """Parameters, inserted as ``${params.NAME}``."""
    axes: Annotated[dict[Name, int | TypeText], pydantic.Field(max_length=64)] = pydantic.Field(default_factory=dict)
    """Axis names and their sizes: integers, ``batch``, ``length``, or expressions such as ``4*d``."""
    inputs: Annotated[dict[Name, TypeText], pydantic.Field(min_length=1, max_length=64)]
    """Types of the graph's inputs, which the engine feeds."""
    outputs: Annotated[dict[Name, Ref], pydantic.Field(min_length=1, max_length=64)]
    """The value that each output of the graph returns."""
    nodes: Annotated[dict[Name, Node], pydantic.Field(min_length=1, max_length=4096)]
    """The nodes of the graph, in any order."""
    process: ProcessSpec | None = None
    """Noise process."""
    objective: OpSpec | None = None
    """Training objective."""
    sample: SampleSpec | None = None
    """Sampler."""
    data: dict[Name, Any] | None = None
    """Corpus, tokenizer and rows, or points."""
    train: dict[Name, Any] | None = None
    """Training loop."""
    store: dict[Name, Any] | None = None
    """Writing of arrays: samples and saved activations."""
