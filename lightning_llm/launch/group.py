"""The launchers of a run's nodes: how they find each other, and what they tell each other through torch's store.

`Meeting` is torch's elastic rendezvous (the one of torchrun, backend c10d). Each round of it is an attempt to run the
program; `Group` is the nodes of one round. All that is said has the round's own keys, so that nothing of an earlier
attempt is taken for news.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from lightning_llm.resilience.restarts import Decision, Failure

BEAT_EVERY = 1.0  # seconds
NODE_TIMEOUT = 10.0  # without a beat, by the receiver's clock
DECISION_TIMEOUT = 30.0
_KEEP_ALIVE_EVERY, _KEEP_ALIVES = 2, 3  # seconds; how many may be missed in the rendezvous itself


class LostError(RuntimeError):
    """The other nodes cannot be reached, or have not come."""


class ClosedError(RuntimeError):
    """Another node has ended the run."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the launchers meet.

    Attributes:
        host: Of the node that hosts the store.
        port: There; 0 for any, on one node.
        run_id: Of the run.
        min_nodes: With fewer nothing is started.
        max_nodes: More are not taken.
        join_timeout: Seconds to wait for `min_nodes`.
        last_call: Seconds to wait for further nodes once there are `min_nodes`.
        local_address: This node's, as the others can reach it; None asks the system.
    """

    host: str
    port: int
    run_id: str
    min_nodes: int
    max_nodes: int
    join_timeout: float
    last_call: float
    local_address: str | None = None


class Meeting:
    """This node's seat at the rendezvous of a run.

    Args:
        address: Where.

    Raises:
        LostError: The store cannot be reached.
    """

    def __init__(self, address: Address) -> None:
        # Each attempt's ranks get a store of their own, in which there is nothing of the one before.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self._of_ranks: Store | None = None
        self.address = address
        self._where = f" at {address.host}:{address.port}"
        alone = address.max_nodes == 1
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=f"{address.host}:{address.port}",
            run_id=address.run_id,
            min_nodes=address.min_nodes,
            max_nodes=address.max_nodes,
            local_addr="localhost" if alone else address.local_address,
            join_timeout=int(address.join_timeout),
            last_call_timeout=int(address.last_call),
            keep_alive_interval=_KEEP_ALIVE_EVERY,
            keep_alive_max_attempt=_KEEP_ALIVES,
            **({"is_host": True} if alone else {}),
        )
        try:
            backend, self._store = create_backend(parameters)
            self._handler = create_handler(self._store, backend, parameters)
        except (RendezvousConnectionError, DistError) as error:
            raise LostError(f"no store{self._where}: {error.__cause__ or error}") from error

    def join(self) -> Group:
        """Waits until enough nodes have come; returns those of the next attempt.

        Raises:
            LostError: They have not come in time.
            ClosedError: The run has been ended.
        """
        try:
            with _reachable(self._where):
                info = self._handler.next_rendezvous()
                main = info.bootstrap_store_info
                assert main is not None  # with stores of their own there always is one
                if info.rank == 0:
                    info.store.set("attempt", str(self._store.add("lightning_llm/attempts", 1)))
                    self._of_ranks = TCPStore(main.master_addr, 0, is_master=True, wait_for_workers=False)
                    info.store.set("port", str(self._of_ranks.port))
                number, port = int(info.store.get("attempt")), int(info.store.get("port"))
        except RendezvousClosedError as error:
            raise ClosedError("another node has ended the run") from error
        except RendezvousTimeoutError as error:
            raise LostError(
                f"fewer than {self.address.min_nodes} nodes came{self._where} within {self.address.join_timeout:g} s"
            ) from error
        return Group(
            number=number,
            node=info.rank,
            nodes=info.world_size,
            main_address=main.master_addr,
            main_port=port,
            store=info.store,
        )

    @property
    def newcomers(self) -> int:
        """Nodes that wait to be taken in."""
        with _reachable(self._where):
            return self._handler.num_nodes_waiting()

    def leave(self) -> None:
        """Ends the run for all nodes that would meet again."""
        self._handler.shutdown()


@contextmanager
def _reachable(where: str = "") -> Iterator[None]:
    """Turns torch's errors of a lost store into ours."""
    try:
        yield
    except (DistError, RendezvousConnectionError, RendezvousStateError, ConnectionError) as error:
        raise LostError(f"the launchers' store{where} is gone: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What all nodes hold an attempt's end to be.

    Attributes:
        failure: The one that the others follow from.
        progress: The step that a restart goes on from.
        decision: What comes next.
    """

    failure: Failure
    progress: int
    decision: Decision


@dataclass(kw_only=True)
class Group:
    """The nodes of one attempt.

    Attributes:
        number: Of the attempt, from 1.
        node: This one's.
        nodes: How many.
        main_address: Where rank 0 is, and the store of this attempt's ranks.
        main_port: Of that store; node 0 hosts it.
        store: With this attempt's keys alone.
    """

    number: int
    node: int
    nodes: int
    main_address: str
    main_port: int
    store: Store
    _beat: int = 0
    _beat_due: float = 0.0
    _heard: dict[int, tuple[bytes, float]] = field(default_factory=dict)

    # -- nodes that are gone --

    def lost_node(self) -> int | None:
        """Sends this node's beat when it is due; returns a node that is heard no more, if there is one.

        Node 0 listens to all others, and they to it.
        """
        now = time.monotonic()
        if self.nodes == 1 or now < self._beat_due:
            return None
        self._beat_due = now + BEAT_EVERY
        self._beat += 1
        with _reachable():
            self.store.set(f"beat/{self.node}", str(self._beat))
            others = range(1, self.nodes) if self.node == 0 else (0,)
            for other in others:
                value = self.store.get(f"beat/{other}") if self.store.check([f"beat/{other}"]) else b""
                before, since = self._heard.get(other, (None, now))
                if value != before:
                    self._heard[other] = (value, now)
                elif now - since > NODE_TIMEOUT:
                    return other
        return None

    # -- done --

    def finish(self) -> None:
        """Says that this node's ranks have all ended well."""
        with _reachable():
            self.store.set(f"done/{self.node}", "1")

    @property
    def finished(self) -> bool:
        """Whether all nodes' ranks have."""
        with _reachable():
            return self.store.check([f"done/{node}" for node in range(self.nodes)])

    def part(self) -> None:
        """Lets the others hear the last word, before a store that this process may host is gone."""
        if self.nodes == 1:
            return
        with suppress(DistError):
            self.store.set(f"bye/{self.node}", "1")
            self.store.wait([f"bye/{node}" for node in range(self.nodes)], timedelta(seconds=NODE_TIMEOUT))

    # -- failed --

    @property
    def broken(self) -> bool:
        """Whether any other node has reported a failure."""
        if self.nodes == 1:
            return False
        with _reachable():
            return self.store.check(["decider"])

    def report(self, failure: Failure) -> None:
        """Tells the others what was seen here."""
        with _reachable():
            self.store.set(f"failure/{self.node}", json.dumps(asdict(failure)))

    def settle(self, decide: Callable[[list[Failure]], Settled], gather: float) -> Settled:
        """One decision for all nodes: by the first that comes here, once the others had time to report.

        Args:
            decide: Of what was reported.
            gather: Seconds to wait for reports.
        """
        me = str(self.node)
        with _reachable():
            if self.store.compare_set("decider", "", me).decode() == me:
                if self.nodes > 1:
                    time.sleep(2 * gather)  # they take that long to tell causes from consequences of their own
                reports = [f"failure/{node}" for node in range(self.nodes)]
                failures = [Failure(**json.loads(self.store.get(key))) for key in reports if self.store.check([key])]
                self.store.set("decision", json.dumps(asdict(decide(failures))))
            self.store.wait(["decision"], timedelta(seconds=DECISION_TIMEOUT))
            said = json.loads(self.store.get("decision"))
        return Settled(
            failure=Failure(**said["failure"]), progress=said["progress"], decision=Decision(**said["decision"])
        )
