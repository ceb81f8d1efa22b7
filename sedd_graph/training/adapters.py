"""Frozen and adapted parameters of a network: those of its parameters that training changes, and merged adapters.

An adapter is a parametrization of torch (``torch.nn.utils.parametrize``): the parameter ``x.weight`` becomes
``x.parametrizations.weight.original``, and the trained ones are ``x.parametrizations.weight.0.*``. Plain names are those
without adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sedd_graph.engine.seeds import mix_seed
from sedd_graph.engine.shard_init import ShardInit
from sedd_graph.errors import UserError
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.interfaces import Adapter
from sedd_graph.training.name_patterns import chosen
from sedd_graph.training.weights import check_tensors, load_weights

__all__ = ["choose_trained", "count_trained", "load_plain", "merge", "plain_parameters", "plain_tensors"]

_ORIGINAL = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)\.original")
_MARK = "is_adapter_of_training"


def choose_trained(model: nn.Module, config: TrainConfig, part: ShardInit | None = None) -> None:
    """Freeze the parameters that ``train.freeze`` names, and adapt the matrices that ``train.adapters`` name, in place.

    The value of an adapted matrix is frozen. At first the network computes what it did before.

    Args:
        model: The module of the network, with learned parts of the process.
        config: The ``train`` section of the blueprint.
        part: Part of the parameters that this process holds, of a model that will be sharded; None for all.

    Raises:
        UserError: A pattern matches no parameter, two adapters name one matrix, or no parameter is left to train.
    """
    if not (config.freeze or config.adapters):
        return
    parameters = dict(model.named_parameters())
    frozen = chosen(config.freeze, parameters, key="train.freeze")
    for name in frozen:
        parameters[name].requires_grad_(False)
    for index, adapter in enumerate(config.adapters):
        _adapt(model, adapter, part, seed=mix_seed(config.seed, 3, index), key=f"train.adapters.{index}")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("train.freeze: every parameter is frozen, so there is nothing to train")


def _adapt(model: nn.Module, adapter: Adapter, part: ShardInit | None, *, seed: int, key: str) -> None:
    modules = dict(model.named_modules())
    every = plain_parameters(model)
    matrices = {name: p for name, p in every.items() if p.dim() == 2}
    names = chosen(adapter.patterns, every, key=f"{key}.weights") & matrices.keys()
    if not names:
        raise UserError(f"{key}.weights: {', '.join(adapter.patterns)} match no matrix, which an adapter needs")
    with torch.random.fork_rng(devices=[]):
        for number, name in enumerate(sorted(names)):
            path, _, attribute = name.rpartition(".")
            module = modules[path]
            if parametrize.is_parametrized(module, attribute):
                raise UserError(f"{key}: {name} is adapted already")
            torch.manual_seed(mix_seed(seed, number))
            matrix = matrices[name]
            # of a model that will be sharded, the values are elsewhere
            like = (
                matrix.detach().to("cpu" if matrix.is_cuda else matrix.device)
                if part is None
                else torch.zeros(matrix.shape)
            )
            try:
                made = adapter.make(like)
            except ValueError as error:
                raise UserError(f"{key}: {name}: {error}") from None
            setattr(made, _MARK, True)
            if part is None:
                made.to(matrix.device)
            else:
                part.take(made)
            parametrize.register_parametrization(module, attribute, made)
            matrix.requires_grad_(False)


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the path, the module and the name of each adapted matrix."""
    for path, module in model.named_modules():
        found = module._modules.get("parametrizations")
        if isinstance(found, nn.ModuleDict):
            for attribute, entries in found.items():
                if isinstance(entries, parametrize.ParametrizationList) and getattr(entries[0], _MARK, False):
                    yield path, module, attribute


def merge(model: nn.Module) -> None:
    """Replace each adapted matrix by its value, in place, so that names and shapes are those without adapters."""
    for _, module, attribute in list(_adapted(model)):
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a network by their plain names, those of adapters left out."""
    names = _plain_names(model)
    return {names[name]: p for name, p in model.named_parameters() if name in names}


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network by plain names, those of adapters left out; of an adapted matrix the frozen value."""
    names = _plain_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}


def _plain_names(model: nn.Module) -> dict[str, str]:
    """Return plain names by names of the state dict."""
    own = {f"{path}.parametrizations.{attribute}." if path else f"parametrizations.{attribute}." for path, _, attribute in _adapted(model)}  # fmt: skip
    names = {}
    for name in model.state_dict():
        prefix = next((p for p in own if name.startswith(p)), None) if own else None
        if prefix is None:
            names[name] = name
        elif (parts := _ORIGINAL.fullmatch(name)) is not None:
            names[name] = f"{parts[1]}.{parts[2]}" if parts[1] else parts[2]
    return names


def load_plain(model: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Load weights by plain names, such as those of an import or of the start of a run; or by names with adapters.

    Args:
        model: The module of the network.
        weights: Parameters and buffers by name.
        where: Name of the file that they come from, for messages.

    Raises:
        DamagedError: Names, shapes or dtypes differ from those of ``model``, or a value is not finite.
    """
    plain = plain_tensors(model)
    if weights.keys() != plain.keys():
        load_weights(model, weights, where=where)
        return
    check_tensors(
        weights, plain, where=where, finite=dict(model.named_parameters()).keys() | plain_parameters(model).keys()
    )
    with torch.no_grad():
        for name, target in plain.items():
            target.copy_(weights[name])


def count_trained(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Return the numbers of trained and of frozen parameters."""
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) - trained
