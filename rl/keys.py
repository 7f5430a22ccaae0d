"""Counter-based randomness: every draw is a pure function of its key.

No draw reads or moves a global generator, so results do not depend on call order, on how a batch is split, on how
many workers there are, or on whether the run was resumed.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

Key = int | str


def generator(*key: Key) -> np.random.Generator:
    """A Philox generator whose stream depends on `key` alone.

    Example: `generator(seed, "mask", step, uid)`.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    digest = blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniform(shape: tuple[int, ...], *key: Key) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, of the given shape."""
    return generator(*key).random(shape)


def integer_seed(*key: Key) -> int:
    """A 63-bit seed for code that seeds a generator of its own (weight initialisation)."""
    return int(generator(*key).integers(0, 2**63 - 1))
