"""Who is ejected, for how long, and that enough replicas always stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.routing.ejection import (
    FAILURES,
    LONGEST_PENALTY_S,
    PENALTY_S,
    PROBES,
    Ejections,
    Verdict,
    applied,
    penalty_s,
)


class Rig:
    def __init__(self, *replicas: str, share: float = 0.5) -> None:
        self.now_s = 100.0
        self.told: list[tuple[str, str]] = []
        self.outs: list[frozenset[str]] = []
        self.ejections = Ejections(
            share, lambda: self.now_s, lambda replica, reason: self.told.append((replica, reason)), self.outs.append
        )
        self.ejections.update(replicas)

    def fail(self, replica: str, times: int = FAILURES) -> None:
        for _ in range(times):
            self.ejections.failed(replica)

    def probe(self, replica: str, healthy: bool, times: int = 1) -> None:
        for _ in range(times):
            self.ejections.probed(replica, healthy)

    @property
    def out(self) -> set[str]:
        return set(self.ejections.out)


def test_who_is_out_is_told_when_it_changes_and_only_then() -> None:
    rig = Rig("a", "b")
    rig.fail("a", FAILURES - 1)
    assert rig.outs == []
    rig.fail("a")
    rig.probe("a", healthy=False, times=PROBES)
    rig.ejections.update(["a", "b"])
    assert rig.outs == [frozenset("a")]
    rig.now_s += PENALTY_S
    rig.probe("a", healthy=True)
    assert rig.outs == [frozenset("a"), frozenset()]
    rig.fail("a", 1)
    rig.ejections.update(["b"])
    assert rig.outs[2:] == [frozenset("a"), frozenset()]


def test_failures_in_a_row_eject_and_an_answer_between_does_not() -> None:
    rig = Rig("a", "b")
    rig.fail("a", FAILURES - 1)
    rig.ejections.answered("a")
    rig.fail("a", FAILURES - 1)
    assert rig.out == set()
    rig.fail("a", 1)
    assert rig.out == {"a"}
    assert rig.told == [("a", "failures")]


def test_a_stall_ejects_at_once_and_probes_after_three() -> None:
    rig = Rig("a", "b", "c", "d")
    rig.ejections.stalled("a")
    rig.probe("b", False, PROBES - 1)
    assert rig.out == {"a"}
    rig.probe("b", False)
    assert rig.out == {"a", "b"}
    assert rig.told == [("a", "stalled"), ("b", "probes")]


def test_it_comes_back_by_a_good_probe_after_its_penalty_on_trial() -> None:
    rig = Rig("a", "b")
    rig.fail("a")
    rig.now_s += PENALTY_S - 1
    rig.probe("a", True)
    assert rig.out == {"a"}
    rig.now_s += 1
    rig.probe("a", False)
    assert rig.out == {"a"}
    rig.probe("a", True)
    assert rig.out == set()
    # On trial: one failure is enough, and it stays out twice as long.
    rig.fail("a", 1)
    assert rig.out == {"a"}
    rig.now_s += PENALTY_S * 2 - 1
    rig.probe("a", True)
    assert rig.out == {"a"}
    rig.now_s += 1
    rig.probe("a", True)
    assert rig.out == set()
    # An answer ends the trial.
    rig.ejections.answered("a")
    rig.fail("a", FAILURES - 1)
    assert rig.out == set()


def test_penalties_grow_to_a_bound_and_a_calm_time_forgets_them() -> None:
    assert [penalty_s(n) for n in (1, 2, 3, 4, 5, 99)] == [30, 60, 120, 240, LONGEST_PENALTY_S, LONGEST_PENALTY_S]
    rig = Rig("a", "b")
    for _ in range(2):
        rig.fail("a")
        rig.now_s += LONGEST_PENALTY_S
        rig.probe("a", True)
        assert rig.out == set()
    rig.ejections.answered("a")
    rig.now_s += LONGEST_PENALTY_S
    rig.fail("a")
    rig.now_s += PENALTY_S
    rig.probe("a", True)
    assert rig.out == set()


def test_the_last_one_stays_and_a_dark_one_goes_before_a_failing_one() -> None:
    rig = Rig("a")
    rig.probe("a", False, PROBES)
    assert rig.out == set()
    rig = Rig("a", "b")
    rig.fail("a")
    assert rig.out == {"a"}
    rig.probe("b", False, PROBES)
    assert rig.out == {"b"}
    # It answers again: both only have failures, and the one whose penalty ends later is out.
    rig.now_s += 1
    rig.probe("b", True)
    assert len(rig.out) == 1


def test_replicas_that_come_and_go_move_the_bound() -> None:
    rig = Rig("a", "b", "c", "d")
    rig.fail("a")
    rig.fail("b")
    assert rig.out == {"a", "b"}
    rig.ejections.update(["a", "b"])
    assert len(rig.out) == 1
    rig.ejections.update(["a"])
    assert rig.out == set()
    rig.ejections.update(["a", "e", "f"])
    assert rig.out == {"a"}
    # What has left is forgotten, and what is not listed is not judged.
    rig.ejections.update(["e", "f"])
    rig.fail("a")
    rig.ejections.update(["a", "e", "f"])
    assert rig.out == set()


VERDICTS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.builds(Verdict, st.booleans(), st.floats(0, 1000)), max_size=8
)


@given(VERDICTS, st.integers(0, 8), st.floats(0, 1))
def test_the_bound_holds_whatever_was_judged(verdicts: dict[str, Verdict], more: int, share: float) -> None:
    total = len(verdicts) + more
    out = applied(verdicts, total, share)
    assert out <= verdicts.keys()
    assert len(out) <= total * share
    assert len(out) < total or total == 0
    assert len(out) == min(len(verdicts), int(total * share), max(0, total - 1))
    assert all(verdicts[o].dark or not verdicts[k].dark for o in out for k in verdicts.keys() - out)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["failed", "stalled", "answered", "bad", "good", "leave", "come", "time"]),
        st.sampled_from("abcd"),
    ),
    max_size=200,
)


@given(EVENTS)
def test_no_history_ejects_more_than_the_share_or_a_stranger(events: list[tuple[str, str]]) -> None:
    rig = Rig("a", "b", "c")
    live = {"a", "b", "c"}
    for event, replica in events:
        match event:
            case "failed":
                rig.fail(replica)
            case "stalled":
                rig.ejections.stalled(replica)
            case "answered":
                rig.ejections.answered(replica)
            case "bad":
                rig.probe(replica, False, PROBES)
            case "good":
                rig.probe(replica, True)
            case "time":
                rig.now_s += 31.0
            case _:
                (live.discard if event == "leave" else live.add)(replica)
                rig.ejections.update(live)
        assert rig.out <= live
        assert len(rig.out) <= len(live) / 2
    # Whatever happened, good probes after the longest penalty let everybody back.
    for _ in range(2):
        rig.now_s += LONGEST_PENALTY_S
        for replica in live:
            rig.probe(replica, True)
    assert rig.out == set()
