"""Interpolation of ``${params.NAME}`` references in a blueprint, the only form of interpolation that is supported.

A reference names a parameter of the same file or block. Resolvers, environment variables and names that contain a
reference (``${params.${params.x}}``) are not supported, and an inserted value is not interpolated again.

The value of a parameter may refer to other parameters; OmegaConf resolves these references. All other references are
replaced by means of a regular expression, with the same result (a test compares the two), because OmegaConf's parser
takes a fraction of a millisecond per string, and an untrusted file may hold tens of thousands of strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from sedd_graph.blueprint.yaml import DataPath
from sedd_graph.errors import MAX_PROBLEMS, choices, listed

__all__ = ["InterpolationFault", "resolve", "resolve_params"]

MAX_TEXT, MAX_PARAMS, MAX_REFERENCES = 4096, 256, 32
_REFERENCE = re.compile(r"\$\{params\.([a-z][a-z0-9_]*)\}")


class InterpolationFault(Exception):
    """Exception that holds the references that could not be interpolated.

    Attributes:
        faults: Pairs (path, message). The path leads from the root of the interpolated data to the string with the
            invalid reference; it is empty if the message concerns the data as a whole.
    """

    def __init__(self, faults: list[tuple[DataPath, str]]) -> None:
        super().__init__("; ".join(m for _, m in faults))
        self.faults = faults


def _faults(text: str, names: Mapping[str, Any]) -> list[str]:
    """Return messages about unknown names and unsupported interpolation in ``text``, which contains ``${``."""
    unknown = [name for name in _REFERENCE.findall(text) if name not in names]
    faults = [f"unknown parameter {name!r}{choices(name, names)}" for name in unknown[:MAX_PROBLEMS]]
    if "${" in _REFERENCE.sub("", text) or "\\" in text:
        faults.append(f"{text[:60]!r}: the only interpolation is ${{params.NAME}}")
    return faults


def resolve(data: Any, params: Mapping[str, Any]) -> Any:
    """Return a copy of ``data`` with every ``${params.NAME}`` reference replaced by the value of that parameter.

    A string that consists of a single reference becomes a value of the parameter's type; in a longer string, the value
    is inserted as text.

    Args:
        data: Nested mappings, lists and scalars.
        params: Parameter values by name, without references.

    Raises:
        InterpolationFault: Names are unknown, another form of interpolation is used, or an interpolated string is too
            long. The exception holds all such strings, or the first ones if there are more than ``MAX_PROBLEMS``.
    """
    faults: list[tuple[DataPath, str]] = []

    def replace(item: Any, path: DataPath) -> Any:
        if isinstance(item, Mapping):
            return {k: replace(v, (*path, k)) for k, v in item.items()}
        if isinstance(item, list):
            return [replace(v, (*path, i)) for i, v in enumerate(item)]
        if not isinstance(item, str) or "${" not in item or len(faults) >= MAX_PROBLEMS:
            return item
        found = _faults(item, params)[: MAX_PROBLEMS - len(faults)]  # a string may have many faults of its own
        value = item if found else fill(item)
        if len(str(value)) > MAX_TEXT and not found:
            found = [f"longer than {MAX_TEXT} characters once interpolated"]
        faults.extend((path, message) for message in found)
        return item if found else value

    def fill(text: str) -> Any:
        whole = _REFERENCE.fullmatch(text)
        return params[whole[1]] if whole else _REFERENCE.sub(lambda found: str(params[found[1]]), text)

    resolved = replace(data, ())
    if faults:
        raise InterpolationFault(faults)
    return resolved


def resolve_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``params`` with the references that parameters make to each other resolved.

    The value ``???`` marks a parameter that must be set on the command line, as in OmegaConf.

    Raises:
        InterpolationFault: A name is unknown, a value is ``???`` or too long, parameters form a cycle, or there are
            too many parameters.
    """
    if len(params) > MAX_PARAMS:
        raise InterpolationFault([((), f"more than {MAX_PARAMS} parameters")])
    texts = {k: v for k, v in params.items() if isinstance(v, str) and "${" in v}
    found = (((k,), m) for k, text in texts.items() for m in _faults(text, params))
    faults: list[tuple[DataPath, str]] = list(islice(found, MAX_PROBLEMS))
    faults += [((k,), f"must be given: params.{k}=VALUE on the command line") for k, v in params.items() if v == "???"]
    if faults:
        raise InterpolationFault(faults)
    done = {k: v for k, v in params.items() if k not in texts}
    while waiting := [k for k in params if k not in done]:
        ready = [k for k in waiting if done.keys() >= set(_REFERENCE.findall(texts[k]))]
        if not ready:
            raise InterpolationFault([((waiting[0],), f"parameters form a cycle: {listed(waiting)}")])
        for key in ready:
            try:
                done[key] = _by_omegaconf(texts[key], done)
            except ValueError as error:
                raise InterpolationFault([((key,), str(error))]) from None
    return {k: done[k] for k in params}


def _by_omegaconf(text: str, params: Mapping[str, Any]) -> Any:
    """Interpolate one parameter ``text`` with ``params``, which contain no references. Raises ValueError."""
    from omegaconf import OmegaConf  # here: most blueprints have no parameter that refers to another
    from omegaconf.errors import OmegaConfBaseException

    names = _REFERENCE.findall(text)
    if len(names) > MAX_REFERENCES:
        raise ValueError(f"more than {MAX_REFERENCES} references in one parameter")
    config = OmegaConf.create({"params": {name: params[name] for name in names}, "text": text})
    try:
        value = OmegaConf.select(config, "text")
    except OmegaConfBaseException as error:
        raise ValueError(f"cannot be interpolated: {str(error).splitlines()[0]}") from None
    if len(str(value)) > MAX_TEXT:
        raise ValueError(f"longer than {MAX_TEXT} characters once interpolated")
    if "${" in str(value):
        raise ValueError(f"{text[:60]!r}: parameters cannot make up a reference together")
    return value
