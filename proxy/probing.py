"""The prober of a running proxy."""

from __future__ import annotations

from probes.resolver import Resolver
from probes.runner import Prober
from proxy.build import timing
from proxy.runtime import Runtime


def new_prober(runtime: Runtime, resolver: Resolver) -> Prober:
    """What asks the backends of its configuration; not started yet."""
    built, config = runtime.built, runtime.config
    prober = Prober(
        built.targets,
        runtime.fleet,
        spawn=runtime.tasks.spawn,
        clock=runtime.now,
        timing=timing(config),
        metrics=config.probing.metrics,
        changed=lambda: runtime.poll(runtime.now()),
        answered=lambda name: runtime.scaling.answered(name) if runtime.scaling is not None else None,
        resolver=resolver,
        hosts=built.hosts,
    )
    runtime.probes, runtime.hosts = prober.snapshot, prober.hosts
    return prober
