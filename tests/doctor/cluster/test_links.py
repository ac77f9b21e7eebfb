"""Who exchanges data with whom, and how many at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.doctor.cluster.links import pairs_of, rounds_of


def test_pairs_are_neighbours_in_the_ring_and_those_of_the_same_place_on_other_hosts() -> None:
    assert pairs_of(["a"]) == []
    assert pairs_of(["a", "a"]) == [(0, 1)]
    assert pairs_of(["a"] * 4) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert pairs_of(["a", "a", "b", "b"]) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans())
def test_all_pairs_are_measured_once_and_none_at_a_time_share_anything(sizes: list[int], own_units: bool) -> None:
    hosts = [f"host{number}" for number, size in enumerate(sizes) for _ in range(size)]
    units = [f"{host}/{rank}" if own_units else host for rank, host in enumerate(hosts)]
    pairs = pairs_of(hosts)
    rounds = rounds_of(pairs, units)
    assert sorted(pair for chosen in rounds for pair in chosen) == pairs
    for chosen in rounds:
        used = [unit for pair in chosen for unit in {units[rank] for rank in pair}]
        assert len(used) == len(set(used))
    measured = {rank for pair in pairs for rank in pair}
    assert measured == (set(range(len(hosts))) if len(hosts) > 1 else set())
    if len(sizes) > 1 and len(set(sizes)) == 1:
        across = {rank for pair in pairs if hosts[pair[0]] != hosts[pair[1]] for rank in pair}
        assert across == set(range(len(hosts))), "every rank's way to another host"
    if own_units:
        assert len(rounds) <= 7, "as many rounds whatever the size: a rank has four links at most"
