"""Samples, infilled text, quality records and the film of a run folder, as data for the report's template."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from markupsafe import Markup

from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.evaluation.record import QUALITY, SHOWN, format_number, format_sampling
from sedd_graph.report.curves import scatter
from sedd_graph.report.facts import as_object, json_lines
from sedd_graph.report.film import film_data
from sedd_graph.store.arrays import array_of, stores

__all__ = ["film", "newest_infilled", "newest_samples", "quality"]

TEXTS, POINTS = 8, 2000
"""Number of texts, and number of points of a scatter plot, that are shown."""


class Samples(NamedTuple):
    """Samples of one store: ``facts`` tells how they were drawn; a scatter plot (of points) or texts."""

    facts: str
    figure: Markup
    texts: list[str]


class Infilled(NamedTuple):
    """Infilled texts as pieces, each with whether the model wrote it."""

    facts: str
    texts: list[list[tuple[bool, str]]]


class Film(NamedTuple):
    """The trajectory of the first row of ``store``, see :func:`~sedd_graph.report.film.film_data`."""

    store: str
    data: dict[str, Any]


class Quality(NamedTuple):
    """One record of ``quality.jsonl``; a row is a label and the numbers of samples and of held-out text."""

    store: str
    protocol: str
    rows: list[tuple[str, str, str]]


def _facts(group: zarr.Group, store: Path) -> str:
    known = [f"{k} {group.attrs[k]}" for k in ("sampler", "steps", "seed", "weights") if k in group.attrs]
    return ", ".join([*known, store.name])


def newest_samples(run: Path) -> Samples | None:
    """Return the newest samples, if there are any."""
    for store in stores(run, "samples")[:1]:
        group = zarr.open_group(str(store), mode="r")
        if "x" in group:
            return Samples(_facts(group, store), scatter(np.asarray(array_of(group, "x")[:POINTS])), [])
        return Samples(_facts(group, store), Markup(), np.asarray(array_of(group, "text")[:TEXTS]).tolist())
    return None


def newest_infilled(run: Path, tokenizer: Tokenizer | None) -> Infilled | None:
    """Return the newest infilled texts. None if there are none, or no tokenizer to decode their pieces with."""
    for store in stores(run, "infilled")[:1]:
        group = zarr.open_group(str(store), mode="r")
        prompts = group.attrs.get("prompt")
        if tokenizer is None or not isinstance(prompts, list):
            return None
        free = np.asarray(prompts)[0] < 0
        cuts = [0, *(np.flatnonzero(np.diff(free)) + 1).tolist(), len(free)]
        rows = np.asarray(array_of(group, "tokens")[:4])
        texts = [[(bool(free[a]), tokenizer.decode(row[a:b].tolist())) for a, b in pairwise(cuts)] for row in rows]
        return Infilled(_facts(group, store), texts)
    return None


def film(run: Path, tokenizer: Tokenizer | None) -> Film | None:
    """Return the film of the newest samples that have a trajectory. None without such samples or without a tokenizer."""
    for store in stores(run, "samples") if tokenizer is not None else []:
        group = zarr.open_group(str(store), mode="r")
        if tokenizer is not None and "trajectory" in group:
            mask = group.attrs.get("mask")
            frames = np.asarray(array_of(group, "trajectory")[:, 0], dtype=np.int64)
            return Film(store.name, film_data(frames, tokenizer, mask=mask if isinstance(mask, int) else None))
    return None


def quality(run: Path) -> list[Quality]:
    """Return the records of ``quality.jsonl``, the newest first, each with the numbers that it has."""
    found = []
    for record in reversed(json_lines(run / QUALITY)):
        judge, how = as_object(record.get("judge")), as_object(as_object(record.get("protocol")).get("sampling"))
        judged = f"judge {judge.get('name')} ({str(judge.get('sha256'))[:8]})" if judge else "no judge"
        sides = [as_object(record.get(side)) for side in ("samples", "reference")]
        rows = []
        for key, label in SHOWN.items():
            samples, reference = (format_number(side, key).replace("+-", "±") for side in sides)
            if (samples, reference) != ("-", "-"):
                rows.append((label, samples, reference))
        found.append(Quality(str(record.get("store")), f"{format_sampling(how)}; {judged}", rows))
    return found
