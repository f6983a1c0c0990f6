"""Every target with what Hypothesis makes of its good inputs, and the fuzzer itself.

Guided by nothing, so it finds less than `make fuzz`; but everywhere and each time.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import __main__ as fuzzing
from tests.fuzz.target import Target, cuts, words
from tests.fuzz.targets import TARGETS

EXAMPLES = {"config": 60, "policies": 60}
"""Of targets that are slow; of others `MANY`."""
MANY = 200

each = pytest.mark.parametrize("name", TARGETS)


@each
def test_good_inputs_break_nothing(name: str) -> None:
    target = TARGETS[name]
    assert len(target.seeds()) >= 4
    for seed in target.seeds():
        target.run(seed)


def test_every_word_can_stand_in_a_dictionary() -> None:
    for target in TARGETS.values():
        assert all(0 < len(word) <= 64 for word in target.words)  # libFuzzer's limit
    assert b'{"a":' * 12 in words("json")
    assert b"\xef\xbb\xbf" in words("json")


def test_cuts_lose_nothing() -> None:
    for data in (b"", b"a", bytes(range(100))):
        assert {b"".join(pieces) for pieces in cuts(data)} == {data}
        assert cuts(data) == cuts(data)


Change = tuple[int, int, bytes]
"""Where, how many bytes are taken out, what is put in."""


def changed(seed: bytes, changes: list[Change]) -> bytes:
    for where, out, put in changes:
        at = where % (len(seed) + 1)
        seed = seed[:at] + put + seed[at + out :]
    return seed


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    put = st.one_of(st.sampled_from(target.words), st.sampled_from(target.seeds()), st.binary(max_size=4))
    change = st.tuples(st.integers(0, 4096), st.sampled_from([0, 0, 1, 2, 9, 50]), put)
    return st.builds(changed, st.sampled_from([b"", *target.seeds()]), st.lists(change, max_size=4))


@each
def test_nothing_breaks_it(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES.get(name, MANY))
    @given(inputs(target))
    def law(data: bytes) -> None:
        target.run(data)

    law()


def test_an_input_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "input"
    file.write_bytes(b"data: a\n\n")
    assert fuzzing.main(["events", "--repeat", str(file)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fuzzing.main(["nonsense"])
    assert "no target is called nonsense; there are requests" in capsys.readouterr().err


@pytest.mark.parametrize(("forbidden", "status"), [("", 0), ("1", 1)])
def test_without_atheris_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forbidden: str, status: int
) -> None:
    find: Callable[[str], object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "atheris" else find(name))
    monkeypatch.setenv("TIDEGATE_FORBID_SKIPS", forbidden)
    assert fuzzing.main(["events"]) == status
    assert capsys.readouterr().out.startswith("NOT RUN: fuzzing needs Atheris")


PLANTED = """
import sys
from pathlib import Path
from tests.fuzz import __main__ as fuzzing
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

def planted(data):
    assert not data.startswith(b"data: {"), "planted"

TARGETS["planted"] = Target(planted, lambda: [b"data:"], (b"data: ", b"{"))
if "--here" in sys.argv:
    sys.exit(fuzzing.main())
sys.exit(not fuzzing.fuzz("planted", 60, Path(sys.argv[1]), [__file__]))
"""


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_fuzzer_finds_what_is_planted(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("NOT RUN: there is no Atheris here; `make fuzz` installs it")
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(fuzzing.ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "FOUND" in done.stdout
    [crash] = (tmp_path / "found").glob("planted-crash-*")
    assert crash.read_bytes().startswith(b"data: {")
