"""What `tidegate simulate` is told of an installation: its backends, its policy, and its ledger, as plain values.

The simulator may not import this room, so the command line hands this in (`proxy/cli.py`); what the simulator
expects of it stands in `sim/simulate_command.py` and `sim/from_ledger.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.state import Backend
from policies.units import BadValueError
from proxy.build import health, known_names, make_backends, policy_text, slots_of, timing
from proxy.build import prices as prices_of
from proxy.cli_common import config_path, fail, load, open_ledger, readable_errors
from proxy.config import Config, is_policy_file
from proxy.records import Row

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from policies.files import KnownNames


class Installation:
    """One configuration and the ledger that it names."""

    def __init__(self, config: Config, path: Path) -> None:
        self._config = config
        self._path = path
        self._prices = prices_of(config)
        self._engine: Engine | None = None
        self.currency = self._prices.currency
        self.aliases: Mapping[str, str] = config.aliases
        self.profiles: Mapping[str, Path | None] = {one.name: one.profile for one in config.backends}
        """By name of backend."""
        self.remote = frozenset(one.name for one in config.backends if one.site != "local")

    def backends(self) -> list[Backend]:
        """New ones, as configured. Without slots of their own: those of the profile, or 0: the engine would say.
        Ends with exit status 2 for a profile that cannot be used."""
        backends = make_backends(self._config)
        for section, backend in zip(self._config.backends, backends, strict=True):
            try:
                backend.slots = backend.full_slots = slots_of(section) or 0
            except BadValueError as error:
                fail(f"{self._path}: {error.message}")
        return backends

    def policy(self) -> tuple[str, str]:
        """Name and text of the policy file in force."""
        name = self._config.policy
        with readable_errors():
            return name, policy_text(name)

    def policy_changed(self) -> float:
        """Unix time at which the policy file in force was last changed; 0: it is one of the library."""
        name = self._config.policy
        with readable_errors():
            return Path(name).stat().st_mtime if is_policy_file(name) else 0.0

    def known(self) -> KnownNames:
        """What policy files may name."""
        return known_names(self._config, make_backends(self._config))

    def cluster_options(self) -> dict[str, Any]:
        """How the proxy is set up, in the words of `sim.cluster.Cluster`."""
        config = self._config
        retries, timeouts = config.retries, config.timeouts
        return {
            "timing": timing(config),
            "health": health(config),
            "metrics": config.probing.metrics and config.probing.enabled,
            "retry_ratio": retries.ratio,
            "retries_per_s": retries.per_second,
            "attempts": retries.attempts,
            "first_token_s": timeouts.first_token,
            "between_tokens_s": timeouts.between_tokens,
            "total_s": timeouts.total,
        }

    def cost(self, backend: str, model: str, prompt: int, cached: int, completion: int) -> int | None:
        """Of a request, nano-units of the currency; None: no price is known."""
        nano, currency = self._prices.cost(backend, model, prompt, cached, completion)
        return nano if currency else None

    def keys(self) -> Mapping[str, tuple[int, Mapping[str, str]]]:
        """Priority and labels by id of key, of those revoked as well."""
        from proxy.access.keys import list_keys

        with readable_errors():
            return {one.key.id: (one.key.priority, one.key.labels) for one in list_keys(self._ledger())}

    def rows(
        self, since: float | None, until: float | None, progress: Callable[[int, int], None]
    ) -> Iterator[Row]:
        """The ledger's, in order of arrival. `progress` hears of rows read, and of all there are."""
        from proxy.reports import rows

        with readable_errors():
            yield from rows(self._ledger(), since, until, progress)

    def _ledger(self) -> Engine:
        if self._engine is None:
            self._engine, _ = open_ledger(self._path, None)
        return self._engine


def installation(config: Path | None) -> Installation:
    """That of a configuration file, or of the one in this folder. Ends with exit status 2 if there is none."""
    path = config_path(config)
    if path is None:
        fail(
            "there is no tidegate.yaml here: name the configuration whose backends are simulated with --config FILE"
        )
    return Installation(load(path), path)


def span(text: str, until: str | None, now: float) -> tuple[float, float | None]:
    """Unix times of `--from-ledger` and `--until`. Raises ValueError naming the option."""
    from proxy.reports import parse_time

    found: list[float | None] = []
    for option, given in (("--from-ledger", text), ("--until", until)):
        try:
            found.append(None if given is None else parse_time(given, now))
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
    begin, end = found
    assert begin is not None
    if end is not None and begin >= end:
        raise ValueError(f"--from-ledger {text} is not before --until {until}")
    return begin, end
