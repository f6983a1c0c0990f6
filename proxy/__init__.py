"""The running process. Start here: the words the code uses.

backend     one OpenAI-compatible endpoint (a vLLM), local or remote
site        where a backend stands: `local`, or a named place with operator, law, price, carbon
slots       how many requests a backend serves at once inside its SLA
saturation  how full a backend is, 0 to 1 and above
spill       sending a request to a remote site because local is saturated
valve       admission, queueing and dispatch of requests          (policies/valve.py)
policy      chooses: send, hold or reject                         (policies/)
lease       load held on a backend by one attempt until its stream has ended (policies/state.py)
exchange    the life of one request, from first byte to ledger row (exchange.py)
meter       tokens counted while they flow                        (meter.py)
journal     what a crash must not lose, synced every 20 ms        (journal.py)
ledger      the durable record of every request                   (ledger.py)
probe       how the state of backends is learnt                   (probes/)

Bytes come in at `server.py`, are read by `http1.py`, become facts in `openai.py`, are decided on by
`policies/`, leave through `upstream.py`, come back through `relay.py` and are counted by `meter.py`.
"""

DISTRIBUTION = "tidegate"
"""Whose package this is: PyPI has another one called `proxy`."""
