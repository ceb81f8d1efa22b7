"""A plugin with one component of each kind of the data and training sections."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.sources import Corpus, Document, Numbers, PointSource
from sedd_graph.data.tokenizer import Ids, Tokenizer, TokenizerFactory
from sedd_graph.training.interfaces import LRSchedule, OptimizerFactory, Tracker

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Alphabet(Corpus, kind="corpus"):
    """The letters a to e, over and over."""

    records = False

    class Config(ComponentConfig):
        copies: int = 200
        """Number of copies."""

    config: Config

    def documents(self, root: Path) -> Iterator[Document]:
        yield Document("abcde" * self.config.copies)


class Moved(Tokenizer):
    size, pad, forbidden = 257, 256, (256,)

    def encode(self, text: str) -> Ids:
        return np.array([(ord(c) + 1) % 256 for c in text], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr((i - 1) % 256) for i in ids if i < 256)

    def pieces(self) -> list[bytes | None]:
        return [*(bytes([(i - 1) % 256]) for i in range(256)), None]

    def to_json(self) -> str:
        return json.dumps({"kind": "moved"})


class MovedFactory(TokenizerFactory, kind="tokenizer"):
    """One token per Latin-1 character, moved by one."""

    class Config(ComponentConfig):
        pass

    size = 257

    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        return Moved()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        return Moved()


class Ring(PointSource, kind="points"):
    """Points on the unit circle."""

    class Config(ComponentConfig):
        pass

    def points(self, root: Path, generator: np.random.Generator) -> Numbers:
        angle = generator.uniform(0, 2 * np.pi, 100)
        return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


class SGD(OptimizerFactory, kind="optimizer"):
    """Plain gradient descent."""

    class Config(ComponentConfig):
        lr: float = 1e-2
        """Peak learning rate."""

    config: Config

    def make(self, parameters: "Mapping[str, nn.Parameter]") -> "list[Optimizer]":
        import torch

        return [torch.optim.SGD(list(parameters.values()), lr=self.config.lr)]


class Halving(LRSchedule, kind="lr_schedule"):
    """Half of the peak from the middle of the run on."""

    class Config(ComponentConfig):
        pass

    def share(self, progress: float) -> float:
        return 1.0 if progress < 0.5 else 0.5


class CsvLog(Tracker, kind="tracker"):
    """Losses in a CSV file of the run folder."""

    class Config(ComponentConfig):
        name: str = "losses.csv"
        """File name."""

    config: Config

    def start(self, run: Path, name: str) -> None:
        self._path = run / self.config.name

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "loss" in metrics:
            with self._path.open("a") as stream:
                stream.write(f"{step},{metrics['loss']},{metrics['learning_rate']}\n")
