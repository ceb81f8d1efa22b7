"""Tables from old to new names of components, kinds of components (such as ``sampler``) and learning-rate schedules.

Error messages about an old name suggest the new one. Imports no torch.
"""

from __future__ import annotations

__all__ = ["KINDS", "LR_SCHEDULES", "OPS"]

OPS = {
    "edit_first_hitting": "string_first_hitting",
    "edit_tau": "string_tau",
    "edit_thinning": "string_thinning",
}
"""New names of components, by old name."""
KINDS = {
    "edit_kernel": "string_kernel",
    "edit_objective": "string_objective",
    "edit_sampler": "string_sampler",
}
"""New names of component kinds, by old name."""
LR_SCHEDULES = {"cosine": "cosine_decay", "linear": "linear_decay"}
"""New names of learning-rate schedules, by old name. Noise schedules still have the old names, so this table is
separate."""
