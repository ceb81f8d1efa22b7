"""Changes of the ``sample`` section of a run after training: another sampler, and other values of its keys."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pydantic

from sedd_graph.blueprint.load import load
from sedd_graph.component.registry import installed
from sedd_graph.errors import UserError
from sedd_graph.runs.check import LOCK, SECTIONS
from sedd_graph.runs.open import Run

__all__ = ["sample_overrides", "sampler_settings"]


def sample_overrides(run: Path, sampler: str | None, settings: Sequence[str]) -> list[str]:
    """Return the overrides of a run's blueprint for a sampler and settings of its ``sample`` section.

    Args:
        run: The run folder.
        sampler: Name of another sampler, such as ``confidence``; None for the run's own. Keys of the section that the
            Config of the sampler has, too, keep their values.
        settings: Texts ``key=value`` of keys of the section, such as ``temperature=0.7``.

    Raises:
        UserError: The run has no ``sample`` section, or there is no such sampler.
    """
    found = list[str]()
    if sampler is not None:
        if not (run / LOCK).is_file():
            raise UserError(f"{run} is not a run folder: there is no {LOCK} in it")
        old = load(run / LOCK, (), sections=SECTIONS).blueprint.sample
        contract = installed(warn=True).contract(sampler)
        held = {} if old is None else old.model_dump(mode="json", exclude_unset=True)
        kept = {key: value for key, value in held.items() if key in {*contract.config.model_fields, "classifier"}}
        found.append(f"sample={json.dumps({**kept, 'op': sampler})}")
    return [*found, *(f"sample.{text}" for text in settings)]


@contextlib.contextmanager
def sampler_settings(run: Run, **settings: float) -> Iterator[None]:
    """Give the sampler of an opened run other values of keys of its Config inside the context.

    Args:
        run: The opened run folder.
        **settings: The values, such as ``temperature=0.7``.

    Raises:
        UserError: The sampler has no such key, or the value is not allowed.
    """
    sampler = getattr(run.engine.process, "sampler", None)
    if sampler is None:
        raise UserError(f"{run.path} has no sampler with settings")
    before = sampler.config
    if missing := sorted(settings.keys() - type(before).model_fields.keys()):
        raise UserError(f"the sampler {run.plan.sampler_op!r} has no {missing[0]!r}")
    try:
        sampler.config = type(before).model_validate({**before.model_dump(), **settings})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"sample.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    try:
        yield
    finally:
        sampler.config = before
