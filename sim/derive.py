"""`python -m sim.derive`: writes `sim/profiles/`, the cards of the white paper with the two models it measured.
`--check` writes nothing, and fails if the files are not those that would be written.

The paper gives the most concurrent requests that still get 15 token/s each (table 3-2) and which
configurations keep a mean TTFT below 2 s with 32 at once (table 3-3), and nothing of how long a step takes.
So a profile here is derived: the shape of the step's cost is the roofline law that fits published vLLM
measurements of these model sizes on H100 (weights and KV cache are read at memory bandwidth, prompts are
computed at the card's FLOP/s), and one figure of each configuration, its effective memory bandwidth, is set
so that the simulated maximum is the paper's. For the cards that the paper names A to E nothing else is
known: their effective FLOP/s are set so that table 3-3 comes out, one figure for each card.

Requests start all at once, in the paper's tables as in `sim/closed_loop.py`: only so do the FLOP/s on H20's
data sheet explain that eight of its cards keep the TTFT and four do not. If requests came one after the
other, four would.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from policies.profile import Capacity, Limits, Origin, Profile, Source, Step
from sim.closed_loop import closed_loop, most_users
from sim.engine import EngineSettings
from sim.profile import dump_profile, engine_settings, load_profile

PROFILES: Final = Path(__file__).parent / "profiles"
PROMPT: Final = 1024
OUTPUT: Final = 1024
TOKENS_PER_S: Final = 15.0
"""What table 3-2 asks for."""
MAX_MODEL_LEN: Final = 5000

PAPER: Final = "white paper on a computing-network acceleration ecosystem for DeepSeek models (2025)"


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shape, in bytes and counts."""

    name: str
    short: str
    weights: float
    parameters: float
    layers: int
    kv_bytes: int
    """Of one token."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card. What the paper does not name is known by what it did only."""

    name: str
    flops: float
    """Dense 16-bit FLOP/s of one card."""
    bandwidth: float | None = None
    """Bytes per second, data sheet."""
    memory: float | None = None
    """Bytes, data sheet."""
    precision: str = "bf16"


QWEN_32B: Final = Model("DeepSeek-R1-Distill-Qwen-32B", "32b", 65.5e9, 32.8e9, 64, 262_144)
LLAMA_70B: Final = Model("DeepSeek-R1-Distill-Llama-70B", "70b", 141.1e9, 70.6e9, 80, 327_680)

CARDS: Final = {
    card.name: card
    for card in (
        Card("H20", 148e12, 4.0e12, 96e9),
        Card("L40", 181e12, 0.864e12, 48e9),
        Card("V100", 0.6 * 125e12, 0.9e12, 32e9, "float16"),
        Card("A", 80e12),
        Card("B", 80e12),
        Card("C", 700e12),
        Card("D", 165e12),
        Card("E", 84e12),
    )
}
"""V100: 60 % of the data sheet, its kernels being old. A to E: so that table 3-3 comes out."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of table 3-2."""

    card: str
    cards: int
    model: Model
    most: int
    """Concurrent requests; 0: not even one gets 15 token/s."""


CELLS: Final = tuple(
    Cell(card, cards, model, most)
    for card, cards, of_32b, of_70b in (
        ("H20", 1, 24, None),
        ("H20", 2, 80, 30),
        ("H20", 4, 149, 80),
        ("H20", 8, 250, 140),
        ("L40", 2, 16, None),
        ("L40", 4, 15, 6),
        ("V100", 4, 33, None),
        ("A", 4, 0, None),
        ("A", 8, 9, None),
        ("B", 4, 0, 0),
        ("B", 8, 0, 0),
        ("C", 2, 15, None),
        ("C", 4, 42, 13),
        ("C", 8, 50, 40),
        ("D", 2, 66, None),
        ("D", 4, 160, 60),
        ("D", 8, 256, 135),
        ("E", 2, 48, None),
        ("E", 4, 65, 20),
        ("E", 8, 127, 22),
    )
    for model, most in ((QWEN_32B, of_32b), (LLAMA_70B, of_70b))
    if most is not None
)

