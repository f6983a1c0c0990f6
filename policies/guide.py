"""What to take for what: a wish for each file of the library and for each policy.

`tidegate policies` and the tables at the top of docs/policies.md are made from this; what stands first is for most.
"""

from __future__ import annotations

FILES: dict[str, str] = {
    "local-first": "your own machines first, and remote ones for what does not fit: the default",
    "nearest-site": "what does not fit at home to go to the nearest site",
    "sticky-sessions": "conversations to return to the backend that has their beginning in its cache",
    "vip-stays-local": "classified requests never to leave, important ones hardly, others early",
    "night-on-remote": "batch work to run at remote sites at night",
    "cheapest-inside-sla": "the cheapest backends that are fast enough for each SLA class",
    "green-first": "clean power first, and people not to wait for it",
    "model-upgrade-canary": "a small share of the conversations to try a new version",
}
"""Wish by name of a file of the library."""

POLICIES: dict[str, str] = {
    "least-load": "no backend fuller than others: the default, and where to begin",
    "weighted-qps": "fixed shares, or at most so many requests a second for a backend",
    "session-affinity": "conversations to stay where their beginning is cached, by their session",
    "prefix-affinity": "prompts with the same long system prompt kept together, of some dozens of those",
    "cache-aware": "the caches used, on backends that are alike and near",
    "skylb": "sudden bursts to wait here, for whichever of many engines is ready first",
    "kv-threshold": "sites filled in order by the memory that long prompts take",
    "forecast": "promised times kept, to the first token and for each further one",
    "mooncake": "the soonest first token, and in overload a refusal at once of what would come too late",
    "cost": "time, money and carbon weighed, inside a SLA and under caps by the hour",
    "geo": "the site that is nearest to whoever asks",
    "gorgo": "all regions used, a far one where it has the prompt in its cache",
    "shortest-path": "round trip, transfer and queue weighed by class of business",
    "lmetric": "shared prefixes used, on cards that are alike, with nothing to learn or tune",
    "prequal": "only late figures believed, of backends of unknown speed that others use too",
    "peak-ewma": "backends that stall now and then left alone for a while",
    "power-of-two": "several proxies in front of the same backends not to herd",
    "nash": "the same room left on all backends, for requests of one kind",
    "wardrop": "the least mean delay with sites at different distances, for requests of one kind",
    "weighted-scores": "a mixture of your own, which no other policy has",
    "round-robin": "a turn for each, whatever its load",
    "random": "something to compare others with",
}
"""Wish by name of a policy."""
