"""Inversion of regions of the graph: inversion rules of components in, an inverse program or a diagnosis out. No torch.

:func:`solve` is the entry point; :mod:`sedd_graph.inverse.program` defines its results. Inside, in order: ``flat`` (blocks
flattened), ``system`` (edges and linear relations), ``propagate`` (values that follow from known ones), ``linear`` and
``contraction`` (beyond propagation), ``extract`` (the needed part, whole blocks where possible), ``level`` (the proved
level), ``diagnose``, ``reasons`` and ``cheapest`` (regions that are not invertible), ``claims`` (all claims of a graph) and
``format`` (text).
"""

from sedd_graph.inverse.program import Contraction, Derivation, Forward, Linear, Program, Refusal, Solve
from sedd_graph.inverse.solve import solve

__all__ = ["Contraction", "Derivation", "Forward", "Linear", "Program", "Refusal", "Solve", "solve"]
