"""The collectives that ranks have called last, as torch's flight recorder has them, and who has not come to one.

A rank writes them beside its stacks when it is asked. They tell more than stacks do: where two ranks wait for each
other, the one that has called fewer collectives of their group is the one that is waited for.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

KEPT = 20  # of each group, the newest
BUFFER_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # new and old name
BUFFER_SIZE = "500"  # collectives; none are recorded unless one is set before processes connect


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call.

    Attributes:
        group: Name of the process group.
        number: In the group, from 1 on, the same on all its ranks.
        name: Such as "gloo:all_reduce".
        sizes: Of its inputs.
    """

    group: str
    number: int
    name: str
    sizes: list[list[int]]


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank writes its own."""
    return folder / f"collectives-rank{rank}.json"


def write(folder: Path, rank: int, traces: Iterable[str]) -> None:
    """Writes what is in the recorder's traces, in their JSON form; sends and receives are left out."""
    by_group: dict[str, list[Collective]] = defaultdict(list)
    for trace in traces:
        for entry in json.loads(trace).get("entries", []):
            if not entry["is_p2p"]:
                group = str(entry["process_group"][0])
                by_group[group].append(
                    Collective(
                        group=group,
                        number=entry["collective_seq_id"],
                        name=entry["profiling_name"],
                        sizes=entry["input_sizes"],
                    )
                )
    kept = [asdict(call) for calls in by_group.values() for call in calls[-KEPT:]]
    made = file_of(folder, rank).with_suffix(".new")
    made.write_text(json.dumps(kept, indent=0))
    made.replace(file_of(folder, rank))


def read(folder: Path, rank: int) -> list[Collective]:
    """What a rank has written; nothing where it has not."""
    try:
        return [Collective(**call) for call in json.loads(file_of(folder, rank).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def waited_for(ranks: Mapping[int, Iterable[Collective]]) -> dict[int, str]:
    """Ranks that others wait for, each with the collective that it has not come to.

    In a group a rank is waited for if it has called fewer collectives than another, or another one than most have at
    the same place. Who waits in some group is not to blame for being late in the next one.
    """
    last: dict[str, dict[int, Collective]] = defaultdict(dict)
    for rank, calls in ranks.items():
        for call in calls:
            if rank not in last[call.group] or last[call.group][rank].number < call.number:
                last[call.group][rank] = call
    late: dict[int, str] = {}
    waiting: set[int] = set()
    for calls_of in last.values():
        newest = max(calls_of.values(), key=lambda call: call.number)
        ahead = {rank: call for rank, call in calls_of.items() if call.number == newest.number}
        behind = calls_of.keys() - ahead.keys()
        (usual, times), *_ = Counter(call.name for call in ahead.values()).most_common(1)
        if times * 2 > len(ahead):
            behind |= {rank for rank, call in ahead.items() if call.name != usual}
        if behind:
            waiting |= ahead.keys() - behind
            late |= dict.fromkeys(behind, f"{usual} number {newest.number} of group {newest.group}")
    return {rank: what for rank, what in sorted(late.items()) if rank not in waiting}
