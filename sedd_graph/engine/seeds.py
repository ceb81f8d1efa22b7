"""Seeds of independent random streams."""

__all__ = ["mix_seed"]


def mix_seed(*parts: int) -> int:
    """Hash integers to one 63-bit seed (splitmix64), so that consecutive integers give independent random streams."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
