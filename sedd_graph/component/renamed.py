"""Names that changed, for messages that refuse an old name and give the new one. No torch."""

from __future__ import annotations

__all__ = ["KINDS", "LR_SCHEDULES", "OPS"]

OPS = {
    "edit_first_hitting": "string_first_hitting",
    "edit_tau": "string_tau",
    "edit_thinning": "string_thinning",
}
"""New names of ops, by old name."""
KINDS = {
    "edit_kernel": "string_kernel",
    "edit_objective": "string_objective",
    "edit_sampler": "string_sampler",
}
"""New names of kinds, by old name."""
LR_SCHEDULES = {"cosine": "cosine_decay", "linear": "linear_decay"}
"""New names of learning-rate schedules, by old name; components of other kinds still have the old names."""
