"""A run as lm-evaluation-harness needs it: log-likelihoods of texts, and texts that continue others."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from sedd_graph.engine.samples import Prompt, SampleRequest, TextWithHoles
from sedd_graph.errors import UserError
from sedd_graph.evaluation.sequences import Bound, Scored, score, windows
from sedd_graph.runs.open import Run, open_run
from sedd_graph.runs.precision import choose_dtype
from sedd_graph.runs.prompts import answer_prompts
from sedd_graph.runs.sample import read_prompt
from sedd_graph.runs.sample_section import sample_overrides, sampler_settings

__all__ = ["Generation", "HarnessRun", "Settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run answers.

    Attributes:
        draws: Evaluations of the network for each row of a likelihood.
        seed: Seed of all noise.
        rows: Largest number of rows that are evaluated or sampled at a time; no answer depends on it.
        length: Largest number of tokens of a row; None: ``data.length`` of the blueprint.
        steps: Steps of the sampler; None: those of the blueprint.
        greedy: True to sample each continuation at temperature 0, with one step for each token, to compare it with the
            given one (the harness's ``is_greedy``); False never calls a continuation greedy.
    """

    draws: int = 8
    seed: int = 0
    rows: int = 32
    length: int | None = None
    steps: int | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        limits = {"draws": 4096, "rows": 65_536, "length": 2**20, "steps": 1_000_000}
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise UserError(f"{name} must be a whole number from 1 to {most:,}, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How a text is continued.

    Attributes:
        tokens: Largest number of new tokens.
        temperature: Temperature of the sampler; 0 for the most likely token.
        top_p: Nucleus sampling.
        until: Texts before which the new text ends.
    """

    tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    until: tuple[str, ...] = ()


class HarnessRun:
    """Likelihoods and texts of a run. Answers depend on the seed and on their own request alone.

    Args:
        run: The opened run folder, which has a tokenizer.
        settings: How it answers.

    Attributes:
        caveats: Reasons why likelihoods are no bounds that can be compared, for the user.

    Raises:
        UserError: The run has no tokenizer.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.settings, self.tokenizer = run, settings, run.text_tokenizer()
        self.length = settings.length or int(run.report.data.length)
        self.caveats = [] if run.engine.process.caveat is None else [run.engine.process.caveat]
        end = self.tokenizer.end
        self._prefix = () if end is None else (end,)

    @classmethod
    def open(
        cls,
        path: Path,
        settings: Settings,
        *,
        device: str | None = None,
        weights: str = "newest",
        sampler: str | None = None,
        dtype: str | None = None,
    ) -> HarnessRun:
        """Open a run folder.

        Args:
            path: The run folder.
            settings: How it answers.
            device: Device of the network; None: the fastest one.
            weights: As of :func:`sedd_graph.runs.open.open_run`.
            sampler: Name of a sampler in place of the blueprint's, such as ``confidence``.
            dtype: Precision of the network (:func:`sedd_graph.runs.precision.choose_dtype`).
        """
        overrides = sample_overrides(path, sampler, [])
        run = open_run(path, overrides=overrides, device=device, compile="off", weights=weights)
        choose_dtype(run, dtype)
        return cls(run, settings)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Bound]:
        """Return the bounds on -log p of continuations given their contexts, which are never noised.

        The end-of-text token, if there is one, is the context of an empty context. White space at the end of a context
        belongs to the continuation, as in the harness.

        Args:
            pairs: Contexts and continuations.

        Raises:
            UserError: A text has characters that the model was not trained on, or the process holds no context.
        """
        rows = [windows(*self._pair(*pair), self.length) for pair in pairs]
        if any(row.context for own in rows for row in own):
            self._note_context()
        return self._scored(rows)

    def whole_likelihoods(self, texts: Sequence[str]) -> list[Bound]:
        """Return the bounds on -log p of texts of any length, in rows of which each token is counted once."""
        return self._scored([windows(self._prefix, self._encode(text), self.length) for text in texts])

    def _scored(self, rows: Sequence[Sequence[Scored]]) -> list[Bound]:
        settings, flat = self.settings, [row for own in rows for row in own]
        engine = self.run.engine
        found = iter(score(engine, flat, draws=settings.draws, seed=settings.seed, at_once=settings.rows))
        return [Bound.total(list(itertools.islice(found, len(own)))) for own in rows]

    def _note_context(self) -> None:
        """Add the reason to :attr:`caveats` if a context that is held clean is a heuristic under this process."""
        prompt = self._prompt("", 1)
        if not prompt.exact and prompt.how not in self.caveats:
            self.caveats.append(prompt.how)

    def greedy(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return whether the sampler at temperature 0 writes each continuation; all False without :attr:`Settings.greedy`."""
        found = [False] * len(pairs)
        if not self.settings.greedy:
            return found
        encoded = [self._pair(*pair) for pair in pairs]
        for size in sorted({len(tokens) for _, tokens in encoded if len(tokens) < self.length}):
            numbers = [i for i, (_, tokens) in enumerate(encoded) if len(tokens) == size]
            contexts = [self.tokenizer.decode(encoded[i][0][size - self.length :]) for i in numbers]
            steps = None if self.run.engine.process.steps is None else size
            for i, tokens in zip(numbers, self._sampled(contexts, size, steps=steps), strict=True):
                found[i] = tuple(tokens) == encoded[i][1]
        return found

    def texts(self, contexts: Sequence[str], how: Generation) -> list[str]:
        """Continue texts: a context, cut on the left if it is too long, and masks after it, which the sampler fills.

        Args:
            contexts: The contexts.
            how: Number of tokens, temperature, and where the new texts end.

        Returns:
            The new texts, without their contexts; they end before the end-of-text token, too.
        """
        prepared, sizes = list[str](), list[int]()
        for context in contexts:
            tokens = self._encode(context)
            size = min(how.tokens, max(self.length // 2, self.length - len(tokens), 1))
            kept = max(0, self.length - size)
            prepared.append(context if len(tokens) <= kept else self.tokenizer.decode(tokens[len(tokens) - kept :]))
            sizes.append(size)
        found, end = [""] * len(contexts), self.tokenizer.end
        with sampler_settings(self.run, temperature=how.temperature, top_p=how.top_p):
            for size in sorted(set(sizes)):
                numbers = [i for i, own in enumerate(sizes) if own == size]
                made = self._sampled([prepared[i] for i in numbers], size, steps=self.settings.steps, plain=False)
                for i, new in zip(numbers, made, strict=True):
                    text = new if end is None or end not in new else new[: new.index(end)]
                    found[i] = _until(self.tokenizer.decode(text), how.until)
        return found

    def _sampled(self, contexts: Sequence[str], size: int, *, steps: int | None, plain: bool = True) -> list[list[int]]:
        """Return ``size`` new tokens after each context, at temperature 0 if ``plain``."""
        prompts = [self._prompt(context, size) for context in contexts]
        request = SampleRequest(batch=1, length=1, steps=steps)
        with sampler_settings(self.run, temperature=0.0, top_p=1.0) if plain else contextlib.nullcontext():
            answers, _ = answer_prompts(
                self.run, prompts, request, samples=1, rows=self.settings.rows, seed=self.settings.seed
            )
        return [answer.tokens[~answer.given].tolist() for answer in answers]

    def _prompt(self, context: str, size: int) -> Prompt:
        length = len(self._encode(context)) + size
        return read_prompt(self.run, TextWithHoles(prefix=context, length=length), observed="clamp")

    def _encode(self, text: str) -> tuple[int, ...]:
        tokens = tuple(self.tokenizer.encode(text).tolist())
        if wrong := sorted(set(tokens) & set(self.tokenizer.forbidden)):
            raise UserError(
                f"the text {text[:60]!r} has characters that the model was not trained on (tokens {wrong[:3]}): take tasks "
                "whose texts the tokenizer covers, or a run with a byte-level tokenizer"
            )
        return tokens

    def _pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Encode a context and its continuation, which is encoded with the context before it."""
        bare = context.rstrip()
        if not bare:
            return self._prefix, self._some(self._encode(context + continuation), continuation)
        before, whole = self._encode(bare), self._encode(context + continuation)
        return whole[: len(before)], self._some(whole[len(before) :], continuation)

    def _some(self, tokens: tuple[int, ...], text: str) -> tuple[int, ...]:
        if not tokens:
            raise UserError(f"the continuation {text[:60]!r} has no tokens of its own after its context")
        return tokens


def _until(text: str, stops: Sequence[str]) -> str:
    """Return ``text`` up to the first of the texts ``stops`` in it."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
