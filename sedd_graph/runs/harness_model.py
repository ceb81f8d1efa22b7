"""The model class of lm-evaluation-harness (extra ``lm-eval``), and the harness's command line with it.

Written for version 0.4 of the harness, which finds no models of other packages by itself: importing
this module registers the model.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from sedd_graph.errors import UserError
from sedd_graph.evaluation.sequences import Bound
from sedd_graph.runs.harness import Generation, HarnessRun, Settings

__all__ = ["SeddGraphLM", "harness_main"]

NAME = "sedd_graph"
"""Name of the model in the harness."""
_log = logging.getLogger(__name__)


@register_model(NAME)
class SeddGraphLM(LM):  # type: ignore[misc]  # the harness has no type annotations that mypy reads
    """A run folder as a model of lm-evaluation-harness: ``--model sedd_graph --model_args run=RUN``.

    Log-likelihoods are minus the upper bounds on -log p (:class:`~sedd_graph.runs.harness.HarnessRun`).

    Args:
        run: The run folder.
        batch_size: Largest number of rows that are evaluated or sampled at a time; ``auto``: 32.
        max_batch_size: Not used.
        device: Device of the network; None: the fastest one.
        draws: As of :class:`~sedd_graph.runs.harness.Settings`, and ``seed``, ``length``, ``steps`` and ``greedy``, too.
        seed: Seed of all noise.
        length: Largest number of tokens of a row.
        steps: Steps of the sampler.
        greedy: Whether ``is_greedy`` is computed, by the sampler at temperature 0.
        sampler: As of :meth:`HarnessRun.open`, and ``weights`` and ``dtype``, too.
        weights: Weights of the run.
        dtype: Precision of the network.
        details: File that receives a line of JSON for each likelihood: nats, standard error and number of tokens.
    """

    def __init__(
        self,
        run: str,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        draws: int = 8,
        seed: int = 0,
        length: int | None = None,
        steps: int | None = None,
        greedy: bool = False,
        sampler: str | None = None,
        weights: str = "newest",
        dtype: str | None = None,
        details: str | None = None,
    ) -> None:
        super().__init__()
        rows = 32 if batch_size is None or str(batch_size).startswith("auto") else batch_size
        try:
            size = int(rows)
        except ValueError:
            raise UserError(f"batch_size must be a whole number or 'auto', not {batch_size!r}") from None
        settings = Settings(draws=draws, seed=seed, rows=size, length=length, steps=steps, greedy=bool(greedy))
        self.details = None if details is None else Path(details)
        if self.details is not None and self.details.exists():
            raise UserError(f"{self.details} exists already; choose another name")
        self.model = HarnessRun.open(Path(run), settings, device=device, weights=weights, sampler=sampler, dtype=dtype)
        self._device = self.model.run.engine.device
        self._bounds = list[Bound]()

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer for the harness's caches: the digest of the run."""
        return f"{NAME}-{self.model.run.digest}"

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return minus the bound of each continuation given its context, and whether it is greedy."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        bounds, greedy = self.model.likelihoods(pairs), self.model.greedy(pairs)
        found = [(-bound.nats, same) for bound, same in zip(bounds, greedy, strict=True)]
        self._report("loglikelihood", bounds)
        for pair, answer in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return minus the bound of each text."""
        texts = [str(request.args[0]) for request in requests]
        bounds = self.model.whole_likelihoods(texts)
        self._report("loglikelihood_rolling", bounds)
        for text, bound in zip(texts, bounds, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), -bound.nats)
        return [-bound.nats for bound in bounds]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return texts that continue the contexts, up to a stop string; without ``do_sample`` at temperature 0."""
        found = [""] * len(requests)
        groups = dict[Generation, list[int]]()
        for number, request in enumerate(requests):
            groups.setdefault(_generation(request.args[1]), []).append(number)
        for how, numbers in groups.items():
            texts = self.model.texts([str(requests[i].args[0]) for i in numbers], how)
            for i, text in zip(numbers, texts, strict=True):
                found[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _report(self, kind: str, bounds: Sequence[Bound]) -> None:
        """Log the mean of the bounds with its error by the noise, and write the details."""
        self._bounds += bounds
        value, error = _mean(bounds)
        _log.info("%s: %d requests, %.4f +- %.4f nats per token (error by the noise)", kind, len(bounds), value, error)
        for caveat in self.model.caveats:
            _log.warning("%s", caveat)
        if self.details is not None:
            with self.details.open("a", encoding="utf-8") as stream:
                for bound in bounds:
                    stream.write(json.dumps({"kind": kind, **bound._asdict()}) + "\n")

    def get_model_info(self) -> dict[str, Any]:
        """Return facts for the harness's record: run, weights, settings, and the error of the likelihoods by the noise."""
        run, settings = self.model.run, self.model.settings
        found: dict[str, Any] = {
            "run": run.digest,
            "weights": run.weights,
            "draws": settings.draws,
            "noise_seed": settings.seed,
            "row_length": self.model.length,
            "likelihood": "minus an upper bound on -log p",
            "caveats": list(self.model.caveats),
            "sampler": run.plan.sampler_op,
        }
        if self._bounds:
            value, error = _mean(self._bounds)
            found |= {"bound_nats_per_token": value, "bound_noise_error": None if math.isnan(error) else error}
        return found


def _mean(bounds: Sequence[Bound]) -> tuple[float, float]:
    """Return the nats per token of several bounds, and the standard error by the noise."""
    total = Bound.total(bounds)
    count = max(1, total.tokens)
    return total.nats / count, total.standard_error / count


def _generation(settings: dict[str, Any]) -> Generation:
    known = normalize_gen_kwargs(dict(settings))
    until = known.get("until") or []
    return Generation(
        tokens=max(1, int(known["max_gen_toks"])),
        temperature=float(known.get("temperature", 0.0)),
        top_p=float(known.get("top_p", 1.0)),
        until=tuple([until] if isinstance(until, str) else until),
    )


def harness_main(words: Sequence[str]) -> None:
    """Run the harness's command line with this model.

    Args:
        words: Its arguments; ``--model sedd_graph`` is added where no model is named.
    """
    own = list(words)
    if not own or own[0] not in ("run", "ls", "validate"):
        own.insert(0, "run")
    named = any(word in ("--model", "-M") or word.startswith("--model=") for word in own)
    if own[0] == "run" and not named:
        own[1:1] = ["--model", NAME]
    before = sys.argv
    sys.argv = ["lm-eval", *own]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
