"""Schema of a blueprint as frozen pydantic models, which validate its keys and the types of their values.

The names of components, blocks and nodes to which the blueprint refers are looked up afterwards. The Configs of
components (``with:``) and the sections ``data``, ``train`` and ``store`` have models of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from sedd_graph.component.strict import Strict

__all__ = ["Block", "Blueprint", "ConfigKeys", "Invertible", "Library", "Node", "OpSpec", "SaveSpec", "Scalar"]

MAX_NAME = 64
"""Maximum length of a name, in characters."""

Name = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=MAX_NAME)]
Title = Annotated[str, pydantic.Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=MAX_NAME)]
Ref = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)?$", max_length=130)]
OpName = Annotated[str, pydantic.Field(pattern=r"^[a-z][a-z0-9_]*(\.v[1-9][0-9]{0,3})?$", max_length=80)]
TypeText = Annotated[str, pydantic.Field(max_length=256)]
Scalar = bool | int | float | str
"""Type of a parameter's value."""
ConfigKeys = Mapping[str, Any]
"""Config keys of a component as written in the blueprint, before validation."""


class Frozen(Strict):
    """Base class of the blueprint models: immutable pydantic models whose error messages omit the invalid value.

    A field with an alias, such as ``in_`` with ``in``, can be given by either name.
    """

    model_config = pydantic.ConfigDict(populate_by_name=True, hide_input_in_errors=True)


class SaveSpec(Frozen):
    """Settings for saving activations: the outputs of a node that training writes to ``activations.zarr``."""

    ports: Annotated[list[Name], pydantic.Field(min_length=1, max_length=16)]
    """Names of the output ports to save."""
    every: Annotated[int, pydantic.Field(ge=1, le=10**9)] = 100
    """Interval of saving, in training steps (default 100): a step is saved if its number is divisible by it."""
    dtype: Literal["float32", "float16"] = "float32"
    """Floating-point type on disk."""
    rows: Annotated[int, pydantic.Field(ge=1, le=65536)] | None = None
    """Number of batch rows to save, counted from the first row; all rows if null (default). With gradient accumulation
    or several processes, the rows are those of the step's last micro-batch on process 0."""
    chunk: Annotated[int, pydantic.Field(ge=1, le=4096)] = 1
    """Number of saved training steps per chunk of the zarr array (default 1)."""


class Node(Frozen):
    """A node of a graph, which applies either a registered component (``op``) or a block (``block``)."""

    op: OpName | None = None
    """Name of the component: ``attention`` (its highest version) or ``attention.v1``."""
    block: Ref | None = None
    """Name of the block: ``layer``, or ``alias.layer`` for a block of an included file."""
    in_: Ref | list[Ref] | dict[Name, Ref | list[Ref]] | None = pydantic.Field(default=None, alias="in")
    """Sources of the node's inputs: one reference, a list in the order of the input ports, or a mapping by port name. A
    reference is the name of an input of the enclosing graph or block; or another node's output, as ``node.port``, or
    only ``node`` for its output ``out`` or its single output."""
    out: TypeText | dict[Name, TypeText] | None = None
    """Type of the first output, such as ``float b l d``, or a mapping of types by output port. Optional: types are
    inferred, and a type given here is compared with the inferred one. It is required only where a component's inputs
    and Config do not determine the size of an output axis."""
    with_: dict[Name, Any] = pydantic.Field(default_factory=dict, alias="with")
    """Config keys of the component, or parameters of the block."""
    repeat: int | Annotated[str, pydantic.Field(max_length=256)] | None = None
    """Number of times that the block is applied in sequence, each time with its own weights. Only for blocks."""
    memory: Literal["auto", "store", "checkpoint", "reversible"] | None = None
    """Memory mode of the block in training. ``store``: save all activations for backward. ``checkpoint``: save the
    inputs of each repeat and recompute the rest. ``reversible``: save only the outputs and reconstruct the inputs by
    the inverse. ``auto`` (default): ``reversible`` for an invertible block, else ``store``. Only for blocks."""
    arithmetic: Literal["float", "exact"] | None = None
    """Arithmetic of an invertible block: ``float`` (default), or ``exact``, which rounds the terms of additions and
    subtractions to multiples of a fixed power of two, so that inputs are reconstructed bit for bit."""
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
    """A block's claim to be invertible. Checking a blueprint derives the inverse, or reports why there is none."""

    given: Annotated[list[Name], pydantic.Field(max_length=64)] = pydantic.Field(default_factory=list)
    """Inputs that are also passed to the inverse and need not be reconstructed, such as conditioning."""
    level: Literal["injective", "bijective", "volume_preserving"] = "injective"
    """Property claimed, which is verified. ``injective`` (default): the inputs can be reconstructed from the outputs.
    ``bijective``: in addition, every value of the outputs has an inverse image. ``volume_preserving``: in addition,
    the Jacobian determinant is 1 or -1."""
    on_failure: Literal["error", "checkpoint"] = "error"
    """Action of ``build`` if the derived inverse is numerically too inaccurate: raise an error (``error``), or warn and
    use activation checkpointing for the block (``checkpoint``)."""