LAYER_US: Final = 78.0
"""Of a step for each layer, whatever is in it: launching kernels, talking to the other cards."""
SEQUENCE_US: Final = 45.0
"""Of a step for each decoding sequence."""
TALK_US: Final = 9.0
"""For each prompt token, on several cards."""
NOTHING_MET_ALPHA_US: Final = 85_000.0
"""A step of a configuration that reaches nothing: above 66.7 ms, and above 100 ms with 32 at once."""


def step_of(cell: Cell, bandwidth: float) -> Step:
    """The roofline law; `bandwidth`: of all cards together, bytes per second that are really reached."""
    card, model = CARDS[cell.card], cell.model
    computing = 1.4 * 2.0 * model.parameters / (cell.cards * card.flops) * 1e6
    return Step(
        alpha_us=round(0.925 * model.weights / bandwidth * 1e6 + LAYER_US * model.layers, 1),
        beta_us=SEQUENCE_US,
        gamma_us=round(1.15 * model.kv_bytes / bandwidth * 1e6, 6),
        delta_us=round(computing + (TALK_US if cell.cards > 1 else 0.0), 2),
        source=Source(
            origin=Origin.DERIVED,
            text=(
                f"roofline law with an effective memory bandwidth of {bandwidth / 1e12:.3f} TB/s over "
                f"{cell.cards} cards, set by the {cell.most} concurrent requests of table 3-2, {PAPER}"
            ),
        ),
    )


def kv_tokens_of(cell: Cell) -> int | None:
    """What is left of the cards' memory beside the weights, tokens; None: nobody knows the card's memory."""
    memory = CARDS[cell.card].memory
    if memory is None:
        return None
    return int((cell.cards * (0.9 * memory - 2.5e9) - cell.model.weights) / cell.model.kv_bytes)


def name_of(cell: Cell) -> str:
    """The name of its profile."""
    return f"{cell.card.lower()}-{cell.cards}-{cell.model.short}"


def profile_of(cell: Cell, bandwidth: float) -> Profile:
    """The profile of a configuration with that bandwidth."""
    known = kv_tokens_of(cell)
    text = (
        "90 % of the cards' memory less weights and 2.5 GB a card; vLLM's defaults"
        if known is not None
        else "vLLM's defaults; the card's memory is not known, so the KV cache is never full"
    )
    return Profile(
        name=name_of(cell),
        card=cell.card,
        cards=cell.cards,
        model=cell.model.name,
        precision=CARDS[cell.card].precision,
        step=step_of(cell, bandwidth),
        limits=Limits(
            kv_tokens=known,
            max_model_len=MAX_MODEL_LEN,
            prefix_cache=False,
            source=Source(origin=Origin.DERIVED, text=text),
        ),
        capacity=Capacity(
            users=cell.most,
            prompt_tokens=PROMPT,
            output_tokens=OUTPUT,
            tokens_per_s=TOKENS_PER_S,
            source=Source(origin=Origin.PUBLISHED, text=f"table 3-2, {PAPER}"),
        ),
    )


def most_of(settings: EngineSettings) -> int:
    """Table 3-2 of an engine."""
    return most_users(settings, PROMPT, OUTPUT, tokens_per_s=TOKENS_PER_S, limit=1024)


def bandwidth_for(cell: Cell) -> float:
    """The bandwidth with which the simulated maximum is the cell's: in the middle of those that have it."""
    if not cell.most:
        return _bandwidth(cell.model, NOTHING_MET_ALPHA_US)
    low, high = (_threshold(cell, users) for users in (cell.most, cell.most + 1))
    return exp((log(low) + log(high)) / 2)


def _bandwidth(model: Model, alpha_us: float) -> float:
    """With which a step takes so long."""
    return 0.925 * model.weights * 1e6 / (alpha_us - LAYER_US * model.layers)


