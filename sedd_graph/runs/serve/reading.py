"""Requests become rows: their settings, prompts and lengths are checked against the model and its limits."""

from __future__ import annotations

import re
from typing import Any

import torch

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.engine.process import Process
from sedd_graph.engine.samples import Prompt, TextWithHoles
from sedd_graph.errors import UserError, suggest
from sedd_graph.runs.prompts import answer_seed
from sedd_graph.runs.sample import read_prompt
from sedd_graph.runs.serve.jobs import Row, Settings
from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.wire import Completion, Refused

__all__ = ["DEFAULT_TOKENS", "read_rows", "read_settings", "told"]

DEFAULT_TOKENS = 16
"""Number of tokens that the model writes if a request does not say, as in OpenAI's interface."""
_HOLE = re.compile(r"\[\[\d*\]\]")


def read_settings(model: ServedModel, request: Completion) -> Settings:
    """Return how the rows of a request are sampled.

    Raises:
        Refused: A setting is not one of this model's, or beyond the limits.
    """
    name = request.sampler or model.sampler
    if name not in model.runs:
        known = ", ".join(model.runs)
        raise Refused(
            400,
            f"there is no sampler {name[:60]!r} for this model{suggest(name, model.runs)}; it has {known}",
            param="sampler",
        )
    process = model.runs[name].engine.process
    if request.steps is not None and process.steps is None:
        raise Refused(400, f"the sampler {name!r} takes no number of steps: leave steps out", param="steps")
    if request.steps is not None and request.steps > model.limits.steps:
        raise Refused(400, f"steps may be up to {model.limits.steps:,} here, not {request.steps:,}", param="steps")
    keys, chosen = model.keys(name), dict[str, float | None](temperature=None, top_p=None)
    for key in chosen:
        if (value := getattr(request, key)) is not None and key not in keys and value != 1:
            raise Refused(400, f"the sampler {name!r} has no {key}: leave it out", param=key)
        chosen[key] = value if key in keys else None
    return Settings(name, request.steps, chosen["temperature"], chosen["top_p"], _conditions(model, process, request))


def _conditions(model: ServedModel, process: Process, request: Completion) -> Conditions | None:
    changes = dict[str, Any]()
    for key in ("matching", "forbid", "guidance"):
        if (value := getattr(request, key)) is not None:
            changes[key] = value
    if request.allow:
        try:
            changes["allow"] = {int(place): pattern for place, pattern in request.allow.items()}
        except ValueError:
            raise Refused(400, 'allow: positions must be integers, such as "0" or "-1"', param="allow") from None
    try:
        return process.conditions(changes)
    except UserError as error:
        raise Refused(400, told(error), param=next(iter(changes), None)) from None


def read_rows(model: ServedModel, request: Completion, settings: Settings, seed: int) -> list[Row]:
    """Return the rows of a request, those of the first prompt first.

    Args:
        request: The request.
        settings: How its rows are sampled.
        seed: Seed of the request, from which, with the prompt and the number of the choice, that of each row follows.

    Raises:
        Refused: A prompt cannot be filled in, or the rows are too many or too long.
    """
    prompts, count = request.prompts(), request.n or 1
    if len(prompts) * count > model.limits.choices:
        raise Refused(
            400,
            f"n for each of {len(prompts)} prompts makes more than the {model.limits.choices} choices of a request",
            param="n",
        )
    found = list[Row]()
    for prompt in prompts:
        given, whole = _prompt(model, prompt, request, settings)
        tokens = given.tokens[0].numpy()
        around = ("", "")
        if request.echo and not whole:
            around = (prompt if isinstance(prompt, str) else model.texts.decode(prompt), request.suffix or "")
        for sample in range(count):
            own = answer_seed(seed, given, sample)
            bucket = model.bucket(given.length, settings.conditions)
            found.append(Row(len(found), tokens, given.length, bucket, own, whole, around))
    return found


def _prompt(
    model: ServedModel, prompt: str | list[int], request: Completion, settings: Settings
) -> tuple[Prompt, bool]:
    """Return a prompt as tokens, and whether it is a text with holes."""
    most, limit = request.max_tokens or DEFAULT_TOKENS, model.limits.length
    for part in (prompt, request.suffix or ""):
        size = len(part.encode(errors="replace")) / max(1, model.longest) if isinstance(part, str) else len(part)
        if size > limit and (model.longest or not isinstance(part, str)):
            raise _too_long(f"the prompt has more than {limit:,} tokens, which is the limit of a row")
    observed = "clamp" if settings.conditions is None else settings.conditions.observed
    whole = isinstance(prompt, str) and request.suffix is None and _HOLE.search(prompt) is not None
    try:
        if whole:
            found = read_prompt(model.run, TextWithHoles(text=str(prompt)), observed=observed)
        else:
            found = _continued(model, prompt, request.suffix or "", most, observed)
    except UserError as error:
        raise Refused(400, told(error), param="prompt") from None
    given = int((found.tokens >= 0).sum())
    if model.process.chooses_lengths:
        found = found._replace(length=given + most)
    elif whole and request.max_tokens is not None and found.length - given > most:
        raise Refused(400, f"the holes have {found.length - given:,} tokens, more than max_tokens", param="max_tokens")
    if found.length > limit:
        raise _too_long(
            f"{given:,} given tokens and {found.length - given:,} to write are more than the {limit:,} of a row"
        )
    if whole and request.stop:
        raise Refused(400, "stop cuts what follows it: leave it out where a prompt has holes", param="stop")
    return found, whole


def _continued(model: ServedModel, prompt: str | list[int], suffix: str, most: int, observed: str) -> Prompt:
    """Return a prompt of a text before and one after a single hole of at most ``most`` tokens."""
    before, after = (_ids(model, part) for part in (prompt, suffix))
    if not before and not after:
        holes = 1 if model.process.chooses_lengths else most
        return Prompt(torch.full((1, holes), -1), most, True, "nothing is given")
    length = len(before) + most + len(after)
    if length > 2**20:
        raise _too_long(f"the row has {length:,} tokens")
    return read_prompt(model.run, TextWithHoles(prefix=before, suffix=after, length=length), observed=observed)


def _ids(model: ServedModel, part: str | list[int]) -> list[int]:
    """Return the token ids of a part of a prompt, which may be its ids."""
    if not isinstance(part, str):
        return part
    return [int(i) for i in model.tokenizer.encode(part)] if part else []


def _too_long(message: str) -> Refused:
    return Refused(
        400, f"{message}: take a shorter prompt, or fewer max_tokens", code="context_length_exceeded", param="prompt"
    )


def told(error: Exception) -> str:
    """Return a message that was written for the command line in the words of a request."""
    text = re.sub(r"^(infill|sample): ", "", str(error))
    return re.sub(
        r"--([a-z-]+)", lambda match: "the prompt" if match[1] == "text" else match[1].replace("-", "_"), text
    )