class Block(Frozen):
    """A reusable subgraph with typed inputs and outputs.

    An axis name in the type of an input, such as d in ``float b l d``, stands for the size of that axis in the tensor
    that is passed to the block, which may differ from one use of the block to another.
    """

    description: str = ""
    """Description of the block, shown in drawings."""
    params: dict[Name, Scalar | None] = pydantic.Field(default_factory=dict)
    """Parameters and their default values. A parameter whose default is null must be set where the block is used."""
    inputs: Annotated[dict[Name, TypeText], pydantic.Field(min_length=1, max_length=64)]
    """Type of each input, such as ``float b l d``."""
    outputs: Annotated[dict[Name, Ref], pydantic.Field(min_length=1, max_length=64)]
    """Source of each output: ``node``, ``node.port`` or the name of an input."""
    nodes: Annotated[dict[Name, Node], pydantic.Field(min_length=1, max_length=4096)]
    """The nodes of the block by name, in any order."""
    invertible: bool | Invertible | None = None
    """Claim that the block is invertible; ``true`` claims it with default settings."""


class OpSpec(pydantic.BaseModel):
    """A component written inline: its name ``op`` and its Config keys side by side, as in ``objective``."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow", hide_input_in_errors=True)
    op: OpName
    """Name of the component."""

    @property
    def config(self) -> ConfigKeys:
        """The component's Config keys, that is, all keys but those that this model declares."""
        return dict(self.__pydantic_extra__ or {})


class ProcessSpec(OpSpec):
    """The noise process: the kernel (``op``), its Config keys, and the noise schedule."""

    schedule: OpSpec | None = None
    """The noise schedule; none for a kernel in discrete time, such as ``steps``, which has its own."""


class SampleSpec(OpSpec):
    """The sampler (``op``), its Config keys, and optionally a classifier."""

    classifier: OpSpec | None = None
    """Classifier that guides sampling towards a label."""


class Library(Frozen):
    """A file that contains only blocks, for other files to include."""

    blueprint: Literal[1]
    """Version of the blueprint format."""
    description: str = ""
    """Description of the file."""
    use: Annotated[dict[Name, Annotated[str, pydantic.Field(max_length=1024)]], pydantic.Field(max_length=64)] = (
        pydantic.Field(default_factory=dict)
    )
    """Included files by alias: paths relative to this file, or ``sedd_graph:blocks/dit.yaml`` from the package."""
    blocks: Annotated[dict[Name, Block], pydantic.Field(max_length=1024)] = pydantic.Field(default_factory=dict)
    """Blocks by name."""


_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class MemorySpec(Frozen):
    """Memory of a training step."""

    budget: Annotated[str, pydantic.Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,3})? ?(KiB|MiB|GiB|TiB|kB|MB|GB|TB)$")]
    """Largest memory of the activations of one backward pass, such as ``2 GiB``. ``build`` measures blocks whose key
    ``memory`` is ``auto``, and chooses which of their repeats store, recompute or reconstruct activations, so that
    the step takes the least time within the budget. Weights, gradients and optimizer state are not counted."""

    @property
    def size(self) -> int:
        """The budget in bytes."""
        digits = self.budget.rstrip("KMGTikB ")
        return round(float(digits) * _UNITS[self.budget[len(digits) :].strip()])


class Blueprint(Library):
    """A complete model: its graph and noise process, and its settings for training, sampling and storage."""

    name: Title
    """Name of the model."""
    params: dict[Name, Scalar] = pydantic.Field(default_factory=dict)
    """Parameters and their values, referenced as ``${params.NAME}``."""
    axes: Annotated[dict[Name, int | TypeText], pydantic.Field(max_length=64)] = pydantic.Field(default_factory=dict)
    """Axis names and their sizes: integers, ``batch``, ``length``, or expressions such as ``4*d``."""
    inputs: Annotated[dict[Name, TypeText], pydantic.Field(min_length=1, max_length=64)]
    """Type of each input of the graph by name, such as ``{tokens: int b l}``. In training and sampling, sedd_graph
    supplies the values, such as the noisy tokens."""
    outputs: Annotated[dict[Name, Ref], pydantic.Field(min_length=1, max_length=64)]
    """Source of each output of the graph: ``node``, ``node.port`` or the name of an input."""
    nodes: Annotated[dict[Name, Node], pydantic.Field(min_length=1, max_length=4096)]
    """The nodes of the graph by name, in any order."""
    process: ProcessSpec | None = None
    """The noise process."""
    objective: OpSpec | None = None
    """The training objective."""
    sample: SampleSpec | None = None
    """The sampler."""
    distill: OpSpec | None = None
    """The distillation objective, with which ``sedd-graph distill`` trains a student of a run."""
    memory: MemorySpec | None = None
    """Memory budget of a training step."""
    data: dict[Name, Any] | None = None
    """Data: a text corpus with its tokenizer and sequence length, or a data set of points."""
    train: dict[Name, Any] | None = None
    """Settings of the training loop."""
    store: dict[Name, Any] | None = None
    """Settings for writing saved activations to disk."""
