"""Which engine: FSDP2, unless the model fits DeepSpeed's alone or is clearly faster there. `plan()` asks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.candidates import Options
from lightning_llm.planner.engines import ENGINES, TITLES, offloads, workload_refusal
from lightning_llm.planner.estimate import Cluster, Estimate
from lightning_llm.planner.hosts import GB, GIB
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.refusals import DoesNotFitError
from lightning_llm.planner.search import TOLERANCE, Found, search, settle, weigh
from lightning_llm.planner.shape import Shape


@dataclass(frozen=True, kw_only=True)
class OtherEngine:
    """What the engine that was not chosen would do.

    Attributes:
        engine: Its name.
        layout: Its best layout; None where none fits.
        why: Why it was not chosen.
        step_seconds, mfu, memory_bytes, host_bytes, disk_bytes: See `Estimate`; of a device, and of a node.
    """

    engine: str
    why: str
    layout: Layout | None = None
    step_seconds: float = 0.0
    mfu: float = 0.0
    memory_bytes: float = 0.0
    host_bytes: float = 0.0
    disk_bytes: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The layout to take.

    Attributes:
        found: It, on its engine.
        reasons: Why this engine and this offloading; empty where that needs no reason.
        others: What the other engine would do, where that is of interest.
    """

    found: Found
    reasons: tuple[str, ...] = ()
    others: tuple[OtherEngine, ...] = ()


@dataclass(frozen=True)
class _Case:
    """What is planned for; passed along."""

    shape: Shape
    cluster: Cluster
    workload: Workload
    global_batch: int
    options: Options

    def search(self, options: Options) -> Found:
        """`search` for this case; offloading is not advised, since it is tried."""
        return search(self.shape, self.cluster, self.workload, self.global_batch, options, may_offload=False)


def choose(
    shape: Shape, cluster: Cluster, workload: Workload, global_batch: int, options: Options, engine: str = "auto"
) -> Choice:
    """The layout to take, and on which engine.

    Args:
        engine: "fsdp2" or "deepspeed" look at that one alone, "auto" at FSDP2 first.

    Raises:
        ConfigurationError: No layout is valid, or none fits on any engine; says what is nearest and what would help.
    """
    if engine not in (*ENGINES, "auto"):
        raise ConfigurationError(f"engine={engine!r} must be one of auto, {', '.join(ENGINES)}.")
    case = _Case(shape, cluster, workload, global_batch, options)
    if engine != "auto":
        return _alone(case, engine)
    first = _best(case, "fsdp2")
    if first.found is not None and not first.found.layout.offloads:
        faster = _clearly_faster(case, first.found)
        return Choice(first.found) if faster is None else _faster_choice(first.found, faster)
    answers = {"fsdp2": first, "deepspeed": _best(case, "deepspeed")}
    fitting = {name: answer.found for name, answer in answers.items() if answer.found is not None}
    if not fitting:
        raise ConfigurationError(_nowhere(list(answers.values())))
    chosen = _fastest(fitting)
    others = tuple(_other(name, answers[name], fitting[chosen]) for name in ENGINES if name != chosen)
    return Choice(fitting[chosen], _fit_reasons(case, answers, chosen), others)


@dataclass(frozen=True)
class _Answer:
    """What one engine offers: a layout, or what was tried instead."""

    engine: str
    found: Found | None
    misses: tuple[DoesNotFitError, ...] = ()
    refused: str = ""

    @property
    def why_not(self) -> str:
        """Why there is no layout, or why the first that was tried is not it."""
        if self.misses:
            return f"the closest layout {self.misses[0].lacks}"
        return self.refused


def _best(case: _Case, engine: str) -> _Answer:
    """The engine's layout of the first group of places in which anything fits."""
    options = case.options
    if why := workload_refusal(engine, case.workload):
        return _Answer(engine, None, refused=why)
    groups = offloads(engine, options.offload_optimizer, options.offload_parameters)
    if not groups:
        why = "FSDP2 offloads parameters and optimizer together, and to the CPU alone."
        return _Answer(engine, None, refused=why)
    misses: list[DoesNotFitError] = []
    refused = ""
    for group in groups:
        fitting: list[Found] = []
        for optimizer, parameters in group:
            tried = replace(options, engine=engine, offload_optimizer=optimizer, offload_parameters=parameters)
            try:
                fitting.append(case.search(tried))
            except DoesNotFitError as miss:
                misses.append(miss)
            except ConfigurationError as invalid:  # these sizes do not go with this offloading
                refused = refused or str(invalid)
        if fitting:
            found = min(fitting, key=lambda one: one.estimate.step_seconds)
            return _Answer(engine, found, tuple(misses), refused)
    return _Answer(engine, None, tuple(misses), refused)


def _alone(case: _Case, engine: str) -> Choice:
    answer = _best(case, engine)
    if answer.found is None:
        raise ConfigurationError(_nowhere([answer]))
    if not answer.found.layout.offloads or _asks_for_offloading(case.options):
        return Choice(answer.found)
    line = f"On the devices alone it does not fit: {answer.why_not}. {_fits(answer.found)}"
    return Choice(answer.found, (line, *_offload_reasons(answer.found)))


def _asks_for_offloading(options: Options) -> bool:
    return options.offload_optimizer is not None or options.offload_parameters is not None


def _fastest(fitting: dict[str, Found]) -> str:
    """FSDP2, unless another engine is clearly faster or the only one."""
    best = min(fitting, key=lambda name: fitting[name].estimate.step_seconds)
    if "fsdp2" in fitting:
        ratio = fitting["fsdp2"].estimate.step_seconds / fitting[best].estimate.step_seconds
        return "fsdp2" if ratio <= 1 + TOLERANCE else best
    return best


