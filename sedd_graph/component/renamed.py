"""Names that changed. An old name is refused with the new one in the message. No torch."""

from __future__ import annotations

__all__ = ["KINDS", "LR_SCHEDULES", "OPS"]

OPS = {
    "edit_first_hitting": "string_first_hitting",
    "edit_tau": "string_tau",
    "edit_thinning": "string_thinning",
}
"""Ops, by old name."""
KINDS = {
    "edit_kernel": "string_kernel",
    "edit_objective": "string_objective",
    "edit_sampler": "string_sampler",
}
"""Kinds, by old name."""
LR_SCHEDULES = {"cosine": "cosine_decay", "linear": "linear_decay"}
"""Old names under ``train.schedule``; elsewhere they are components of other kinds."""
