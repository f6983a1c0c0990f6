"""White paper, case 4.2: a medical institute's questions and answers on a box of L20 cards, and cloud cards behind.

The paper: a 32B model distilled from DeepSeek-R1 answers physicians' questions on local L20 cards; what they
cannot take goes to Cambricon MLU370 cards in the cloud. End-to-end latency falls by 40 %, three times as many
requests are served at once, and deployment costs 50 % less. It says neither how many cards the box has, nor what
was asked, nor what anything costs, nor at which load the latency fell. So all of that is stated here, and the
claims are asked one by one (`verdict.py`):

* **latency -40 %** and **throughput x3** against the box as it is: all requests into its engine, no gateway;
* **cost -50 %** against boxes for the peak: as many as keep the SLA in the peak hour, bought for all 24 hours.

Latency is the mean from arrival to last token, under three times the load that the box just serves. There a box
without a gateway queues without end, so its mean grows with the length of the hour and the cut can hardly be
missed: the paper's words allow that reading, and no figure of it is worth much. So two more are printed: the cut
against the box under the load that it just serves (`at capacity`), said to be reached or not; and the cut by load.

The box is `l20-2-32b.yaml` (`cards.py`): two L20 cards, the least that hold the model. The cloud has two sites, 10
and 45 ms away, two backends each of the profile `e-4-32b`: of the paper's unnamed cards, E computes most like an
MLU370-X8 (84 against 96 TFLOPS a card). `mlu370-4-32b.yaml` is that card by the roofline law, with the share of
the data sheet's bandwidth that the L40 reaches; `--remote mlu370-4-32b` runs with it. All contexts are 5,000
tokens, as in the paper's table 3-1; prefix caches are off, since the trace knows no prefixes.

The SLA is that of table 3-3: TTFT 2 s, TPOT 100 ms; a load is served within it if 95 % of the requests keep it.
The box has 48 slots: more of these requests do not fit into its KV cache for sure (60,653 tokens of about 1,100
each), and its steps then take some 80 ms.

The load is a day of DeepSeek-R1's traffic by ServeGen (`../shared/data/servegen`, Alibaba): the only trace there
that has a day with its peak, and answers that hold a model's reasoning, which this model writes, too. Azure's has
one hour; m-small lacks the lengths of its five largest clients, half of its requests. It is 16 requests a second
on average and 35 in the peak hour. Of these a share is drawn at random, so that the peak hour (22 to 23 h) is three
times what the box serves alone; the course of the day stays, bursts become less. Smaller loads are parts of
greater ones. Requests that do not fit into the context are left out: 4 % in the peak hour, 13 % over the day. No
data law applies: where one does, `sites: [local]` keeps those requests on the box, and its figures are those of the
box.

Of each hour of the day one window of ten minutes is played, drawn by the seed; of the peak hour all of it.

Every policy meets the same requests, seed by seed. Policies (`policies.py`): local first, spilling from several
levels on; and policies that choose among box and cloud freely, with several weights where they have one. The table
has all of them, but the answer is one that was chosen before: by `verdict.nearest` on a training day (seed 0): of
those that keep all claims, latency by the stricter reading and the SLA over the whole day too, the one that spills
least. A first rule, without these two, chose a policy whose box was full there, and which missed the SLA on the
days that were shown; so those days are shown no more, and the ones that are have a later seed. The training day is
of windows that the days that are shown do not have, with the day's other peak (2 to 3 h) in place of the peak hour.
`--check` fails if that one misses a claim on the days that are shown.

CPU time: about 20 minutes for three days (3 million requests of 0.3 ms, Xeon at 2.5 GHz).
"""
