"""Profiles of cards that table 3-2 does not have, by the roofline law of `sim/derive.py`: L20 and MLU370-X8.

    python -m benchmarks.case_4_2.cards    # writes l20-2-32b.yaml and mlu370-4-32b.yaml beside this file

The law needs the bandwidth that is really reached. The L20 has the L40's memory, so it is given what two L40 reach
in table 3-2 (16 concurrent requests at 15 token/s); it computes less: 119.5 instead of 181 TFLOPS. The MLU370-X8 is
given the same share of its data sheet's bandwidth as the L40 reaches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from policies.profile import Limits, Origin, Profile, Source, Step
from sim.derive import (
    CARDS,
    LAYER_US,
    MAX_MODEL_LEN,
    QWEN_32B,
    SEQUENCE_US,
    TALK_US,
    Cell,
    written_bandwidths,
)
from sim.profile import dump_profile


class Sheet(NamedTuple):
    """A card's data sheet: dense 16-bit FLOP/s, bytes a second, bytes."""

    name: str
    card: str
    cards: int
    flops: float
    bandwidth: float
    memory: float


SHEETS: Final = (
    Sheet("l20-2-32b", "L20", 2, 119.5e12, 0.864e12, 48e9),
    Sheet("mlu370-4-32b", "MLU370-X8", 4, 96e12, 0.6144e12, 48e9),
)
LIKE: Final = Cell("L40", 2, QWEN_32B, 16)


def reached() -> float:
    """Share of the data sheet's bandwidth that two L40 reach."""
    sheet = CARDS[LIKE.card].bandwidth
    assert sheet is not None
    return written_bandwidths()[LIKE] / (LIKE.cards * sheet)


def profile_of(sheet: Sheet, share: float) -> Profile:
    """The profile of such cards with that share of their bandwidth."""
    model = QWEN_32B
    bandwidth = share * sheet.cards * sheet.bandwidth
    computing = 1.4 * 2.0 * model.parameters / (sheet.cards * sheet.flops) * 1e6
    return Profile(
        name=sheet.name,
        card=sheet.card,
        cards=sheet.cards,
        model=model.name,
        precision="bf16",
        step=Step(
            alpha_us=round(0.925 * model.weights / bandwidth * 1e6 + LAYER_US * model.layers, 1),
            beta_us=SEQUENCE_US,
            gamma_us=round(1.15 * model.kv_bytes / bandwidth * 1e6, 6),
            delta_us=round(computing + TALK_US, 2),
            source=Source(
                origin=Origin.DERIVED,
                text=(
                    f"roofline law with {share:.1%} of the data sheet's bandwidth ({sheet.bandwidth / 1e9:g} GB/s "
                    f"a card), as two L40 reach, and {sheet.flops / 1e12:g} TFLOPS a card"
                ),
            ),
        ),
        limits=Limits(
            kv_tokens=int((sheet.cards * (0.9 * sheet.memory - 2.5e9) - model.weights) / model.kv_bytes),
            max_model_len=MAX_MODEL_LEN,
            prefix_cache=False,
            source=Source(
                origin=Origin.DERIVED,
                text="90 % of the cards' memory less weights and 2.5 GB a card; vLLM's defaults",
            ),
        ),
    )


def texts() -> dict[str, str]:
    """The files, by name."""
    share = reached()
    return {f"{sheet.name}.yaml": dump_profile(profile_of(sheet, share)) for sheet in SHEETS}


def main() -> None:
    """Write them."""
    for name, text in texts().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
