"""Stable API for plugins: the names that third-party code may import from ``sedd_graph``.

Everything else in ``sedd_graph`` may change without notice. Components of :mod:`sedd_graph_registry`, such as
``Absorb`` and ``Interpolating``, may be subclassed too, if a package of the registry lists them in ``__all__``.
Importing this package imports torch.
"""

from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.check import Check
from sedd_graph.component.contract import Algebra, Port, Rule, Signature, SizeField
from sedd_graph.component.counter_rng import dropout
from sedd_graph.component.exported import exported_as
from sedd_graph.component.outputs import LOG_SCORE, LOG_X0, TOKEN_LOGITS, VECTOR_X0, Input, Output
from sedd_graph.data.sources import Corpus, Document, PointSource
from sedd_graph.data.tokenizer import Tokenizer, TokenizerFactory
from sedd_graph.diffusion.batch import Batch, Draw, PointBatch, Randomness
from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.codes.nearest import Codebook, least_distance, nearest
from sedd_graph.diffusion.distillation import Distillable, Distillation, Networks, Pair
from sedd_graph.diffusion.likelihood import Likelihood
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.edit_flow import EditFlowKernel
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.diffusion.strings.flexmdm import FlexKernel
from sedd_graph.diffusion.strings.kernel import StringDraw, StringKernel, StringObjective, StringTable
from sedd_graph.diffusion.strings.sampler import StringSampler, StringWalk
from sedd_graph.diffusion.strings.strings import Strings, rebuild
from sedd_graph.diffusion.tokens.classifier import ClassifierConfig, NoisyClassifier
from sedd_graph.diffusion.tokens.kernel import Kernel, Replacement
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective
from sedd_graph.diffusion.tokens.sampler import PositionsConfig, Sampler, StepSampler, StepsConfig
from sedd_graph.diffusion.tokens.step_kernel import StepKernel
from sedd_graph.diffusion.tokens.walk import SamplerConfig, Walk
from sedd_graph.diffusion.vectors.classifier import VectorClassifier, VectorClassifierConfig
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel, VectorKernelConfig
from sedd_graph.diffusion.vectors.objective import VectorDraw, VectorObjective
from sedd_graph.diffusion.vectors.sampler import VectorSampler, VectorSamplerConfig, VectorWalk
from sedd_graph.diffusion.visibility import with_blocks
from sedd_graph.errors import UserError
from sedd_graph.training.interfaces import Adapter, LRSchedule, OptimizerFactory, Tracker

__all__ = [
    "LOG_SCORE",
    "LOG_X0",
    "TOKEN_LOGITS",
    "VECTOR_X0",
    "Adapter",
    "Algebra",
    "Batch",
    "BirthDeath",
    "Check",
    "ClassifierConfig",
    "Code",
    "Codebook",
    "Component",
    "ComponentConfig",
    "Context",
    "Corpus",
    "Denoiser",
    "Distillable",
    "Distillation",
    "Document",
    "Draw",
    "DrawRequest",
    "EditFlowKernel",
    "Estimate",
    "Fates",
    "FlexKernel",
    "Input",
    "Kernel",
    "LRSchedule",
    "Likelihood",
    "Networks",
    "NoisyClassifier",
    "Objective",
    "OptimizerFactory",
    "Output",
    "Pair",
    "PointBatch",
    "PointSource",
    "Port",
    "PortType",
    "PositionsConfig",
    "Randomness",
    "Replacement",
    "Rule",
    "Sampler",
    "SamplerConfig",
    "Schedule",
    "Signature",
    "SizeField",
    "StepKernel",
    "StepSampler",
    "StepsConfig",
    "StringDraw",
    "StringKernel",
    "StringObjective",
    "StringSampler",
    "StringTable",
    "StringWalk",
    "Strings",
    "Tokenizer",
    "TokenizerFactory",
    "Tracker",
    "UserError",
    "VectorClassifier",
    "VectorClassifierConfig",
    "VectorDraw",
    "VectorKernel",
    "VectorKernelConfig",
    "VectorObjective",
    "VectorSampler",
    "VectorSamplerConfig",
    "VectorWalk",
    "Walk",
    "categorical",
    "dropout",
    "exported_as",
    "full_precision",
    "least_distance",
    "nearest",
    "parse_port_type",
    "rebuild",
    "solves",
    "with_blocks",
]
