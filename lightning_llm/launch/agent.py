"""The launcher of one node: starts its ranks, watches them through the node's monitor, and starts them again.

commands.py calls `Launcher.run`. The launchers of several nodes do the same things at the same time: an attempt ends on
all of them when it ends on one, and what comes next is decided once (group.py).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from lightning_llm.launch.group import ClosedError, Group, LostError, Meeting, Settled
from lightning_llm.launch.ranks import Ranks
from lightning_llm.launch.worker import Report, read_report
from lightning_llm.resilience.collectives import BUFFER_SIZE, BUFFER_VARIABLES
from lightning_llm.resilience.environment import ELASTIC_VARIABLE, MONITOR_VARIABLE
from lightning_llm.resilience.monitor import Monitor
from lightning_llm.resilience.restarts import (
    FAILED,
    FINAL_CODES,
    REQUEUE,
    Attempt,
    Decision,
    Failure,
    RestartPolicy,
    root_cause,
)

CHECK_EVERY = 0.1  # seconds
ASK_EVERY = 0.5  # seconds between questions to the other nodes
GATHER = 1.0  # seconds in which other ranks' and nodes' failures are waited for, to tell cause from consequence
FAREWELL = 30.0  # seconds for the other ranks, once one has ended after all were told to stop
HAND_OVER = 300.0  # seconds to save in, when further nodes are to be taken in

Ending = Literal["done", "failed", "resized", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What every node runs.

    Attributes:
        words: See `worker.run`.
        ranks_per_node: Processes.
        usable_nodes: Of so many nodes, how many get ranks; the others stand by.
    """

    words: Sequence[str]
    ranks_per_node: int
    usable_nodes: dict[int, int]


class _StopAskedError(BaseException):
    """A signal has come while nothing but a signal could end the waiting; nobody may take it for an error."""


