from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.fairness import AGEING_S, FairQueue, Held
from tests.policies.builders import request

KEY = ("rule", frozenset({"a"}))


class Feed:
    """A queue, and the numbering of what goes into it."""

    def __init__(self) -> None:
        self.queue = FairQueue(KEY)
        self.sequence = 0

    def add(self, tenant: str = "t", tokens: int = 1, priority: int = 0, since: float = 0.0) -> Held:
        self.sequence += 1
        facts = request(f"{tenant}{self.sequence}", tenant=tenant, expected_tokens=tokens, priority=priority)
        held = Held(facts, self.sequence, since, 1e9)
        self.queue.add(held)
        return held

    def serve(self, now: float = 0.0) -> Held:
        head = self.queue.head(now)
        assert head is not None
        self.queue.remove(head, served=True)
        return head


def test_one_tenant_is_first_in_first_out() -> None:
    feed = Feed()
    added = [feed.add(tokens=tokens) for tokens in (50, 1, 7, 3)]
    assert [feed.serve() for _ in added] == added


def test_tokens_are_shared_not_requests() -> None:
    feed = Feed()
    for _ in range(40):
        feed.add("big", tokens=300)
        feed.add("small", tokens=100)
    served = [feed.serve().request.tenant for _ in range(40)]
    assert (served.count("big"), served.count("small")) == (10, 30)


def test_a_newcomer_neither_waits_for_the_crowd_nor_collects_credit() -> None:
    feed = Feed()
    for _ in range(20):
        feed.add("crowd", tokens=10)
    for _ in range(10):
        feed.serve()
    for _ in range(5):
        feed.add("late", tokens=10)
    order = [feed.serve().request.tenant for _ in range(10)]
    assert order.count("late") == 5
    assert "late" in order[:2]
    assert order[:4].count("late") == 2


def test_an_answer_out_of_turn_is_charged_and_moves_no_clock() -> None:
    feed = Feed()
    for _ in range(3):
        feed.add("a", tokens=10)
    for _ in range(3):
        feed.add("b", tokens=10)
    overdue = feed.add("b", tokens=25)
    feed.queue.remove(overdue, served=True)
    assert [feed.serve().request.tenant for _ in range(6)] == ["a", "a", "a", "b", "b", "b"]


def test_an_answer_out_of_turn_puts_no_newcomer_behind() -> None:
    feed = Feed()
    for _ in range(3):
        feed.add("a", tokens=10)
    for overdue in [feed.add("b", tokens=25) for _ in range(2)]:
        feed.queue.remove(overdue, served=True)
    feed.add("late", tokens=10)
    assert [feed.serve().request.tenant for _ in range(4)] == ["a", "late", "a", "a"]


def test_priority_goes_first_and_waiting_is_worth_priority() -> None:
    feed = Feed()
    low = feed.add(priority=0, since=0.0)
    high = feed.add(priority=2, since=1.0)
    higher = feed.add(priority=3, since=1.0)
    assert feed.queue.head(1.0) is higher
    feed.queue.remove(higher, served=True)
    assert feed.queue.head(1.0) is high
    # Still two levels behind, then level with one that has waited as long: the older goes first.
    assert feed.queue.head(2.0 * AGEING_S - 0.1) is high
    fresh = feed.add(priority=2, since=2.0 * AGEING_S)
    feed.queue.remove(high, served=False)
    assert feed.queue.head(2.0 * AGEING_S) is low
    feed.queue.remove(low, served=True)
    assert feed.queue.head(2.0 * AGEING_S) is fresh


def test_low_priority_is_not_starved_by_a_steady_stream_of_high() -> None:
    feed = Feed()
    low = feed.add("low", priority=0)
    for second in range(60):
        now = float(second)
        feed.add("high", priority=5, since=now)
        feed.add("high", priority=5, since=now)  # twice what is served: the backlog grows
        if feed.serve(now) is low:
            break
    # Both age: low comes up once the oldest high one is 5 levels younger, and it was served FIFO meanwhile.
    assert now <= 4 * 5 * AGEING_S


