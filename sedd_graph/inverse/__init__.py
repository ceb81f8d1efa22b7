"""Symbolic derivation of the inverse of a graph region from the inversion rules of its components. No torch.

:func:`solve` is the entry point: it returns an inverse program, or a diagnosis if the region is not invertible.
:mod:`sedd_graph.inverse.program` defines both results. The other modules, in order of use:

- ``flat``: regions with nested blocks flattened to a list of components.
- ``system``: ways to derive one value from others (edges), and linear relations among values.
- ``propagate``: derivation of all values that follow from the known ones.
- ``linear`` and ``contraction``: joint solution of linear relations, and fixed-point iterations, where propagation
  stops.
- ``extract``: selection of the derivations that the inverse needs.
- ``level``: proof of how strongly the region is invertible, such as bijective.
- ``rows``: verification that the log-determinant is one number for each row of a batch.
- ``diagnose``, ``reasons`` and ``cheapest``: diagnosis of regions that are not invertible.
- ``claims``: verification of all invertibility claims of a graph.
- ``format``: conversion of results to text.
"""

from sedd_graph.inverse.program import Contraction, Derivation, Forward, Linear, Program, Refusal, Solve
from sedd_graph.inverse.solve import solve

__all__ = ["Contraction", "Derivation", "Forward", "Linear", "Program", "Refusal", "Solve", "solve"]
