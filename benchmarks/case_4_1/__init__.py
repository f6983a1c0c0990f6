"""White paper, case 4.1: traffic reports written on an appliance, alone and with remote sites behind Tidegate.

The paper: 42 s a report at low load, 72 s with 60 reports at once, over 300 s with 100; with remote sites about
45 s with 60 and 75 s with 100. It says neither how long a report is nor what the appliance can do, so both are
made up here, and fitted to its local times only; what Tidegate makes of it is not fitted but measured.

The load is `report.py`: a closed loop of users without think time, each report six requests whose prompts grow by
what was written before. The appliance is `appliance.yaml`, fitted by `appliance.py`. Why it breaks down:

* Up to 60 reports at once their tokens fit into its KV cache. A request then finds all of its prompt but
  the newest instruction there: of a report's prompt tokens (`PROMPT_TOKENS`) one in nine is computed.
* With 100 they do not fit. Those that are running hold the cache, the others queue, and before one comes up,
  what it had there has been evicted by those before it: least recently used first is the worst order for users
  who take turns. So nearly everything is computed again, which takes the time in which tokens would have been
  written; and a sequence that finds no block for its next token is preempted and computed again as well.

With a KV cache that is never full the same engine takes a third of the time (`simulated.py` runs it, too).

The remote sites are `h20-4-32b` and `d-4-32b` of `sim/profiles`: of the paper's configurations with four cards
the two that it gives the most concurrent requests (149 and 160, which are their slots), 20 and 40 ms away. They
have no prefix cache: a request that flows over pays for its whole prompt.
"""
