"""The fault matrix: what goes wrong around a proxy, row by row, and what it promises then.

`matrix.py` has the rows and names the tests of each, here and elsewhere. A test tells what it has measured with the
fixture `figure`; `python -m tests.e2e.faults` runs them all and writes the figures into `docs/reliability.md`.
"""
