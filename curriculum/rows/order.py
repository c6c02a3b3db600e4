"""Pseudo-random orders of numbered things that are the same on every machine and in every version of numpy."""

import numpy as np


def mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit hash of each number, [n] uint64: SplitMix64 (Steele, Lea, Flood 2014), a bijection for each seed."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1, [count] int64, for this seed. Costs 16 bytes a number."""
    return np.argsort(mixed(mixed(np.arange(count), seed), seed + 1), kind="stable")
