"""Conformance tests for authors of components: ``check_component`` checks a class against the contract of its kind.

>>> from sedd_graph.testing.conformance import check_component
>>> check_component(MyAttention, {"heads": 2}, axes={"r": 8})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from sedd_graph.component.check import Proof
from sedd_graph.component.contract import ComponentConfig
from sedd_graph.component.declared import Declared
from sedd_graph.component.kinds import require_kind
from sedd_graph.testing.case import Case, Failures

__all__ = ["ConformanceError", "check_component"]


class ConformanceError(AssertionError):
    """Exception raised by :func:`check_component` if a component fails checks.

    Attributes:
        failures: The failed checks, each as (name of the check, description of the error).
    """

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
    proof: Proof = "full",
) -> None:
    """Test a component class with one Config.

    A graph node is evaluated at random inputs, and its declared algebra (inverses, log-determinants, Lipschitz bounds)
    is verified numerically. A component of a diffusion process (kernel, objective, sampler, ...) is combined with
    built-in components to a process with few token states, which is verified as by the subcommand ``build``. A
    component of the ``data`` or ``train`` section is run on small data.

    Args:
        cls: Class of the component.
        config: Config keys of the component.
        axes: Sizes of the static axes of a graph node by axis name; 8 for axes that are not named. The axes ``b``
            (batch) and ``l`` (length) are tested with two sizes each. Integer inputs are drawn below the size of the
            axis ``v``, or below 2 for a component without ``v``.
        connected: Names of the optional ports of a graph node to connect.
        compile: Also test ``forward`` of a graph node under ``torch.compile``.
        root: Folder that relative file names in the Config start from; by default the current folder.
        partners: Component classes to combine a process component with, if it does not fit the built-in ones.
        proof: Strength of the verification of a process on vectors: ``full``, or ``quick`` with fewer cases.

    Raises:
        ConformanceError: The component fails at least one check. The message lists all failed checks.
    """
    failures: Failures = []
    made = _config(cls, config or {}, failures)
    if made is not None:
        case = Case(cls, made, axes or {}, connected, compile, root or Path(), partners, proof)
        try:
            for failure in require_kind(cls.kind).checker()(case):
                failures.append(failure)  # one at a time, so that those before an exception are retained
        except Exception as error:  # whatever a component raises is the finding
            failures.append(("raises", f"{type(error).__name__}: {error}"))
    if failures:
        raise ConformanceError(cls, failures)


def _config(cls: type[Declared], values: Mapping[str, Any], failures: Failures) -> ComponentConfig | None:
    model = cls.Config
    if not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid":
        failures.append(("config", "Config must be frozen and refuse unknown keys"))
    try:
        model.model_validate({**values, "no_such_key": 1})
        failures.append(("config", "Config accepts an unknown key"))
    except pydantic.ValidationError:
        pass
    try:
        made = model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        failures.append(("config", f"the given config is invalid: {error.errors()[0]['msg']}"))
        return None
    if model.model_validate_json(made.model_dump_json()) != made:
        failures.append(("config", "Config differs after a round trip through JSON, as through the lock file"))
    return made
