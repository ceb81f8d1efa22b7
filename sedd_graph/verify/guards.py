"""What all proofs share: errors of components as findings, checks of several sizes as one, global random generators."""

from __future__ import annotations

import dataclasses
import random
import traceback
from collections.abc import Callable, Iterable

import numpy as np
import torch

from sedd_graph.component.base import Component
from sedd_graph.component.check import Check
from sedd_graph.errors import SeddGraphError

__all__ = ["described", "generators_state", "guarded", "merged", "raised"]

LONGEST = 300
"""Number of characters of an error's text that are shown."""


def guarded(name: str, run: Callable[[], list[Check]]) -> list[Check]:
    """Return the checks of ``run``, or one failed check if it raises an error.

    Args:
        name: What is verified, the first part of the name of the failed check, such as ``kernel``.
        run: Function that verifies components, which may be of third parties and raise anything.
    """
    try:
        return run()
    except Exception as error:  # whatever a component raises is the finding
        return [raised(name, error)]


def raised(name: str, error: Exception) -> Check:
    """Return the failed check of an error, which names the component and the method that raised it.

    Args:
        name: What is verified, such as ``kernel``: the check is ``kernel.runs``.
        error: The error.
    """
    claim = f"the {name} is verified without an error"
    return Check(f"{name}.runs", claim, False, described(error), "an error was raised")


def described(error: Exception) -> str:
    """Return the first line of an error's text, with the class and method of the component that raised it, if any.

    Args:
        error: The error. The component is the innermost one in its traceback.
    """
    text = str(error).strip().split("\n")[0][:LONGEST]
    text = text if isinstance(error, SeddGraphError) and text else f"{type(error).__name__}: {text}"
    where = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Component):
            where = f"{type(owner).__module__}.{type(owner).__name__}.{frame.f_code.co_name}"
    return text if where is None else f"{where}: {text}"


def generators_state() -> tuple[bytes, object, bytes]:
    """Return the states of the global random generators of torch (CPU), Python and NumPy.

    Two calls return equal states if no generator was used or seeded between them.
    """
    _, keys, place, *_ = np.random.get_state()
    return bytes(torch.get_rng_state().numpy()), random.getstate(), bytes(np.asarray(keys)) + repr(place).encode()


def merged(checks: Iterable[Check]) -> list[Check]:
    """Merge checks that have the same name into one; names keep the order of their first occurrence.

    If any check of a name fails, the first failed one is returned. Otherwise the first is returned, with the texts
    ``value`` and ``how`` of the others appended where they differ.
    """
    found: dict[str, Check] = {}
    for check in checks:
        seen = found.get(check.name)
        if seen is None or (check.holds is False and seen.holds is not False):
            found[check.name] = check
        elif seen.holds is not False and (check.value, check.how) != (seen.value, seen.how):
            value = seen.value if check.value == seen.value else f"{seen.value}; {check.value}"
            how = seen.how if check.how == seen.how else f"{seen.how}; {check.how}"
            found[check.name] = dataclasses.replace(seen, value=value, how=how)
    return list(found.values())