def _clearly_faster(case: _Case, first: Found) -> Found | None:
    """DeepSpeed's layout, if the devices alone have room for one by which a step takes much less time."""
    enough = first.fastest[1].step_seconds / (1 + TOLERANCE)
    if workload_refusal("deepspeed", case.workload):
        return None
    try:
        options = replace(case.options, engine="deepspeed")
        weighed = weigh(case.shape, case.cluster, case.workload, case.global_batch, options)
    except ConfigurationError:  # sizes that this engine does not take
        return None
    if not any(seconds < enough for seconds, _ in weighed.fitting):
        return None
    try:
        found = settle(case.shape, case.cluster, case.workload, weighed)
    except DoesNotFitError:
        return None
    return found if found.estimate.step_seconds < enough else None


def _faster_choice(first: Found, faster: Found) -> Choice:
    ratio = first.estimate.step_seconds / faster.estimate.step_seconds
    why = f"a step takes {ratio:.2f}x the time"
    reason = f"On FSDP2 {why}: it reduces gradients in float32, DeepSpeed in the computation's dtype."
    return Choice(faster, (reason,), (_of(first.layout, first.estimate, why),))


def _of(layout: Layout, result: Estimate, why: str) -> OtherEngine:
    return OtherEngine(
        engine=layout.engine,
        why=why,
        layout=layout,
        step_seconds=result.step_seconds,
        mfu=result.mfu,
        memory_bytes=result.memory.total,
        host_bytes=result.host_bytes,
        disk_bytes=result.disk_bytes,
    )


def _other(engine: str, answer: _Answer, chosen: Found) -> OtherEngine:
    if answer.found is None:
        return OtherEngine(engine=engine, why=_why_nothing(answer))
    ratio = answer.found.estimate.step_seconds / chosen.estimate.step_seconds
    why = f"a step takes {ratio:.2f}x the time"
    if ratio < 1:
        why += ", which is less than such estimates can tell apart"
    return _of(answer.found.layout, answer.found.estimate, why)


def _fit_reasons(case: _Case, answers: dict[str, _Answer], chosen: str) -> tuple[str, ...]:
    """Why this engine, where FSDP2 has no room on the devices."""
    found = answers[chosen].found
    assert found is not None
    cluster, fsdp2 = case.cluster, answers["fsdp2"]
    where = f"{cluster.count} x {cluster.memory / GIB:.0f} GiB"
    if not fsdp2.misses:
        lines = [f"{fsdp2.refused} {_fits(found)}".lstrip()]
    else:
        lines = [f"It does not fit into {where} with FSDP2: {fsdp2.why_not}. {_fits(found)}"]
    for name, answer in answers.items():
        if name != chosen and answer.found is not None:
            ratio = answer.found.estimate.step_seconds / found.estimate.step_seconds
            lines.append(
                f"{TITLES[name]} would fit with {answer.found.layout.describe_zero()}, and take {ratio:.2f}x the time."
            )
    return (*lines, *_offload_reasons(found))


def _fits(found: Found) -> str:
    """`FSDP2 ZeRO-3 with ... fits: 11.2 GiB a device, 83 GB of host memory a node.`"""
    result, layout = found.estimate, found.layout
    engine = "" if layout.engine == "deepspeed" else "FSDP2 "
    return f"{engine}{layout.describe_zero()} fits: {needs(result)}."


def needs(result: Estimate | OtherEngine) -> str:
    """What a layout needs, in words: `11.2 GiB a device, 83 GB of host memory a node`."""
    memory = result.memory_bytes if isinstance(result, OtherEngine) else result.memory.total
    words = [f"{memory / GIB:.1f} GiB a device"]
    if result.host_bytes:
        words.append(f"{result.host_bytes / GB:,.0f} GB of host memory a node")
    if result.disk_bytes:
        words.append(f"{result.disk_bytes / GB:,.0f} GB of NVMe a node")
    return ", ".join(words)


def _offload_reasons(found: Found) -> tuple[str, ...]:
    """What offloading costs."""
    if not found.layout.offloads:
        return ()
    result = found.estimate
    share = result.optimizer_seconds / result.step_seconds
    what = "with NVMe's reads and writes " if found.layout.offload_optimizer == "nvme" else ""
    return (f"The optimizer's step on the CPU {what}takes {result.optimizer_seconds:.2f} s, {share:.0%} of a step.",)


def _why_nothing(answer: _Answer) -> str:
    """Why an engine has no layout, with the closest of all that was tried."""
    if not answer.misses:
        return answer.refused
    tried = {miss.closest.describe_zero(): miss.lacks for miss in answer.misses}
    return "; ".join(f"{what} {lacks}" for what, lacks in tried.items())


def _nowhere(answers: list[_Answer]) -> str:
    """What is said when no engine has a layout: the closest miss of all, and what the others lack."""
    misses = [miss for answer in answers for miss in answer.misses]
    refused = [answer.refused for answer in answers if answer.refused and not answer.misses]
    if not misses:
        return refused[0]
    closest = min(misses, key=lambda miss: miss.ratio)
    tried = [f"{miss.closest.describe_zero()} {miss.lacks}" for miss in misses if miss is not closest]
    also = f" Also tried: {'; '.join(tried)}." if tried else ""
    return " ".join([f"{closest}{also}", *refused])
