"""Named streams of random numbers from one seed.

What a stream gives depends on the seed and its name alone, so whoever draws from another one changes nothing
here: adding a client to a workload leaves all others as they were.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The stream of this name. The same with every run of the same numpy."""
    import numpy as np

    name = "\0".join(str(part) for part in (seed, *names))
    return np.random.Generator(np.random.PCG64(number_of(name, 16)))


def number_of(name: str, size: int) -> int:
    """A number of `size` bytes that stands for a name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=size).digest(), "big")
