"""Who is alarmed about, and who is not: beats with made-up times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.beats import Beat, Kind, Phase
from lightning_llm.resilience.limits import FLOORS, Limits
from lightning_llm.resilience.watch import Watch

RANKS = 4
RUNNING = dict.fromkeys(range(RANKS), "S")


def beat(rank: int, kind: Kind = "progress", phase: Phase = "train", step: int = 1) -> Beat:
    return Beat(rank=rank, pid=100 + rank, kind=kind, phase=phase, step=step)


def watch(progress_timeout: float = 10.0, at: float = 0.0, steps: Sequence[int] = (1,) * RANKS) -> Watch:
    made = Watch(Limits(progress_timeout), alive_timeout=10.0)
    for rank, step in enumerate(steps):
        made.take(beat(rank, step=step), at)
    return made


def live(made: Watch, at: float, ranks: Sequence[int] = range(RANKS), phase: Phase = "train", step: int = 1) -> None:
    for rank in ranks:
        made.take(beat(rank, "alive", phase, step), at)


def test_a_rank_that_is_behind_is_named() -> None:
    made = watch(steps=(5, 5, 4, 5))
    live(made, 11.0)
    (verdict,) = made.judge(11.0, RUNNING)
    assert (verdict.cause, verdict.ranks, verdict.step) == ("behind", (2,), 4)
    assert "rank 2: no progress, and the others wait for it" in str(verdict)


def test_a_rank_in_a_phase_of_its_own_is_named() -> None:
    made = watch()
    for rank in (0, 1, 3):
        made.take(beat(rank, phase="validate"), 1.0)
    live(made, 12.0)
    (verdict,) = made.judge(12.0, RUNNING)
    assert (verdict.cause, verdict.ranks, verdict.phase) == ("behind", (2,), "train")


def test_all_together_is_nobodys_fault() -> None:
    made = watch()
    live(made, 11.0)
    (verdict,) = made.judge(11.0, RUNNING)
    assert (verdict.cause, verdict.ranks) == ("hung together", (0, 1, 2, 3))


@pytest.mark.parametrize(("state", "cause"), [("T", "stopped"), ("R", "interpreter held"), ("S", "interpreter held")])
def test_silence_is_told_apart_by_the_process(state: str, cause: str) -> None:
    made = watch(progress_timeout=1000.0)
    live(made, 11.0, ranks=(0, 1, 2))
    assert not made.judge(9.9, {**RUNNING, 3: state})
    (verdict,) = made.judge(11.0, {**RUNNING, 3: state})
    assert (verdict.cause, verdict.ranks) == (cause, (3,))


def test_a_process_that_is_gone_is_told_at_once_and_one_that_said_goodbye_is_not() -> None:
    made = watch()
    processes = dict.fromkeys((0, 1, 2), "S")
    (verdict,) = made.judge(0.1, processes)
    assert (verdict.cause, verdict.ranks) == ("died", (3,))
    made.take(beat(3, "end"), 0.2)
    assert made.judge(0.3, processes) == []


def test_another_process_of_the_rank_starts_anew() -> None:
    made = watch(steps=(9, 9, 9, 9))
    made.take(Beat(rank=2, pid=999, kind="alive", phase="init", step=0), 50.0)
    live(made, 50.0, ranks=(0, 1, 3))
    for rank in (0, 1, 3):
        made.take(beat(rank, step=10), 50.0)
    assert made.judge(50.1, RUNNING) == []


def test_a_checkpoint_a_first_step_and_the_start_may_take_longer() -> None:
    for phase in ("init", "first step", "checkpoint"):
        made = watch(progress_timeout=5.0)
        for rank in range(RANKS):
            made.take(beat(rank, phase=phase), 0.0)
        just_before, after = FLOORS[phase] - 1, FLOORS[phase] + 1
        live(made, just_before, phase=phase)
        assert made.judge(just_before, RUNNING) == []
        live(made, after, phase=phase)
        assert len(made.judge(after, RUNNING)) == 1


def test_limits_are_learned_and_have_floors() -> None:
    limits = Limits("auto")
    assert limits.of("train") == FLOORS["first step"], "nothing is known yet"
    for _ in range(10):
        limits.saw("train", 0.1)
    assert limits.of("train") == FLOORS["train"]
    for _ in range(10):
        limits.saw("train", 30.0)
    assert limits.of("train") == 150.0
    assert limits.of("checkpoint") == FLOORS["checkpoint"]
    assert Limits(2000.0).of("checkpoint") == 2000.0 and Limits(2.0).of("train") == 2.0
    for wrong in (0, -1, "often", None):
        with pytest.raises(ConfigurationError, match="progress_timeout"):
            Limits(wrong)  # type: ignore[arg-type]


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, RANKS - 1), st.floats(0.0, 9.0), st.sampled_from(["step", "validate", "checkpoint"])),
        min_size=1,
        max_size=30,
    )
)
def test_pauses_below_the_limits_raise_no_alarm(pauses: list[tuple[int, float, str]]) -> None:
    """One rank after the other is suspended, or busy, for less than the limits; the others wait for it, and live."""
    made = watch()
    now, step = 0.0, 1
    for who, seconds, what in pauses:
        phase: Phase = "checkpoint" if what == "checkpoint" else "validate" if what == "validate" else "train"
        for rank in range(RANKS):
            if phase != "train":
                made.take(beat(rank, phase=phase, step=step), now)
        begin = now
        while now - begin + 1.0 < seconds:
            now += 1.0
            live(made, now, [rank for rank in range(RANKS) if rank != who], phase, step)
            state = {**RUNNING, who: "T"}
            assert made.judge(now, state) == []
        now = begin + seconds
        step += 1
        live(made, now, phase=phase, step=step)
        for rank in range(RANKS):
            made.take(beat(rank, step=step), now)
        assert made.judge(now, RUNNING) == []


def test_what_is_no_beat_is_no_harm() -> None:
    whole = beat(1).to_bytes()
    for data in (b"", b"{}", b"[1]", b"\xff", b'{"rank": 1}', whole[:-3], whole.replace(b"{}", b"7")):
        assert Beat.from_bytes(data) is None
    assert Beat.from_bytes(beat(3).to_bytes()) == beat(3)
