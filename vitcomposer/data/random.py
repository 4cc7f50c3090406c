"""Derives the keys of all random draws from seed, epoch and sample, never from worker or rank."""

_MASK64 = (1 << 64) - 1
_SAMPLE, _MIXING = 0, 1  # separate streams: the first sample of a batch must not share its numbers with the mixing


def view_seed(seed: int, epoch: int, sample_id: int, copy: int) -> int:
    """Of all draws that make a view of a sample."""
    return random_key(seed, epoch, sample_id, copy, _SAMPLE)


def random_key(*parts: int) -> int:
    """One 64-bit seed out of several integers: splitmix64 folded over them, so that their order matters."""
    state = 0
    for part in parts:
        state = ((state ^ int(part)) + 0x9E3779B97F4A7C15) & _MASK64  # int(): numpy's overflow
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state