def _threshold(cell: Cell, users: int) -> float:
    """The least bandwidth with which so many users get what table 3-2 asks for."""
    low, high = 1e9, 1e14
    for _ in range(40):
        middle = exp((log(low) + log(high)) / 2)
        figures = closed_loop(engine_settings(profile_of(cell, middle)), users, PROMPT, OUTPUT)
        if figures.tokens_per_s_per_user >= TOKENS_PER_S:
            high = middle
        else:
            low = middle
    return high


def written_bandwidths() -> dict[Cell, float]:
    """Those with which `sim/profiles/` was made: to be had at once, and as exact as a profile's alpha is."""
    return {cell: _bandwidth(cell.model, load_profile(name_of(cell)).step.alpha_us) for cell in CELLS}


class Prediction(NamedTuple):
    """What the simulator tells of a cell. Concurrent requests."""

    cell: Cell
    simulated: int
    """With its own profile."""
    predicted: int | None
    """From the others of its card; None: there are not two of them."""

    @property
    def error(self) -> float | None:
        """Of what was predicted, as a share of what the paper measured."""
        return None if self.predicted is None else self.predicted / self.cell.most - 1


def predictions(bandwidths: Mapping[Cell, float]) -> Iterator[Prediction]:
    """All cells, each one left out once."""
    for cell, bandwidth in bandwidths.items():
        simulated = most_of(engine_settings(profile_of(cell, bandwidth)))
        others = [other for other in CELLS if other.card == cell.card and other.most and other != cell]
        guess = predicted(cell, others, bandwidths) if cell.most and len(others) >= 2 else None
        yield Prediction(cell, simulated, guess)


def error_sizes(found: Iterable[Prediction]) -> tuple[float, float]:
    """Mean and median of the errors without their signs."""
    sizes = [abs(one.error) for one in found if one.error is not None]
    return float(np.mean(sizes)), float(np.median(sizes))


def predicted(cell: Cell, others: list[Cell], bandwidths: Mapping[Cell, float]) -> int:
    """A cell from the others of its card alone: the bandwidth of one card as a power of the number of cards.

    The exponent is drawn towards none (twice the cards, twice the bandwidth), as if two more cells said so.
    """
    x = np.array([log(other.cards) for other in others])
    y = np.array([log(bandwidths[other] / other.cards) for other in others])
    centre = x.mean()
    spread = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * (y - y.mean())).sum()) / (spread + 2 * log(2) ** 2)
    per_card = exp(float(y.mean()) + slope * (log(cell.cards) - centre))
    return most_of(engine_settings(profile_of(cell, per_card * cell.cards)))


def main(arguments: list[str] | None = None) -> int:
    """Write all profiles, or see whether they are as they should be, and print how well each is predicted."""
    parser = ArgumentParser(prog="python -m sim.derive", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the files differ")
    check = parser.parse_args(arguments).check
    bandwidths = {cell: bandwidth_for(cell) for cell in CELLS}
    texts = {
        f"{name_of(cell)}.yaml": dump_profile(profile_of(cell, bandwidth))
        for cell, bandwidth in bandwidths.items()
    }
    wrong = differing(PROFILES, texts)
    if not check:
        for name, text in texts.items():
            (PROFILES / name).write_text(text, encoding="utf-8")
    out = sys.stdout.write
    out(
        "| profile | paper | simulated | from the others of its card | error |\n| --- | --- | --- | --- | --- |\n"
    )
    found = []
    for one in predictions(bandwidths):
        found.append(one)
        guess = " | |" if one.predicted is None else f" {one.predicted} | {one.error:+.0%} |"
        out(f"| {name_of(one.cell)} | {one.cell.most} | {one.simulated} |{guess}\n")
    mean, median = error_sizes(found)
    out(f"\nSize of the errors: mean {mean:.0%}, median {median:.0%}\n")
    if check and wrong:
        sys.stderr.write(f"not as `python -m sim.derive` writes them: {', '.join(wrong)}\n")
    return int(check and bool(wrong))


def differing(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Names of the profiles in a folder that are not these texts, are missing, or are none of them."""
    there = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.yaml")}
    return sorted(name for name in there.keys() | texts.keys() if there.get(name) != texts.get(name))


if __name__ == "__main__":
    sys.exit(main())
