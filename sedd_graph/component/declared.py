"""Base classes of components, which require a kind and a nested ``Config`` of each subclass. Imports no torch.

:class:`Plain` is the base class of components that are not ``nn.Module``: corpora, tokenizers, optimizers,
learning-rate schedules and trackers. Components that are ``nn.Module`` derive from
:class:`sedd_graph.component.base.Component`.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.component.kinds import require_kind
from sedd_graph.errors import UserError

__all__ = ["Declared", "Plain"]


class Declared:
    """Base class of all components, which checks ``kind`` and ``Config`` of a subclass when the subclass is defined.

    A subclass that is itself only a base class sets ``abstract = True`` or has no kind; it is not checked.

    Raises:
        TypeError: When a subclass is defined with an unknown kind, without a ``Config``, or without the base class that
            its kind requires.
    """

    Config: ClassVar[type[ComponentConfig]]
    """Class of the component's Config, whose fields are the component's keys in a blueprint."""
    kind: ClassVar[str]
    """Kind of the component, a key of :data:`sedd_graph.component.kinds.KINDS`."""

    def __init_subclass__(cls, *, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
        if not hasattr(cls, "kind"):
            return
        try:
            base = require_kind(cls.kind).base
        except UserError as error:
            raise TypeError(f"{cls.__qualname__}: {error}") from None
        if cls.is_abstract():
            return
        # compared by name: importing the base classes of all kinds would load packages that this class does not use
        if base not in {f"{c.__module__}:{c.__qualname__}" for c in cls.__mro__}:
            raise TypeError(f"{cls.__qualname__}: a component of kind {cls.kind!r} derives from {base}")
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, ComponentConfig)):
            raise TypeError(f"{cls.__qualname__}: a component needs a nested class Config(ComponentConfig)")

    @classmethod
    def is_abstract(cls) -> bool:
        """Return whether this class is only a base class: it has abstract methods or sets ``abstract = True``."""
        return inspect.isabstract(cls) or bool(cls.__dict__.get("abstract", False))


class Plain(Declared):
    """Base class of components that are not ``nn.Module``, such as corpora.

    Instances of a class are equal if their Configs are.
    """

    def __init__(self, config: ComponentConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and type(other) is type(self) and bool(other.config == self.config)

    def __hash__(self) -> int:
        return hash((type(self), self.config.model_dump_json()))

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({self.config!r})"
