"""``check_component``, for authors of components: checks a class against everything that its kind promises.

>>> from sedd_graph.testing.conformance import check_component
>>> check_component(MyAttention, {"heads": 2}, axes={"r": 8})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.component.declared import Declared
from sedd_graph.component.kinds import require_kind
from sedd_graph.testing.case import Case, Failures

__all__ = ["ConformanceError", "check_component"]


class ConformanceError(AssertionError):
    """Every check that failed. ``failures`` is a tuple of (name of the check, what was found)."""

    def __init__(self, cls: type, failures: Failures) -> None:
        super().__init__(f"{cls.__qualname__}: " + "; ".join(f"{name}: {text}" for name, text in failures))
        self.failures = tuple(failures)


def check_component(
    cls: type[Declared],
    config: Mapping[str, Any] | None = None,
    *,
    axes: Mapping[str, int] | None = None,
    connected: tuple[str, ...] = (),
    compile: bool = False,
    root: Path | None = None,
    partners: tuple[type[Declared], ...] = (),
) -> None:
    """Check one component under one Config.

    A node of the graph is evaluated at random inputs, and its algebra is compared with numbers. A part of a process is proved
    on the enumerable toy that ``build`` uses, together with sound partners. A part of the data or training section is run
    on small data.

    Args:
        cls: The component.
        config: Its Config keys.
        axes: Of a node, sizes of its static axes; 8 for those left out. The axes ``b`` (batch) and ``l`` (length) are tried at
            two sizes. Integers are drawn below ``v`` where the component has such an axis, else below 2.
        connected: Of a node, the optional ports to feed.
        compile: Also compile ``forward`` of a node.
        root: Folder that relative file names of the Config start from; the current one by default.
        partners: Of a part of a process, the components that it is proved with, where the built-in ones do not fit it.

    Raises:
        ConformanceError: With every failure at once.
    """
    failures: Failures = []
    made = _config(cls, config or {}, failures)
    if made is not None:
        case = Case(cls, made, axes or {}, connected, compile, root or Path(), partners)
        try:
            for failure in require_kind(cls.kind).checker()(case):
                failures.append(failure)  # one by one, so that those before an exception are retained
        except Exception as error:  # whatever a component raises is the finding
            failures.append(("raises", f"{type(error).__name__}: {error}"))
    if failures:
        raise ConformanceError(cls, failures)


def _config(cls: type[Declared], values: Mapping[str, Any], failures: Failures) -> ComponentConfig | None:
    model = cls.Config
    if not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid":
        failures.append(("config", "Config must stay frozen and refuse unknown keys"))
    try:
        model.model_validate({**values, "no_such_key": 1})
        failures.append(("config", "Config takes a key that it does not know"))
    except pydantic.ValidationError:
        pass
    try:
        made = model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        failures.append(("config", f"the given config is refused: {error.errors()[0]['msg']}"))
        return None
    if model.model_validate_json(made.model_dump_json()) != made:
        failures.append(("config", "Config does not survive JSON: the lock file could not hold it"))
    return made
