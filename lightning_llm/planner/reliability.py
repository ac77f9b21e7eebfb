"""The effective training time ratio (ETTR): what share of a run's wall time trains, and where the rest goes.

A closed formula for failures that know nothing of each other, and a simulation for those that come in bursts. The plan
shows both; `Interruptions` is what its options say.

The model: training is saved every `interval` seconds and stands still `blocked` seconds for it; a save is safe
`written` seconds later, and until then the one before counts. A failure is noticed after `detection`, the run trains
again after `restart` (scheduling, start, load, first step), from the last safe save; a failure meanwhile begins the
recovery anew. Planned interruptions are announced: the run saves first and loses no work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.saving import DEVICE_MTBF_HOURS, best_interval, mtbf

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interruptions:
    """What stops a run, and how long it takes to train again; what `lightning-llm plan` is told of it.

    The defaults of the two times are assumptions, not measurements: give your own where you know them.

    Attributes:
        mtbf_hours: Between failures of the whole run; None follows from `device_mtbf_hours`.
        device_mtbf_hours: Between failures of one device; any of them stops the run.
        detection: Seconds until a failure is noticed.
        restart: Seconds from then to the first new step.
        planned_every: Hours between planned interruptions; infinite is none.
        planned_time: Seconds that one takes beside its save and its restart.
        shape: Of the Weibull distribution of the times between failures: 1 is exponential, below 1 they come in bursts.
    """

    mtbf_hours: float | None = None
    device_mtbf_hours: float = DEVICE_MTBF_HOURS
    detection: float = 60.0
    restart: float = 300.0
    planned_every: float = math.inf
    planned_time: float = 0.0
    shape: float = 1.0

    def __post_init__(self) -> None:
        if self.mtbf_hours is not None:
            _positive("mtbf", self.mtbf_hours)
        _positive("device-mtbf", self.device_mtbf_hours)
        _positive("planned-every", self.planned_every)
        _positive("failure-shape", self.shape)
        for name, seconds in (
            ("detection-time", self.detection),
            ("restart-time", self.restart),
            ("planned-time", self.planned_time),
        ):
            if not 0 <= seconds < math.inf:
                raise ConfigurationError(f"{name}={seconds} is no time. Give seconds, 0 or more.")

    def mtbf(self, devices: int) -> float:
        """Seconds between failures of a run on so many devices."""
        return mtbf(devices, self.device_mtbf_hours) if self.mtbf_hours is None else self.mtbf_hours * 3600

    def run(self, devices: int, interval: float, blocked: float, written: float) -> Run:
        """A run that saves like this."""
        return Run(
            mtbf=self.mtbf(devices),
            interval=interval,
            blocked=blocked,
            written=written,
            detection=self.detection,
            restart=self.restart,
            planned_every=self.planned_every * 3600,
            planned_time=self.planned_time,
            shape=self.shape,
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigurationError(f"{name}={value} must be above 0.")


@dataclass(frozen=True)
class Run:
    """A run as far as its interruptions go. All times are seconds.

    Attributes:
        mtbf: Between failures; infinite is none.
        interval: Of training from one save to the next.
        blocked: That training stands still for a save.
        written: From then until the save is safe. The next one does not begin before, so at most `interval`.
        detection, restart, planned_every, planned_time, shape: See `Interruptions`.

    Raises:
        ConfigurationError: A save would begin before the one before it is safe.
    """

    mtbf: float
    interval: float
    blocked: float = 0.0
    written: float = 0.0
    detection: float = 0.0
    restart: float = 0.0
    planned_every: float = math.inf
    planned_time: float = 0.0
    shape: float = 1.0

    def __post_init__(self) -> None:
        _positive("checkpoint-interval", self.interval)
        _positive("mtbf", self.mtbf)
        if self.written > self.interval:
            raise ConfigurationError(
                f"A save every {self.interval:.0f} s is more often than one can be written, which takes "
                f"{self.written:.0f} s. Save at most every {math.ceil(self.written)} s."
            )

    @property
    def down(self) -> float:
        """From a failure to the first new step, if no other comes meanwhile."""
        return self.detection + self.restart

    @property
    def planned_stop(self) -> float:
        """Of a planned interruption, without the restart: saving, waiting for the save, and what it is for."""
        return self.blocked + self.written + self.planned_time


class Shares(NamedTuple):
    """Where the wall time goes; the parts sum to 1.

    Attributes:
        trains: The ETTR.
        saves: Training stands still for saves.
        lost: Training that is done again.
        detects: A failure is not noticed yet.
        restarts: From then to the first new step.
        planned: Planned interruptions with their restarts.
    """

    trains: float
    saves: float
    lost: float
    detects: float
    restarts: float
    planned: float


def shares(run: Run) -> Shares:
    """Where a run's wall time goes in the long run, exactly, if failures (and planned interruptions) are exponential.

    Without planned interruptions the ETTR is Daly's: interval / mtbf * exp(-(down + written) / mtbf) /
    (exp((interval + blocked) / mtbf) - 1); his restart here includes the detection, and `written` delays what is safe.

    Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006).
    """
    failures, plans = 1 / run.mtbf, 1 / run.planned_every
    ends = failures + plans  # of a stretch of training, per second
    period = run.interval + run.blocked
    if ends == 0:
        return Shares(run.interval / period, run.blocked / period, 0, 0, 0, 0)
    if failures * max(run.down, run.restart) > 500 or ends * (period + run.written) > 500:
        # exp() ends at 709, and nothing is left of such a run long before.
        recovers = run.down or 1.0
        return Shares(0, 0, 0, run.detection / recovers, run.restart / recovers, 0)
    # Seconds of a stretch in which it trains, and in which it saves: integrals of exp(-ends t), summed over periods.
    reached = -1 / (ends * math.expm1(-ends * period))
    trained = reached * -math.expm1(-ends * run.interval)
    saving = reached * math.exp(-ends * run.interval) * -math.expm1(-ends * run.blocked)
    safe = run.interval * math.exp(-ends * run.written) / math.expm1(ends * period)
    failed = failures / ends
    kept = failed * safe + (1 - failed) * trained
    recovery = failed * _uninterrupted(run.down, failures)
    planned = (1 - failed) * (run.planned_stop + _uninterrupted(run.restart, failures))
    whole = trained + saving + recovery + planned
    detecting = run.detection / run.down if run.down else 0.0
    parts = (kept, saving, trained - kept, recovery * detecting, recovery * (1 - detecting), planned)
    return Shares(*(part / whole for part in parts))


def _uninterrupted(seconds: float, failures: float) -> float:
    """How long it takes until so many seconds have gone by without a failure."""
    return math.expm1(failures * seconds) / failures if failures else seconds


def simulate(run: Run, days: float = 30, runs: int = 2000, seed: int = 0, intervals: ArrayLike | None = None) -> Array:
    """The ETTR of simulated runs. All intervals see the same failures, so that their differences are theirs.

    Failures come by the wall clock, whatever the run does, except in planned interruptions; the times between them are
    Weibull with mean `run.mtbf`. A run begins with a first step and ends with a save.

    Args:
        run: What is simulated.
        days: Wall time of each.
        runs: How many.
        seed: The same seed gives the same runs.
        intervals: Instead of the run's own, [intervals].

    Returns:
        [runs], or [intervals, runs].
    """
    generator = np.random.default_rng(seed)
    interval = np.reshape(run.interval if intervals is None else np.asarray(intervals, float), (-1, 1))
    period = interval + run.blocked
    wall = days * 86_400.0
    scale = run.mtbf / math.gamma(1 + 1 / run.shape)
    left = np.full((len(interval), runs), wall)
    kept, starting = np.zeros_like(left), np.zeros_like(left)

    def gap() -> Array:
        if math.isinf(run.mtbf):
            return np.full(runs, math.inf)
        return scale * generator.weibull(run.shape, runs)

    failure = np.broadcast_to(gap(), left.shape)
    while np.any(left > 0):
        plan = generator.exponential(run.planned_every, runs) if math.isfinite(run.planned_every) else math.inf
        fails = failure <= starting + plan
        trains = np.where(fails, failure - starting, plan)
        lasts = np.where(fails, failure, starting + plan + run.planned_stop)
        ends = lasts >= left
        trains = np.clip(np.minimum(trains, left - starting), 0, None)
        saves = np.floor(trains / period)
        everything = interval * saves + np.minimum(trains - period * saves, interval)
        safe = interval * np.floor(np.clip(trains - run.written, 0, None) / period)
        kept += np.where(fails & ~ends, safe, everything)
        failure = np.where(fails, gap(), failure - starting - plan) if np.isfinite(plan).all() else gap()
        starting = np.where(fails, run.down, run.restart)
        left = np.where(ends, 0, left - lasts)
    return kept[0] / wall if intervals is None else kept / wall


def best_run(run: Run) -> Run:
    """The run with the interval that trains the most by `shares`; failures are taken as exponential.

    Raises:
        ConfigurationError: Without failures there is none: the longest would be best.
    """
    if math.isinf(run.mtbf):
        raise ConfigurationError("Without failures no interval is the best. Give --mtbf.")
    least = max(run.written, 1e-3 * run.mtbf * min(1, run.blocked / run.mtbf), 1e-3)
    low, high = math.log(least), math.log(max(20 * run.mtbf, 2 * least))
    golden = (math.sqrt(5) - 1) / 2

    def trains(log_interval: float) -> float:
        return shares(replace(run, interval=max(math.exp(log_interval), run.written))).trains

    while high - low > 1e-4:  # golden-section search: the ETTR has one maximum
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if trains(a) >= trains(b) else (a, high)
    return replace(run, interval=max(math.exp((low + high) / 2), run.written))


def best_simulated_run(run: Run, days: float = 30, runs: int = 200, seed: int = 0) -> Run:
    """As `best_run`, by simulation of intervals around it: for failures that come in bursts."""
    around = best_run(run)
    intervals = np.maximum(around.interval * np.geomspace(1 / 4, 4, 25), run.written)
    means = simulate(run, days, runs, seed, intervals).mean(axis=1)
    return replace(run, interval=float(intervals[means.argmax()]))


@dataclass(frozen=True)
class Effectiveness:
    """What share of a run's wall time trains.

    Attributes:
        run: That is weighed.
        shares: By the formula.
        p5, p50, p95: Of the ETTR of simulated runs of `days` days: 5 % of runs are below p5.
        mean: Likewise.
        days: Of each simulated run.
        young_daly: The interval by their estimate.
        young_daly_trains: Its ETTR, simulated if failures come in bursts.
        best: The interval that trains the most, by the formula or, in bursts, by simulation.
        best_trains: Its ETTR, likewise.
    """

    run: Run
    shares: Shares
    p5: float
    p50: float
    p95: float
    mean: float
    days: float
    young_daly: float
    young_daly_trains: float
    best: float
    best_trains: float


def weigh(run: Run, days: float = 30, runs: int = 2000, seed: int = 0) -> Effectiveness:
    """The formula, the simulation and the best interval of a run.

    Args:
        run: Its interval is what is weighed.
        days: Of each simulated run.
        runs: Simulated.
        seed: Of the simulation.
    """
    _positive("run-days", days)
    simulated = simulate(run, days, runs, seed)
    p5, p50, p95 = (float(value) for value in np.percentile(simulated, (5, 50, 95)))
    advised = replace(run, interval=best_interval(run.blocked, run.mtbf, run.written) or run.interval)
    if run.shape == 1:
        best = best_run(run)
        trains = [shares(one).trains for one in (advised, best)]
    else:
        best = best_simulated_run(run, days, seed=seed)
        both = simulate(run, days, runs, seed, [advised.interval, best.interval])
        trains = [float(mean) for mean in both.mean(axis=1)]
    return Effectiveness(
        run,
        shares(run),
        p5,
        p50,
        p95,
        float(simulated.mean()),
        days,
        advised.interval,
        trains[0],
        best.interval,
        trains[1],
    )
