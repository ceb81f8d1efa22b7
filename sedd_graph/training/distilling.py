"""Distillation in the training loop: an engine whose loss compares its network with a teacher's, in rounds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.distillation import Distillable, Distillation, Networks, Outputs
from sedd_graph.engine.compiling import compile_in_place
from sedd_graph.engine.engine import Engine, TrainedModule
from sedd_graph.engine.network import CompileMode
from sedd_graph.engine.regions import Model

__all__ = ["Distiller", "Helpers"]


class Helpers(nn.Module):
    """Networks beside the student, and the number of the round; a checkpoint stores them.

    Attributes:
        teacher: The frozen network that the student is compared with.
        follower: The network that is trained on the student's samples; None if the objective has none.
        round: Number of the round, from 0, int64 [].
    """

    round: Tensor

    def __init__(self, model: Model, *, follows: bool) -> None:
        super().__init__()
        self.teacher: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.follower: Model | None = copy.deepcopy(model) if follows else None
        self.register_buffer("round", torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device))

    def train(self, mode: bool = True) -> Helpers:
        super().train(mode)
        self.teacher.eval()
        return self


class _Loss:
    """Distillation loss of a student, in place of the process's."""

    def __init__(self, helpers: Helpers, objective: Distillation, process: Distillable) -> None:
        self._helpers, self._objective, self._process = helpers, objective, process

    def loss(self, model: Model, draw: Any, batch: Any, key: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the distillation loss of each row, [b], and return it with the saved activations of the student."""
        saved: dict[str, Tensor] = {}
        process, helpers = self._process, self._helpers

        def student(at: Any, rows: Any) -> Outputs:
            outputs, found = process.run(model, at, rows, key)
            saved.update(found)
            return outputs

        def teacher(at: Any, rows: Any) -> Outputs:
            with torch.no_grad():
                return process.run(helpers.teacher, at, rows, None)[0]

        def follower(at: Any, rows: Any) -> Outputs:
            return process.run(helpers.follower, at, rows, None)[0]

        networks = Networks(student, teacher, None if helpers.follower is None else follower)
        return self._objective.loss(process, networks, draw, batch), saved


class Distiller(Engine):
    """An engine that is trained against a teacher, at first a copy of its own network.

    Args:
        engine: The student, with the weights of the given run, not compiled yet.
        objective: The distillation objective.
        process: What the student's process gives to it.
    """

    loss_unit = "nats of divergence"

    def __init__(self, engine: Engine, objective: Distillation, process: Distillable) -> None:
        super().__init__(engine.network, engine.process)
        self.objective, self._distillable = objective, process
        self._helpers = Helpers(engine.model, follows=objective.follows)
        self.helpers = self._helpers
        self.trained = TrainedModule(engine.model, _Loss(self._helpers, objective, process), self._helpers)

    @property
    def number(self) -> int:
        """Number of the round, from 0."""
        return int(self._helpers.round)

    def compile(self, mode: CompileMode, *, everywhere: bool | None = None) -> None:
        # networks are compiled block by block: the loss evaluates several, at positions that change from step to step
        self.network.compile(mode if mode in ("off", "auto") else "block", None, everywhere=everywhere)
        if self.compile_mode != "off":
            for helper in (self._helpers.teacher, self._helpers.follower):
                for block in () if helper is None else helper.branches():
                    compile_in_place(block, getattr(block, "share", 1.0))

    def draw(self, batch: Any, *, random: Randomness) -> Any:
        return self.objective.draw(self._distillable, batch, self.number, random)

    def begin_step(self, share: float, averaged: Callable[[], AbstractContextManager[None]]) -> str | None:
        rounds = self.objective.rounds
        if (due := min(rounds - 1, int(share * rounds))) <= self.number:
            return None
        teacher = self._helpers.teacher.state_dict()
        with averaged(), torch.no_grad():
            for name, value in self.model.state_dict().items():
                teacher[name].copy_(value)
        self._helpers.round.fill_(due)
        return f"round {due + 1} of {rounds}: the student is the teacher now; {self.objective.describe_round(due)}"
