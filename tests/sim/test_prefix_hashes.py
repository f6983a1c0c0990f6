from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.prefix_hashes import prefix_hashes

PIECES = st.lists(st.sampled_from(["a", "b", " the", "\n"]), max_size=40)


@given(PIECES, PIECES, st.integers(1, 8))
def test_hashes_agree_as_far_as_whole_units_do(one: list[str], other: list[str], unit: int) -> None:
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    first, second = prefix_hashes(one, unit), prefix_hashes(other, unit)
    assert len(first) == len(one) // unit
    same = [left == right for left, right in zip(first, second, strict=False)]
    assert same == [number < common // unit for number in range(len(same))]


def test_salts_share_nothing() -> None:
    pieces = ["a"] * 32
    assert not set(prefix_hashes(pieces, 16, "one")) & set(prefix_hashes(pieces, 16, "two"))
