"""Which requests of a trace are of one conversation, seen from the hashes of their prompts.

Mooncake's trace has no sessions, but each prompt has the hashes of its blocks, and the prompt of a later turn
begins with all that was said before. So a request goes on with the latest one whose whole blocks it begins with;
of two blocks at least, as the first one is the same in all prompts. Two people who ask the same long document are
taken for one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from sim.traffic import Loop, Traffic, by_sessions, faster
from sim.workload import Workload

LEAST_BLOCKS: Final = 2


def with_conversations(workload: Workload) -> Workload:
    """The same requests, each with a session: its own, or that of the request which it goes on with."""
    latest: dict[tuple[int, ...], str] = {}
    arrivals = []
    for number, arrival in enumerate(workload):
        hashes = arrival.hashes
        begins = (hashes[:count] for count in range(len(hashes), LEAST_BLOCKS - 1, -1))
        session = next((latest[one] for one in begins if one in latest), f"conversation-{number}")
        whole = hashes[:-1]  # the last block is not full: with the next turn it has another hash
        if len(whole) >= LEAST_BLOCKS:
            latest[whole] = session
        arrivals.append(arrival._replace(session=session))
    return replace(workload, arrivals=arrivals)


@dataclass(slots=True)
class Conversations(Traffic):
    """Traffic of a trace whose conversations are told by its hashes.

    They are looked for in each sample: blocks of a trace are drawn request by request, since whole conversations,
    of which some last an hour, would leave a sample with a long and empty end.
    """

    def workload(self, seed: int, speed: float = 1.0) -> Workload:
        """As `Traffic.workload`."""
        found = with_conversations(Traffic(self.source, resamples=self.resamples).workload(seed))
        if self.loop is Loop.CLOSED:
            found = by_sessions(found, self.ttft_s, self.tpot_s)
        return faster(found, speed)
