"""Small served models with random weights, and their web application in this process."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from sedd_graph.report.serve import serve_page
from sedd_graph.runs.serve.app import Service
from sedd_graph.runs.serve.model import ServedModel
from sedd_graph.runs.serve.wire import Limits
from tests.runs.unproved import built

__all__ = ["client", "events", "limited", "model_of"]


def model_of(folder: Path, name: str, *overrides: str) -> ServedModel:
    """A shipped blueprint with a small network of random weights, served under the name ``tiny``."""
    return ServedModel(built(folder, name, *overrides), name="tiny", limits=Limits(length=64))


def limited(model: ServedModel, **limits: Any) -> ServedModel:
    """The same model with other limits."""
    found = copy.copy(model)
    found.limits = dataclasses.replace(model.limits, **limits)
    return found


@contextmanager
def client(model: ServedModel, **options: Any) -> Iterator[TestClient]:
    """A client of the application, whose sampling thread runs."""
    with TestClient(Service(model, page=serve_page(model.name), **options).app, base_url="http://localhost") as found:
        yield found


def events(text: str) -> list[Any]:
    """The events of a stream, without the last one, which must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
