"""Which rank is slow: each rank's own time, since the step's time is that of the slowest on all of them.

A callback for any strategy with several processes. How a rank's own time is measured is in `OwnTime`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_llm.errors import ConfigurationError, StragglerError
from lightning_llm.strategies.processes import ProcessGrid

log = logging.getLogger(__name__)

EVICT_AFTER = 3  # windows in a row: a restart costs minutes, a passing disturbance less


class Medians(NamedTuple):
    """Seconds of a step of this rank, medians over a window."""

    computes: float
    between: float
    step: float
    stage: float


class Scores(NamedTuple):
    """What the ranks have agreed on.

    Attributes:
        scores: By rank: the median of its peers' computing time over its own, at most 1; low is slow.
        slow: Rank -> how many times the median it computes.
        late: Rank -> seconds a step by which it is longer between steps than the median rank.
    """

    scores: list[float]
    slow: dict[int, float]
    late: dict[int, float]


class Stragglers(Callback):
    """Finds ranks that compute slowly, and ranks that begin their steps late.

    In synchronous training everyone waits for the slowest, so all ranks see its step time. This callback compares what
    each does alone:

    - On a CPU: the time that the main thread spends on a processor from a batch's start to its end. Waiting in a
      collective takes none. Found are slow cores and additional work; not found is a core that other processes use.
    - On CUDA: a matrix product, a few milliseconds between CUDA events at the end of five steps a window, when no
      collective of the step is left in the stream. Found are slow devices; not found is additional work on one rank,
      since events around a forward would include waiting in NCCL.
    - On both: the wall time between steps, where data are loaded and other callbacks run. A rank whose exceeds the
      median by `threshold - 1` steps is told, with these words, as late; it does not compute slowly, and is never
      evicted for it.

    Medians over a window of steps are exchanged in one gather of four numbers a rank, over gloo, begun at one step's
    end and read at the next's: neither host nor device waits for it. Pipeline stages have different work, so on a CPU a
    rank is compared with those of its stage only.

    Loggers get once a window `stragglers/worst_score` (1 is as fast as the median or faster) and `stragglers/rank`
    which has it. A warning names rank, host and by how much, when a rank becomes slow or late; a line says when all are
    well again.

    Args:
        every_n_steps: The window, optimizer steps.
        threshold: A straggler takes more than so many times the median.
        evict: Raise `StragglerError`, which ends the program with 75, on a rank that computed slowly in 3 windows in a
            row. Whoever restarts the run should leave its host out.

    Attributes:
        found: The latest `Scores`; None before the first window ended, and in a run of one process.

    Raises:
        ConfigurationError: Settings out of range.

    Source: the thresholds of nvidia-resiliency-ext, whose kernel timings need CUPTI.
    """

    def __init__(self, every_n_steps: int = 20, threshold: float = 1.3, evict: bool = False) -> None:
        if every_n_steps < 2:
            raise ConfigurationError(f"Stragglers(every_n_steps={every_n_steps}): a window has 2 steps or more.")
        if threshold <= 1:
            raise ConfigurationError(f"Stragglers(threshold={threshold}): it must be above 1, the median itself.")
        self.every_n_steps = every_n_steps
        self.threshold = threshold
        self.evict = evict
        self.found: Scores | None = None
        self._group: dist.ProcessGroup | None = None
        self._hosts: list[str] = []
        self._own: OwnTime | None = None
        self._last_step = 0
        self._steps = 0
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._in_a_row = 0
        self._told: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found, self._pending, self._own = None, None, None
        self._steps, self._in_a_row, self._told = 0, 0, (frozenset(), frozenset())
        self._last_step = trainer.global_step
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # A group of its own: the gather must not queue behind the device's work, nor meet other collectives of gloo.
        self._group = dist.new_group(backend="gloo")
        self._hosts = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname(), group=self._group)
        self._own = OwnTime(trainer.strategy.root_device, self.every_n_steps, _stage(trainer))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._own is not None:
            self._own.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._own is None:
            return
        ends_step = trainer.global_step != self._last_step
        if ends_step:
            self._last_step = trainer.global_step
            self._steps += 1
            self._read(trainer)
        self._own.end(ends_step)
        if ends_step and self._steps % self.every_n_steps == 0:
            self._ask()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._group is not None:
            self._read(trainer)
            dist.destroy_process_group(self._group)
            self._group, self._own = None, None

    def _ask(self) -> None:
        assert self._own is not None
        mine = torch.tensor(self._own.medians(), dtype=torch.float64)
        everyone = mine.new_empty(len(self._hosts) * len(mine))
        work = dist.all_gather_into_tensor(everyone, mine, group=self._group, async_op=True)
        assert work is not None
        self._pending = (work, everyone)

    def _read(self, trainer: Trainer) -> None:
        """What was asked for at the step before: every rank has answered by now, or will at once."""
        if self._pending is None:
            return
        work, everyone = self._pending
        self._pending = None
        work.wait()
        rows = everyone.view(len(self._hosts), -1).tolist()
        self.found = judge([Medians(*row) for row in rows], self.threshold)
        worst = min(range(len(rows)), key=self.found.scores.__getitem__)
        # Not `LightningModule.log`, which would cost more at every step than all the rest does in a window.
        for logger in trainer.loggers:
            figures = {"stragglers/worst_score": self.found.scores[worst], "stragglers/rank": float(worst)}
            logger.log_metrics(figures, step=trainer.global_step)
        self._tell(self.found)
        me = dist.get_rank()
        self._in_a_row = self._in_a_row + 1 if me in self.found.slow else 0
        if self.evict and self._in_a_row >= EVICT_AFTER:
            error = StragglerError(
                f"rank {me} on {self._hosts[me]} computed {self.found.slow[me]:.2f}x as long as the median rank in "
                f"{EVICT_AFTER} windows of {self.every_n_steps} steps. Restart without this host."
            )
            log.error(str(error))  # a SystemExit ends the program without a word
            raise error

    def _tell(self, found: Scores) -> None:
        """Once per change."""
        now = (frozenset(found.slow), frozenset(found.late))
        before, self._told = self._told, now
        if now == before:
            return
        for rank, ratio in found.slow.items():
            rank_zero_warn(
                f"Straggler: rank {rank} on {self._hosts[rank]} computes {ratio:.2f}x as long as the median rank "
                f"(score {found.scores[rank]:.2f}); all others wait for it."
            )
        for rank, seconds in found.late.items():
            rank_zero_warn(
                f"Late: rank {rank} on {self._hosts[rank]} spends {1000 * seconds:.0f} ms more between steps than the "
                "median rank, loading data or in callbacks; all others wait for it. It does not compute slowly by that."
            )
        if not found.slow and not found.late:
            rank_zero_info("No rank is slow or late any more.")


class OwnTime:
    """What one rank does alone, over a window of steps.

    Args:
        device: That it computes on.
        window: Steps.
        stage: Ranks with the same number have the same work.
    """

    def __init__(self, device: torch.device, window: int, stage: int) -> None:
        self._probe = Probe(device) if device.type == "cuda" else None
        self._probe_every = max(1, window // 5)
        self._stage = 0 if self._probe else stage  # the product is the same on all
        self._computes: deque[float] = deque(maxlen=window)
        self._between: deque[float] = deque(maxlen=window)
        self._steps: deque[float] = deque(maxlen=window)
        self._count = 0
        self._of_step = [0.0, 0.0]
        self._processor = 0.0
        self._ended = self._step_ended = time.perf_counter()

    def start(self) -> None:
        """A batch begins."""
        self._of_step[1] += time.perf_counter() - self._ended
        self._processor = time.thread_time()

    def end(self, ends_step: bool) -> None:
        """A batch ends, and with it perhaps an optimizer step."""
        self._of_step[0] += time.thread_time() - self._processor
        now = time.perf_counter()
        if ends_step:
            self._count += 1
            self._between.append(self._of_step[1])
            self._steps.append(now - self._step_ended)
            if self._probe is None:
                self._computes.append(self._of_step[0])
            elif self._count % self._probe_every == 0:
                self._probe.begin()
            self._of_step = [0.0, 0.0]
            self._step_ended = now
        self._ended = now

    def medians(self) -> Medians:
        """Medians over the window; a pause or a validation in one of its steps does not move them."""
        if self._probe is not None:
            self._computes.extend(self._probe.finished())
        computes = median(self._computes) if self._computes else 0.0
        return Medians(computes, median(self._between), median(self._steps), self._stage)


class Probe:
    """Times a matrix product on a CUDA device without waiting for it.

    Args:
        device: CUDA.
    """

    SIZE = 4096
    MILLISECONDS = 2.0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        values = torch.arange(self.SIZE**2, device=device).remainder_(7).view(self.SIZE, self.SIZE).to(dtype)
        self._matrix, self._out = values, torch.empty_like(values)
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._products = 1
        # The only wait, before the first step: how many products take long enough to be timed well.
        for _ in range(2):
            self.begin()
            torch.cuda.synchronize(device)
            [seconds] = self.finished()
        self._products = max(1, round(self.MILLISECONDS / 1000 / seconds))

    def begin(self) -> None:
        """Puts products behind what the device has to do, between two events."""
        with torch.cuda.device(self._device), torch.no_grad():
            torch.mm(self._matrix, self._matrix, out=self._out)  # another kernel's caches are not ours
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(self._products):
                torch.mm(self._matrix, self._matrix, out=self._out)
            last.record()
        self._running.append((first, last))

    def finished(self) -> list[float]:
        """Seconds of one product, of each time that the device has come to by now."""
        seconds = []
        while self._running and self._running[0][1].query():
            first, last = self._running.popleft()
            seconds.append(first.elapsed_time(last) / 1000 / self._products)
        return seconds


def judge(medians: list[Medians], threshold: float) -> Scores:
    """Who is slow, and who is late.

    Medians are low ones (of two ranks the faster), since half of the ranks may be slow.

    Args:
        medians: By rank.
        threshold: Of a straggler's time over the median.
    """
    scores, slow, late = [], {}, {}
    usual = _low_median([rank.between for rank in medians])
    step = _low_median([rank.step for rank in medians])
    for rank, own in enumerate(medians):
        peers = _low_median([peer.computes for peer in medians if peer.stage == own.stage])
        ratio = own.computes / peers if peers > 0 else 1.0
        scores.append(1 / max(ratio, 1.0))
        if ratio > threshold:
            slow[rank] = ratio
        if own.between - usual > (threshold - 1) * (step - (own.between - usual)):
            late[rank] = own.between - usual
    return Scores(scores, slow, late)


def _low_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def _stage(trainer: Trainer) -> int:
    """Pipeline stage of this rank, 0 without a pipeline."""
    strategy = trainer.strategy
    return strategy.meshes.pipeline.get_local_rank() if isinstance(strategy, ProcessGrid) else 0
