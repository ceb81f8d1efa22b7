"""How a region of the graph is undone: rules of components in, the inverse as a program out, or the reason why not.

No torch here. :func:`solve` is the door; :mod:`sedd_graph.inverse.program` is what comes out of it. Inside, in order:
``flat`` (blocks laid flat), ``closure`` (what follows from the facts), ``linear`` and ``contraction`` (what propagation
alone cannot do), ``extract`` (the part that is wanted, blocks folded), ``volume`` (the level reached), ``diagnose`` and
``cheapest`` (where it fails), ``claims`` (all that a blueprint says of itself).
"""

from sedd_graph.inverse.program import Contraction, Derivation, Forward, Linear, Program, Refusal, Solve
from sedd_graph.inverse.solve import solve

__all__ = ["Contraction", "Derivation", "Forward", "Linear", "Program", "Refusal", "Solve", "solve"]