def test_who_is_passed_over_comes_back_at_its_place() -> None:
    feed = Feed()
    a1, a2 = feed.add("a"), feed.add("a")
    b1 = feed.add("b")
    queue = feed.queue
    assert queue.head(0.0) is a1
    queue.pass_over(a1)
    assert queue.head(0.0) is b1  # not a2: a tenant's own order holds
    queue.pass_over(b1)
    assert queue.head(0.0) is None
    queue.resume()
    assert [feed.serve() for _ in range(3)] == [a1, b1, a2]


def test_a_full_queue_gives_the_place_of_the_heaviest_tenants_newest() -> None:
    feed = Feed()
    feed.add("heavy", priority=1)
    feed.add("heavy", priority=0)
    newest_low = feed.add("heavy", priority=0)
    feed.add("light")
    queue = feed.queue
    assert queue.displaced_by(request(tenant="new")) is newest_low
    assert queue.displaced_by(request(tenant="light")) is newest_low
    assert queue.displaced_by(request(tenant="heavy")) is None
    assert queue.displaced_by(request(tenant="new", priority=-1)) is None
    queue.remove(newest_low, served=False)
    assert queue.displaced_by(request(tenant="light")) is None  # 2 against 1: nothing to gain
    assert FairQueue(KEY).displaced_by(request()) is None


def test_the_oldest_is_known() -> None:
    feed = Feed()
    assert feed.queue.oldest_since() == float("inf")
    first = feed.add(since=3.0)
    feed.add(priority=9, since=4.0)
    assert feed.queue.oldest_since() == 3.0
    feed.queue.remove(first, served=False)
    assert feed.queue.oldest_since() == 4.0


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
)
def test_tenants_that_both_wait_differ_by_two_requests_at_most(first: list[int], second: list[int]) -> None:
    """The bound of start-time fair queueing: |work a - work b| <= longest a + longest b while both wait."""
    feed = Feed()
    for tokens in first:
        feed.add("a", tokens)
    for tokens in second:
        feed.add("b", tokens)
    served = {"a": 0, "b": 0}
    while {"a", "b"} <= feed.queue.tenants.keys():
        facts = feed.serve().request
        served[facts.tenant] += facts.tokens
        assert abs(served["a"] - served["b"]) <= max(first) + max(second)


class QueueAgainstModel(RuleBasedStateMachine):
    """Whatever is done to it: nobody is lost, tenants stay in order, counts are right."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed()
        self.model: list[Held] = []
        self.now = 0.0

    @rule(tenant=st.sampled_from("abc"), tokens=st.integers(0, 30), priority=st.integers(0, 2))
    def add(self, tenant: str, tokens: int, priority: int) -> None:
        self.model.append(self.feed.add(tenant, tokens, priority, self.now))

    @rule(seconds=st.floats(0.0, 5.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.model)
    @rule(passed_over=st.integers(0, 3))
    def serve(self, passed_over: int) -> None:
        queue = self.feed.queue
        seen = set()
        for _ in range(passed_over):
            head = queue.head(self.now)
            if head is None:
                break
            seen.add((head.request.tenant, head.request.priority))
            queue.pass_over(head)
        head = queue.head(self.now)
        lines = {(held.request.tenant, held.request.priority) for held in self.model}
        if head is None:
            assert seen == lines
        else:
            line = (head.request.tenant, head.request.priority)
            assert line not in seen
            mine = [held for held in self.model if (held.request.tenant, held.request.priority) == line]
            assert head is mine[0]
            queue.remove(head, served=True)
            self.model.remove(head)
        queue.resume()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), served=st.booleans())
    def remove_any(self, data: st.DataObject, served: bool) -> None:
        held = data.draw(st.sampled_from(self.model))
        self.feed.queue.remove(held, served)
        self.model.remove(held)

    @invariant()
    def counts(self) -> None:
        queue = self.feed.queue
        assert len(queue) == len(self.model) == sum(queue.tenants.values())
        assert all(queue.tenants.values())
        assert (queue.head(self.now) is None) == (not self.model)
        if self.model:
            assert queue.oldest_since() == self.model[0].since

    def teardown(self) -> None:
        for _ in range(len(self.model)):
            self.feed.serve(self.now)
        assert self.feed.queue.head(self.now) is None


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
