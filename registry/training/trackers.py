"""Experiment trackers: TensorBoard, trackio and Weights & Biases.

The packages of the trackers are optional dependencies, which are imported when a run starts.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.data.network import unreachable
from sedd_graph.errors import EnvironmentFault
from sedd_graph.inputs.confine import require_inside
from sedd_graph.training.interfaces import Tracker


class TensorBoard(Tracker, kind="tracker"):
    """TensorBoard tracker, which writes event files to the folder ``tensorboard`` of the run."""

    package = "tensorboard"

    class Config(ComponentConfig):
        pass

    def start(self, run: Path, name: str) -> None:
        require_inside(run, "tensorboard")
        self._folder = str(run / "tensorboard")
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(self._folder, purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def resume(self, step: int) -> None:
        self._writer.close()
        self._open(step + 1)  # tensorboard ignores older events from this step on

    def close(self) -> None:
        self._writer.close()


class _Service(Tracker):
    """Base class of trackers whose package has run objects with methods ``log`` and ``finish``."""

    abstract = True
    _run: Any

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(_Service, kind="tracker"):
    """Tracker trackio, whose dashboard shows all runs of a blueprint.

    Its files are in the folder that the environment variable ``TRACKIO_DIR`` names, by default in
    ``~/.cache/huggingface/trackio``.
    """

    package = "trackio"

    class Config(ComponentConfig):
        pass

    def start(self, run: Path, name: str) -> None:
        self._module = importlib.import_module("trackio")
        self._run = self._module.init(project=name, name=run.name)

    def close(self) -> None:
        self._module.finish()


class Wandb(_Service, kind="tracker"):
    """Weights & Biases tracker; its files are in the run folder.

    It is configured by ``wandb login`` or the environment variable ``WANDB_MODE``.
    """

    package = "wandb"

    class Config(ComponentConfig):
        pass

    def start(self, run: Path, name: str) -> None:
        for folder in ("wandb", ".wandb"):  # the package uses the second if it exists
            require_inside(run, folder)
        module = importlib.import_module("wandb")
        settings = module.setup().settings
        # without a network the package would retry for a minute and a half
        if settings.mode == "online" and (reason := unreachable(settings.base_url)) is not None:
            raise EnvironmentFault(
                f"{settings.base_url} cannot be reached ({reason}); set WANDB_MODE=offline to log to the run folder, and "
                "upload it later with `wandb sync`"
            )
        self._run = module.init(project=name, name=run.name, dir=str(run))
