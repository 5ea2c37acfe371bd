"""A pseudo-random order of 0..n-1 that needs no memory: each position is computed when asked for."""

from __future__ import annotations

import hashlib

ROUNDS = 6


class KeyedPermutation:
    """A bijection of range(n) chosen by `key`.

    A Feistel network over the next even number of bits, walked until it lands below n (cycle walking, Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"); fewer than four steps on average.
    """

    def __init__(self, n: int, key: str) -> None:
        if n <= 0:
            raise ValueError(f"a permutation of {n} elements")
        self.n = n
        self.half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half_bits) - 1
        # Hashed, as a key longer than 64 bytes would lose its end.
        self.keys = [hashlib.blake2b(f"{key}/{number}".encode()).digest() for number in range(ROUNDS)]

    def __call__(self, position: int) -> int:
        """Element at `position`, 0 <= position < n."""
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} outside 0..{self.n - 1}")
        while True:
            position = self._encrypt(position)
            if position < self.n:
                return position

    def _encrypt(self, value: int) -> int:
        left, right = value >> self.half_bits, value & self.mask
        for key in self.keys:
            digest = hashlib.blake2b(right.to_bytes(8, "little"), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & self.mask)
        return (left << self.half_bits) | right
