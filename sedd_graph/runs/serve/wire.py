"""What clients send: the body of a completion request in OpenAI's format, its limits, and the errors that refuse it."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

import pydantic

from sedd_graph.errors import suggest

__all__ = ["Completion", "Limits", "Refused", "read_completion"]


class Refused(Exception):
    """Exception for a request that is not answered with a completion.

    Args:
        status: HTTP status of the answer.
        message: What is wrong, and what would be right.
        code: Machine-readable reason, such as ``queue_full``; None for an invalid value.
        param: Field of the request that is at fault; None if it is none.
        retry_after: Seconds after which the client may try again; None for an error that will not go away.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as the JSON object that OpenAI's clients read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server on what clients may ask for.

    Attributes:
        length: Largest number of tokens of a row, given tokens included.
        steps: Largest number of sampler steps.
        choices: Largest number of choices of a request: ``n`` for each prompt.
        batch: Largest number of rows that are sampled together.
        queue: Largest number of requests that wait.
        body: Largest size of the body of a request, in bytes.
        timeout: Seconds after which a request that has not been answered is refused.
    """

    length: int
    steps: int = 4096
    choices: int = 128
    batch: int = 16
    queue: int = 512
    body: int = 2**20
    timeout: float = 600.0


Text = Annotated[str, pydantic.Field(max_length=2**22)]
Token = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
Ids = Annotated[list[Token], pydantic.Field(max_length=2**20)]
Stop = Annotated[str, pydantic.Field(min_length=1, max_length=1024)]


class StreamOptions(pydantic.BaseModel):
    """Value of ``stream_options``."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Completion(pydantic.BaseModel):
    """Body of ``POST /v1/completions``: the fields of OpenAI, and those of diffusion models."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: Annotated[str, pydantic.Field(max_length=1024)] | None = None
    """Name of the model; None: the one that is served."""
    prompt: (
        Text
        | Annotated[list[Text], pydantic.Field(min_length=1, max_length=1024)]
        | Annotated[list[Token], pydantic.Field(min_length=1, max_length=2**20)]
        | Annotated[list[Ids], pydantic.Field(min_length=1, max_length=1024)]
        | None
    ) = None
    """One or several texts, or the token ids of one or several texts; None: the model writes the whole text."""
    suffix: Text | None = None
    """Text after what the model writes. With it, ``[[N]]`` in a prompt is text and no hole."""
    max_tokens: Annotated[int, pydantic.Field(ge=1, le=2**20)] | None = None
    """Number of tokens that the model writes, or the largest number if it chooses lengths; None: 16."""
    temperature: Annotated[float, pydantic.Field(ge=0, le=100)] | None = None
    """Sampling temperature; None: that of the run."""
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    """Nucleus sampling; None: that of the run."""
    n: Annotated[int, pydantic.Field(ge=1, le=65_536)] | None = None
    """Number of choices for each prompt; None: 1."""
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = None
    """Seed of all choices; None: a random one, which the answer names."""
    stream: bool | None = None
    """True to answer with server-sent events."""
    stream_options: StreamOptions | None = None
    """Options of ``stream``."""
    stop: Stop | Annotated[list[Stop], pydantic.Field(max_length=16)] | None = None
    """One or several texts, before the first of which the written text ends."""
    echo: bool | None = None
    """True to put the prompt (and the suffix) around the written text."""
    user: Annotated[str, pydantic.Field(max_length=1024)] | None = None
    """Name of the user, which is not used."""
    steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] | None = None
    """Number of sampler steps (of each block, for text in blocks); None: that of the run."""
    sampler: Annotated[str, pydantic.Field(max_length=128)] | None = None
    """Name of the sampler; None: that of the run."""
    matching: Annotated[str, pydantic.Field(max_length=4096)] | None = None
    """Regular expression that the whole text matches, prompt included."""
    forbid: (
        Annotated[list[Annotated[str, pydantic.Field(max_length=1024)] | Token], pydantic.Field(max_length=256)] | None
    ) = None
    """Texts that no written token contains, and ids of tokens that are not written."""
    allow: dict[str, Annotated[str, pydantic.Field(max_length=4096)]] | None = None
    """Regular expressions by the position of the token that matches them (negative: from the end)."""
    guidance: Annotated[float, pydantic.Field(ge=0, le=100)] | None = None
    """Strength of guidance by the given text; None: that of the run."""
    drafts: bool | None = None
    """With ``stream``: True to send the row after each step, too."""

    best_of: int | None = None
    """Not supported but for the value of ``n``."""
    logprobs: int | None = None
    """Not supported."""
    logit_bias: dict[str, float] | None = None
    """Not supported."""
    frequency_penalty: float | None = None
    """Not supported but for 0."""
    presence_penalty: float | None = None
    """Not supported but for 0."""

    def stops(self) -> tuple[str, ...]:
        """Return the stop sequences."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts: texts, or token ids."""
        given = self.prompt
        if given is None or isinstance(given, str):
            return [given or ""]
        if isinstance(given[0], int):
            return [[i for i in given if isinstance(i, int)]]
        return [p for p in given if not isinstance(p, int)]


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "logprobs": (None,),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}
"""Values that change nothing, by field of OpenAI's that has no meaning for diffusion models."""


def read_completion(body: bytes) -> Completion:
    """Read the body of a completion request.

    Args:
        body: JSON text.

    Raises:
        Refused: The body is not JSON, has an unknown field, a value of the wrong type or out of range.
    """
    try:
        found = Completion.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _refused(error) from None
    for name, values in _NEUTRAL.items():
        if getattr(found, name) not in values:
            raise Refused(400, f"{name} is not supported: leave it out", param=name, code="unsupported")
    if found.best_of not in (None, found.n or 1):
        raise Refused(
            400, "best_of is not supported but for the value of n: leave it out", param="best_of", code="unsupported"
        )
    for name in ("drafts", "stream_options"):
        if getattr(found, name) and not found.stream:
            raise Refused(400, f"{name} needs stream: true", param=name)
    return found


def _refused(error: pydantic.ValidationError) -> Refused:
    """Return the first errors of a body that is not valid, as one message."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {first['msg'].partition(': ')[2]}", code="invalid_json")
    if not first["loc"]:
        return Refused(400, "the body is no JSON object", code="invalid_json")
    unknown = [str(e["loc"][0]) for e in errors if e["type"] == "extra_forbidden" and len(e["loc"]) == 1]
    if unknown:
        name = unknown[0][:100]
        return Refused(
            400, f"unknown field {name!r}{suggest(name, Completion.model_fields)}", param=name, code="unknown_field"
        )
    field = str(first["loc"][0])[:100]
    # the branches of a union are named in the location; the shortest message of the field is told
    told = dict.fromkeys(re.sub(r"\s+", " ", e["msg"]) for e in errors if e["loc"][0] == first["loc"][0])
    return Refused(400, f"{field}: {'; or: '.join(list(told)[:4])}", param=field)


Outcome = Literal["ok", "refused", "failed", "cancelled", "timeout"]
"""How a request ended, a label of the metrics."""
