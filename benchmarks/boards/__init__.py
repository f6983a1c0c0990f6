"""Leaderboards: every policy of the registry on three real traces, over an appliance and three remote sites.

Load. Azure's conversation trace (2023), Mooncake's conversation trace (FAST'25), ServeGen's clients of
DeepSeek-R1, at the speeds of `setups.py`. `--speeds` finds the fastest at which the best of the untuned policies
still answers 95 % within the SLA on the training part: so the best is busy and can cope. That was done for Azure
and Mooncake; the speeds of ServeGen and of the control are guesses. `--check` holds each, but the control's, to the
test part.

Clusters. `azure.yaml`, `mooncake.yaml`, `servegen.yaml` name context lengths, cards, prices and RTT (none in the
house, then 5, 45 and 300 ms). The cards are the profiles of the white paper's configurations; prices are made up.

Policies. All names of the registry, plus what published policies were compared with by their authors
(`entries.py`). Each chooses among all backends, in one rule without tiers. What a policy has to be told and
nobody should search (the promised times, the place of the house) is the cluster's. What has a `Tunable` is
searched by `sim/tune.py` on the training part of the trace, for goodput; the defaults stay where the search found
nothing better there. The test part comes later in time and is kept from the search.

Why it is fair. All policies of a seed get the same requests; what was rejected or failed is a miss; intervals are
of differences by seed. Every policy has the same budget of points. No policy has seen the test part, and the
speeds were chosen on the training part, too.

Loops. Open: requests come at their times. Closed: after the answer to the one before in their conversation, less
what an answer takes; only Mooncake's trace tells which requests are of one conversation (`conversations.py`).
Azure's and ServeGen's do not, so they are played open alone.

Time. The defaults take about an hour of CPU (Xeon at 2.5 GHz: 0.2 to 0.6 ms a request, up to 2 ms where a policy
is overloaded). They are small: a search tries the defaults and about one generation, over one sample; intervals are
of four samples. So less is found, for all policies alike, and wider intervals show fewer claims.

Claims. `claims.py` has what the authors of published policies say of them, and compares. Where an advantage does
not show on Mooncake's trace, `alike.yaml` tells why: the same traffic on five alike backends in one place.
"""
