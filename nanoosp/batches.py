"""How many sequences are computed at once, where nobody says it: a question of memory alone."""


def windows_at_once(n_tokens: int) -> int:
    """As many sequences of n_tokens as have 4,096 tokens together, which fits on small machines."""
    return max(1, 4096 // n_tokens)
