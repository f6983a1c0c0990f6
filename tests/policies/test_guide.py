"""There is a wish for everything that can be taken, and for nothing else."""

from __future__ import annotations

from policies import POLICIES, guide
from policies.files import library_names


def test_every_file_and_every_policy_fulfils_a_wish_of_its_own() -> None:
    assert sorted(guide.FILES) == library_names()
    assert guide.POLICIES.keys() == POLICIES.keys()
    wishes = [*guide.FILES.values(), *guide.POLICIES.values()]
    assert len(set(wishes)) == len(wishes)
    assert not [wish for wish in wishes if wish.endswith(".") or len(wish) > 90], (
        "they stand within sentences"
    )
