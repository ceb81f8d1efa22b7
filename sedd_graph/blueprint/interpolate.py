"""``${params.NAME}``: the only interpolation there is. OmegaConf resolves the parameters among themselves.

No resolvers, no environment, no nesting: a blueprint cannot read anything but its own parameters, and what a parameter
puts into a text is never looked at again. Everywhere else the resolved values are filled in as OmegaConf would do it (a
test holds it to that): it parses a text for a fraction of a millisecond, which an untrusted file could ask for tens of
thousands of times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sedd_graph.errors import listed, suggest

__all__ = ["InterpolationFault", "resolve", "resolve_params"]

MAX_TEXT, MAX_PARAMS, MAX_REFERENCES = 4096, 256, 32
_REFERENCE = re.compile(r"\$\{params\.([a-z][a-z0-9_]*)\}")


class InterpolationFault(Exception):
    """What is wrong, as ``faults``: pairs of (path within the data, message)."""

    def __init__(self, faults: list[tuple[tuple[str | int, ...], str]]) -> None:
        super().__init__("; ".join(m for _, m in faults))
        self.faults = faults


def _strings(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(data, str):
        if "${" in data:
            yield path, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _strings(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _strings(value, (*path, index))


def _check(data: Any, names: Mapping[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    faults = []
    for path, text in _strings(data):
        for name in _REFERENCE.findall(text):
            if name not in names:
                faults.append((path, f"unknown parameter {name!r}{suggest(name, names)}; known: {listed(names)}"))
        if "${" in _REFERENCE.sub("", text) or "\\" in text:
            faults.append((path, f"{text[:60]!r}: the only interpolation is ${{params.NAME}}"))
    return faults


def resolve(data: Any, params: Mapping[str, Any]) -> Any:
    """``data`` with every ``${params.NAME}`` replaced; a string that is one reference keeps the parameter's type.

    Raises :class:`InterpolationFault` with every unknown name at once.
    """
    faults = _check(data, params)
    if faults:
        raise InterpolationFault(faults)

    def replace(item: Any, path: tuple[str | int, ...]) -> Any:
        if isinstance(item, str):
            return fill(item, path) if "${" in item else item
        if isinstance(item, Mapping):
            return {k: replace(v, (*path, k)) for k, v in item.items()}
        return [replace(v, (*path, i)) for i, v in enumerate(item)] if isinstance(item, list) else item

    def fill(text: str, path: tuple[str | int, ...]) -> Any:
        whole = _REFERENCE.fullmatch(text)
        value = params[whole[1]] if whole else _REFERENCE.sub(lambda found: str(params[found[1]]), text)
        if len(str(value)) > MAX_TEXT:
            faults.append((path, f"longer than {MAX_TEXT} characters once interpolated"))
            return text
        return value

    resolved = replace(data, ())
    if faults:
        raise InterpolationFault(faults)
    return resolved


def resolve_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that refer to each other, resolved; a circle is a fault that names its members.

    As in OmegaConf, a parameter that is ``???`` must be given on the command line.
    """
    if len(params) > MAX_PARAMS:
        raise InterpolationFault([((), f"more than {MAX_PARAMS} parameters")])
    faults = _check(params, params)
    faults += [((k,), f"must be given: params.{k}=VALUE on the command line") for k, v in params.items() if v == "???"]
    waits = {k: set(_REFERENCE.findall(v)) for k, v in params.items() if isinstance(v, str)}
    done: dict[str, Any] = {k: v for k, v in params.items() if not waits.get(k)}
    if faults:
        raise InterpolationFault(faults)
    while len(done) < len(params):
        ready = [k for k in params if k not in done and waits[k] <= done.keys()]
        if not ready:
            circle = [k for k in params if k not in done]
            raise InterpolationFault([((circle[0],), f"parameters refer to each other in a circle: {listed(circle)}")])
        for key in ready:
            done[key] = _by_omegaconf(key, params[key], done)
    return {k: done[k] for k in params}


def _by_omegaconf(key: str, text: str, params: Mapping[str, Any]) -> Any:
    """One parameter's text with the resolved ``params`` in it, which hold no references of their own."""
    from omegaconf import DictConfig, OmegaConf  # here: most blueprints have no parameter that refers to another
    from omegaconf.errors import OmegaConfBaseException

    names = _REFERENCE.findall(text)
    if len(names) > MAX_REFERENCES:
        raise InterpolationFault([((key,), f"more than {MAX_REFERENCES} references in one parameter")])
    config = OmegaConf.create({"params": {name: params[name] for name in names}, "text": text})
    assert isinstance(config, DictConfig)
    try:
        value = config["text"]
    except OmegaConfBaseException as error:
        raise InterpolationFault([((key,), f"cannot be interpolated: {str(error).splitlines()[0]}")]) from None
    if len(str(value)) > MAX_TEXT:
        raise InterpolationFault([((key,), f"longer than {MAX_TEXT} characters once interpolated")])
    if "${" in str(value):
        raise InterpolationFault([((key,), f"{text[:60]!r}: parameters cannot make up a reference together")])
    return value