class Launcher:
    """See the file.

    Args:
        program: To run.
        meeting: With the other nodes' launchers.
        monitor: Of this node's ranks, whose folder is the launcher's too.
        policy: Whether a run that fails is started again.
        logs: Folder for the ranks' output; None leaves it on the launcher's.
    """

    def __init__(
        self, program: Program, meeting: Meeting, monitor: Monitor, policy: RestartPolicy, logs: Path | None = None
    ) -> None:
        self._program = program
        self._meeting = meeting
        self._monitor = monitor
        self._policy = policy
        self._ranks = Ranks(program.words, monitor.folder, logs)
        self._history: list[Attempt] = []
        self._told: list[signal.Signals] = []
        self._handed_on = 0
        self._joining = False

    def run(self) -> int:
        """Until the program has ended well, or there is no sense in starting it again; returns the exit code."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(signum, self._note)
        try:
            while True:
                group = self._join()
                ending = self._attempt(group)
                if ending == "done":
                    group.part()
                    return 0
                if ending == "stopped":
                    if self._code_of_stop() == REQUEUE:  # on the other nodes the ranks end with it too
                        group.part()
                    return self._code_of_stop()
                if ending == "failed":
                    settled = group.settle(self._settle, GATHER)
                    self._history.append(
                        Attempt(failure=settled.failure, progress=settled.progress, ended=time.monotonic())
                    )
                    if not settled.decision.restart:
                        group.part()
                        return self._give_up(settled)
                    _say(f"{settled.failure.who}: {settled.failure.text}; {_restarting(settled.decision)}")
                    self._monitor.status.restarted(settled.failure.kind)
                    self._sleep(settled.decision.delay)
                if self._told:
                    return self._code_of_stop()
        except _StopAskedError:
            return self._code_of_stop()
        except LostError as error:
            _say(f"{error}; the job can be queued again")
            return REQUEUE
        except ClosedError as error:
            _say(str(error))
            return self._code_of_stop() if self._told else FAILED
        finally:
            self._ranks.kill()
            with suppress(LostError, RuntimeError):
                self._meeting.leave()

    def _join(self) -> Group:
        """Meets the others; a signal ends the waiting."""
        self._joining = True
        try:
            return self._meeting.join()
        finally:
            self._joining = False

    # -- one attempt --

    def _attempt(self, group: Group) -> Ending:
        """Starts this node's ranks and watches them to their end; returns which."""
        usable = self._program.usable_nodes[group.nodes]
        self._ranks.clear()
        if group.node < usable:
            environments = environments_of(
                group, usable, self._program.ranks_per_node, self._meeting.address.run_id, len(self._history)
            )
            environments = {rank: {**env, **self._own_variables()} for rank, env in environments.items()}
            self._monitor.start_over(len(environments))
            self._ranks.start(environments, group.number)
            processes = ", ".join(f"rank {rank} is process {pid}" for rank, pid in self._ranks.pids.items())
            _say(f"attempt {group.number} on {socket.gethostname()}: {processes}")
        else:
            _say(f"{group.nodes} nodes have come and the layout has room for {usable}: this one stands by")
        try:
            return self._watch(group)
        finally:
            self._ranks.kill()

    def _own_variables(self) -> dict[str, str]:
        address = self._meeting.address
        recorder = {name: os.environ.get(name, BUFFER_SIZE) for name in BUFFER_VARIABLES}
        elastic = {ELASTIC_VARIABLE: "1"} if address.min_nodes < address.max_nodes else {}
        return {MONITOR_VARIABLE: str(self._monitor.folder), **recorder, **elastic}

    def _watch(self, group: Group) -> Ending:
        said_done, ask_due = False, 0.0
        while True:
            self._ranks.look(CHECK_EVERY)
            self._monitor.turn(0.0)
            self._hand_on_signals()
            bad = [code for code in self._ranks.exits.values() if code]
            if self._told:
                if self._stopped():
                    return "stopped"
            elif bad:
                if all(code == REQUEUE for code in bad) and self._meeting.newcomers:
                    return self._hand_over()  # another launcher was the first to see them
                group.report(self._failure())
                return "failed"
            if not said_done and not self._ranks.pids and not bad:
                group.finish()
                said_done = True
            if said_done and group.finished:
                return "done"
            if time.monotonic() < ask_due:
                continue
            ask_due = time.monotonic() + ASK_EVERY
            if group.broken:
                return "failed"
            lost = group.lost_node()
            if lost is not None:
                group.report(Failure(kind="node lost", code=FAILED, who=f"node {lost}", text="is heard no more"))
                return "failed"
            if not said_done and group.nodes < self._meeting.address.max_nodes and self._meeting.newcomers:
                return self._hand_over()

    def _hand_over(self) -> Ending:
        """Lets the ranks save before they are started again together with nodes that have come since."""
        _say("further nodes have come: saving, to go on with them")
        self._ranks.signal(signal.SIGUSR1)
        deadline = time.monotonic() + HAND_OVER
        while self._ranks.pids and time.monotonic() < deadline and not self._told:
            self._ranks.look(CHECK_EVERY)
            self._monitor.turn(0.0)
            if any(code not in (0, REQUEUE) for code in self._ranks.exits.values()):
                break
        return "resized"

    def _stopped(self) -> bool:
        """After a signal: whether all ranks have ended, of themselves or because they took too long."""
        if self._ranks.pids and not self._ranks.exits and len(self._told) < 2:
            return False
        if len(self._told) < 2:
            deadline = time.monotonic() + FAREWELL
            while self._ranks.pids and time.monotonic() < deadline and len(self._told) < 2:
                self._ranks.look(CHECK_EVERY)
        self._ranks.kill()
        return True

    # -- signals --

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._told.append(signal.Signals(signum))
        if self._joining:
            raise _StopAskedError

    def _hand_on_signals(self) -> None:
        while self._handed_on < len(self._told):
            self._ranks.signal(self._told[self._handed_on])
            self._handed_on += 1

    def _code_of_stop(self) -> int:
        """What the ranks ended with; where a signal ended them, what it stands for."""
        exits = self._ranks.exits
        if exits and not any(exits.values()):
            return 0
        first = self._told[0]
        if first not in (signal.SIGTERM, signal.SIGUSR1):
            return 128 + first
        return max((code for code in exits.values() if code > 0), default=REQUEUE)

    # -- failures --

    def _failure(self) -> Failure:
        """This node's, of the ranks that ended badly; the others get a moment, to tell cause from consequence."""
        deadline = time.monotonic() + GATHER
        first = dict(self._ranks.exits)
        while self._ranks.pids and time.monotonic() < deadline:
            self._ranks.look(CHECK_EVERY)
        exits = {rank: code for rank, code in self._ranks.exits.items() if code}
        # Those of the first look come first; among them, in the order in which they reported.
        reports = {rank: read_report(self._monitor.folder, rank) for rank in exits}
        order = sorted(
            exits, key=lambda rank: (not first.get(rank), report.time if (report := reports[rank]) else 0.0, rank)
        )
        return root_cause([self._failure_of(rank, exits[rank], reports[rank]) for rank in order])

    def _failure_of(self, rank: int, code: int, report: Report | None) -> Failure:
        who = f"rank {rank} on {socket.gethostname()}"
        state = self._monitor.watch.ranks.get(rank)
        step = state.step if state is not None else 0
        blamed = self._monitor.ended.get(rank)
        if blamed is not None:
            consequence = blamed.cause == "hung together"
            return Failure(kind="hang", code=code, who=who, text=blamed.text, step=step, consequence=consequence)
        if code < 0:
            text = f"killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"signal {-code}"
            return Failure(kind="signal", code=code, who=who, text=text, step=step)
        if report is None:
            text = "" if code in FINAL_CODES else f"exit code {code}"
            return Failure(kind="exit", code=code, who=who, text=text, step=step)
        return Failure(
            kind="exit",
            code=code,
            who=who,
            text=report.text,
            place=report.place,
            step=step,
            consequence=report.consequence,
        )

    def _settle(self, failures: list[Failure]) -> Settled:
        failure = root_cause(failures)
        progress = max(self._monitor.watch.began, self._monitor.status.checkpoint_step)
        attempt = Attempt(failure=failure, progress=progress, ended=time.monotonic())
        decision = self._policy.decide([*self._history, attempt])
        return Settled(failure=failure, progress=progress, decision=decision)

    def _give_up(self, settled: Settled) -> int:
        failure, decision = settled.failure, settled.decision
        if decision.code not in FINAL_CODES or decision.reason != failure.text:
            _say(f"{failure.who}: {failure.text}; not started again: {decision.reason}")
        return decision.code

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._told and time.monotonic() < deadline:
            time.sleep(CHECK_EVERY)


def environments_of(
    group: Group, nodes: int, ranks_per_node: int, run_id: str, restarts: int
) -> dict[int, dict[str, str]]:
    """torchrun's variables for each rank of this node, by global rank."""
    world_size = nodes * ranks_per_node
    shared = {
        "GROUP_RANK": group.node,
        "GROUP_WORLD_SIZE": nodes,
        "LOCAL_WORLD_SIZE": ranks_per_node,
        "WORLD_SIZE": world_size,
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": world_size,
        "MASTER_ADDR": group.main_address,
        "MASTER_PORT": group.main_port,
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": restarts,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1 if ranks_per_node > 1 else os.cpu_count() or 1),
    }
    first = group.node * ranks_per_node
    environments = {
        first + local: {**shared, "LOCAL_RANK": local, "RANK": first + local, "ROLE_RANK": first + local}
        for local in range(ranks_per_node)
    }
    return {rank: {name: str(value) for name, value in each.items()} for rank, each in environments.items()}


def _restarting(decision: Decision) -> str:
    return f"starting again in {decision.delay:.1f} s" if decision.delay else "starting again"


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
