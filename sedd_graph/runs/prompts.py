"""Filling in many texts (``infill --prompts``): prompts from a file, batched by length, answers as JSON lines and zarr."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic
import torch

from sedd_graph.component.progress import progress
from sedd_graph.component.strict import Strict
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.conditions.pattern import PatternError, parse
from sedd_graph.engine.samples import Prompt, SampleRequest, TextWithHoles
from sedd_graph.errors import UserError
from sedd_graph.inputs.files import read_text
from sedd_graph.runs.memory import require_sampling_memory
from sedd_graph.runs.open import Run
from sedd_graph.runs.sample import read_prompt, sampling_attributes
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.files import write_text

__all__ = ["Answer", "PromptLine", "answer_prompts", "answer_seed", "fill_in", "hole_pattern", "read_prompts"]

MAX_BYTES, MAX_PROMPTS = 256 * 2**20, 1_000_000
"""Limits on a file of prompts: its bytes, and its prompts."""

_HOLE = re.compile(r"\[\[\d*\]\]")

Text = Annotated[str, pydantic.Field(max_length=2**22)]


class PromptLine(Strict):
    """A prompt of a file: a text with holes, or the text before and after one hole (:class:`TextWithHoles`)."""

    id: Annotated[str, pydantic.Field(max_length=1024)] | int | None = None
    """Name of the prompt, which its answers repeat; None: its number in the file, from 0."""
    text: Text | None = None
    """Text with holes: ``[[N]]``, or ``[[]]`` for a model that chooses lengths."""
    prefix: Text | None = None
    """Text before the hole."""
    suffix: Text | None = None
    """Text after the hole."""
    length: Annotated[int, pydantic.Field(ge=1, le=2**20)] | None = None
    """Number of tokens of the filled-in text, given text included; None: as for ``infill`` without ``--length``."""


def read_prompts(path: Path) -> list[PromptLine]:
    """Read prompts from a file: one JSON object per line (``.jsonl``), or one text with holes per line (any other name).

    Empty lines are skipped.

    Args:
        path: The file, UTF-8, up to 256 MiB and 1,000,000 prompts.

    Raises:
        UserError: The file cannot be read, has no prompt or too many, or a line is not a prompt; the message names it.
    """
    found = list[PromptLine]()
    for number, line in enumerate(read_text(path, limit=MAX_BYTES).split("\n"), 1):
        if not (line := line.removesuffix("\r")).strip():
            continue
        if len(found) == MAX_PROMPTS:
            raise UserError(f"{path}: has more than {MAX_PROMPTS:,} prompts, which is the limit")
        try:
            prompt = PromptLine.model_validate_json(line) if path.suffix == ".jsonl" else PromptLine(text=line)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}") from None
        found.append(prompt if prompt.id is not None else prompt.model_copy(update={"id": len(found)}))
    if not found:
        raise UserError(f"{path}: has no prompt")
    return found


def hole_pattern(text: TextWithHoles, holes: Sequence[str]) -> str:
    """Return the regular expression of a whole text in which what fills the holes matches expressions.

    It is for the condition ``matching``: the given text is quoted, and each hole is one of ``holes``.

    Args:
        text: The text with holes.
        holes: Regular expressions: one for each hole in order, or one for all of them.

    Raises:
        UserError: An expression is invalid or begins with a look-ahead, their number is not that of the holes,
            or the text around the holes is given as token ids.
    """
    around = [part for part in (text.prefix or "", text.suffix or "") if isinstance(part, str)]
    if len(around) < 2:
        raise UserError("infill: expressions for holes need the text around them as text, not as token ids")
    parts = _HOLE.split(text.text) if text.text is not None else around
    count = len(parts) - 1
    if len(holes) not in (1, count):
        raise UserError(f"infill: {len(holes)} expressions for {count} holes: give one for each hole, or one for all")
    for hole in holes:
        try:
            ahead = parse(hole).aheads
        except PatternError as error:
            raise UserError(f"infill: --hole {hole[:60]!r}: {error}") from None
        if ahead:
            raise UserError(f"infill: --hole {hole[:60]!r}: a look-ahead is of the whole text: give it with --matching")
    each = [*holes] * count if len(holes) == 1 else [*holes]
    return re.escape(parts[0]) + "".join(
        f"(?:{hole}){re.escape(part)}" for hole, part in zip(each, parts[1:], strict=True)
    )


@dataclasses.dataclass
class Answer:
    """A row to be sampled: the number of its prompt, its number among the prompt's samples, its seed, and its result.

    Attributes:
        prompt: Number of its prompt.
        sample: Its number among the prompt's answers.
        seed: Its seed.
        tokens: The sampled row, int64 [l].
        given: True at the tokens of the prompt, bool [l].
        text: Text of the row.
    """

    prompt: int
    sample: int
    seed: int
    tokens: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    given: npt.NDArray[np.bool_] = dataclasses.field(default_factory=lambda: np.zeros(0, np.bool_))
    text: str = ""


def fill_in(
    run: Run,
    lines: Sequence[PromptLine],
    *,
    samples: int = 1,
    rows: int = 32,
    seed: int = 0,
    steps: int | None = None,
    conditions: Conditions | None = None,
    output: Path | None = None,
    ignore_memory: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Path, Path]:
    """Fill in prompts, and write the answers as JSON lines and to a zarr group in the run folder.

    Prompts of the same length are sampled together. The noise of an answer follows from ``seed``, the prompt and the
    number of the answer alone, so that an answer depends neither on the other prompts of the file nor on ``rows``
    (but for rounding of matrix products of another size). Where the family of the model has no noise by row
    (:attr:`SampleRequest.seeds`), prompts are sampled one by one.

    Args:
        run: The opened run folder.
        lines: The prompts.
        samples: Number of answers for each prompt.
        rows: Largest number of rows that are sampled together.
        seed: Seed of all answers.
        steps: Number of sampler steps; None: the number in the blueprint.
        conditions: Conditions on the samples; None: those of the blueprint.
        output: File of JSON lines; None: beside the zarr group, with its name.
        ignore_memory: True to print a warning instead of raising an error if a batch needs more memory than there is.
        say: Function that prints a line for the user.

    Returns:
        Paths of the zarr group (``infilled.zarr``; if it exists, a number is added) and of the file of JSON lines.

    Raises:
        UserError: A prompt cannot be filled in (the message names it), a batch does not fit into memory, or ``output``
            exists.
    """
    if output is not None and output.exists():
        raise UserError(f"{output} exists already; choose another name")
    prompts = list(_encoded(run, lines, "clamp" if conditions is None else conditions.observed))
    if (how := next((p.how for p in prompts if not p.exact), None)) is not None:
        say(f"warning: {how}")
    request = SampleRequest(batch=1, length=1, steps=steps, seed=seed, conditions=conditions)
    answers, facts = answer_prompts(
        run, prompts, request, samples=samples, rows=rows, seed=seed, ignore_memory=ignore_memory, say=say
    )
    tokenizer = run.text_tokenizer()
    filler = next((f for f in (tokenizer.pad, facts.get("start")) if f is not None), 0)
    where = write_samples(
        run.path / "infilled.zarr",
        _arrays(answers, filler),
        text=[answer.text for answer in answers],
        attributes={**sampling_attributes(run, request, facts), "infilling": prompts[0].how, "prompts": len(prompts)},
    )
    target = where.with_suffix(".jsonl") if output is None else output
    write_text(target, "".join(_line(answer, lines[answer.prompt], tokenizer) for answer in answers))
    return where, target


def answer_prompts(
    run: Run,
    prompts: Sequence[Prompt],
    request: SampleRequest,
    *,
    samples: int,
    rows: int,
    seed: int,
    ignore_memory: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Answer], dict[str, Any]]:
    """Sample answers to prompts, those of the same length together.

    Args:
        run: The opened run folder.
        prompts: The prompts.
        request: Steps and conditions of the samples; its batch, length, prompt and seeds are replaced.
        samples: Number of answers for each prompt.
        rows: Largest number of rows that are sampled together.
        seed: Seed of all answers, from which, with the prompt and the number of the answer, the seed of each follows.
        ignore_memory: As of :func:`fill_in`.
        say: Function that prints a line for the user.

    Returns:
        The answers, those of the first prompt first; and facts of the samples (:attr:`Samples.facts`).
    """
    answers = [
        Answer(number, sample, answer_seed(seed, prompt, sample))
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    observed = request.conditions is not None and request.conditions.observed == "renoise"
    alone, facts = "seeds" in run.engine.process.refuses or observed, dict[str, Any]()
    with progress("filling in", total=len(answers), unit="row") as advance:
        for batch in _batches(answers, prompts, 1 if alone else rows):
            made = _sample(run, request, batch, prompts, alone=alone, ignore_memory=ignore_memory, say=say)
            facts |= {**made, "evaluations": facts.get("evaluations", 0) + made.get("evaluations", 0)}
            advance(len(batch))
    return answers, facts


def _encoded(run: Run, lines: Sequence[PromptLine], observed: str) -> Iterator[Prompt]:
    """Yield the prompts as tokens. Raises :class:`UserError` that names the prompt that cannot be filled in."""
    for line in lines:
        holes = TextWithHoles(text=line.text, prefix=line.prefix, suffix=line.suffix, length=line.length)
        try:
            yield read_prompt(run, holes, observed=observed)
        except UserError as error:
            raise UserError(f"prompt {line.id!r}: {error}") from None


def answer_seed(seed: int, prompt: Prompt, sample: int) -> int:
    """Return the seed of an answer, in [0, 2^62), which follows from the tokens of its prompt."""
    content = f"{seed} {sample} {prompt.length} {prompt.tokens.tolist()}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") >> 2


def _batches(answers: Sequence[Answer], prompts: Sequence[Prompt], rows: int) -> Iterator[list[Answer]]:
    """Yield the answers in groups of at most ``rows`` of the same length, the shortest first."""
    ordered = sorted(answers, key=lambda answer: prompts[answer.prompt].length)
    for _, group in itertools.groupby(ordered, key=lambda answer: prompts[answer.prompt].length):
        while batch := list(itertools.islice(group, rows)):
            yield batch


def _sample(
    run: Run,
    request: SampleRequest,
    batch: Sequence[Answer],
    prompts: Sequence[Prompt],
    *,
    alone: bool,
    ignore_memory: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Sample a group of answers of the same length, and return the facts of the samples."""
    request = dataclasses.replace(
        request,
        batch=len(batch),
        length=prompts[batch[0].prompt].length,
        prompt=torch.cat([prompts[answer.prompt].tokens for answer in batch]),
        seed=batch[0].seed,
        seeds=None if alone else torch.tensor([answer.seed for answer in batch]),
    )
    require_sampling_memory(run, request, trajectory=False, ignore=ignore_memory, say=say)
    samples = run.engine.generate(request)
    texts = run.decode(samples.rows)
    for at, answer in enumerate(batch):
        answer.tokens, answer.text = samples.rows[at].numpy(), texts[at]
        answer.given = np.zeros(0, np.bool_) if samples.given is None else samples.given[at].numpy()
    return dict(samples.facts)


def _arrays(answers: Sequence[Answer], filler: int) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of all answers, in the order of the file: rows are filled up to the longest with ``filler``."""
    width = max(len(answer.tokens) for answer in answers)
    tokens = np.full((len(answers), width), filler, np.int64)
    given = np.zeros((len(answers), width), np.bool_)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer.tokens)] = answer.tokens
        given[row, : len(answer.given)] = answer.given
    return {
        "tokens": tokens,
        "given": given,
        "lengths": np.array([len(answer.tokens) for answer in answers], np.int64),
        "prompt": np.array([answer.prompt for answer in answers], np.int64),
        "seed": np.array([answer.seed for answer in answers], np.int64),
    }


def _line(answer: Answer, line: PromptLine, tokenizer: Tokenizer) -> str:
    """Return an answer as a line of JSON: the whole text, and the parts that the model wrote."""
    filled, start = list[str](), 0
    for given, run in itertools.groupby(answer.given.tolist()):
        size = len(list(run))
        filled += [] if given else [tokenizer.decode(answer.tokens[start : start + size].tolist())]
        start += size
    content = {"id": line.id, "sample": answer.sample, "text": answer.text, "filled": filled, "seed": answer.seed}
    return json.dumps(content, ensure_ascii=False) + "\n"
