"""`plan()`: a model and a cluster in, a `Plan` out. What the command line, notebooks and the strategy call."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner.candidates import Options
from lightning_llm.planner.choice import OtherEngine, choose
from lightning_llm.planner.devices import Device
from lightning_llm.planner.devices import device as device_of
from lightning_llm.planner.estimate import Cluster, Estimate, estimate, timeline_of, traffic
from lightning_llm.planner.hosts import GB, GIB
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import Memory
from lightning_llm.planner.reasons import departures, reasons
from lightning_llm.planner.reliability import Effectiveness, Interruptions, weigh
from lightning_llm.planner.saving import Saving, estimate_saving
from lightning_llm.planner.shape import Shape
from lightning_llm.planner.strategy import strategy_arguments, strategy_of
from lightning_llm.planner.timeline import Action, Span, Timeline
from lightning_llm.planner.traffic import AxisTraffic

# Tokens per optimizer step where none are given: what Llama 3 was trained with (arXiv:2407.21783, section 3.4.1).
BATCH_TOKENS = ((7e9, 2**20), (100e9, 2**22), (float("inf"), 2**24))
MAX_SEQ_LEN = 8192  # taken where none is given, unless the model is meant for less


@dataclass(frozen=True)
class Alternative:
    """Another layout that fits."""

    layout: Layout
    step_seconds: float
    mfu: float
    memory_bytes: float


@dataclass(frozen=True)
class Plan:
    """A layout, what it costs, and why it was chosen. `to_json` and `from_json` are inverse to each other.

    Attributes:
        model: Its name.
        num_parameters: Of the model.
        device: Name in the device table.
        devices: How many.
        devices_per_node: Of these in one node.
        device_memory: Bytes of one.
        host_memory, disk: Bytes of a node.
        layout: The sizes.
        workload: Sequence length and precision.
        estimate: Memory and time.
        traffic: By axis, of the pipeline rank that sends the most.
        timeline: The pipeline's schedule, simulated.
        reasons: Why this layout; empty where it was given.
        departures: Where it is not what the recommendation matrix and the decision tree say, and why.
        runner_ups: Next best layouts of other sizes.
        considered, fitting: Layouts that were looked at on this engine, and that fit.
        others: What the other engine would do, where FSDP2 on the devices alone is not the answer.
        interruptions: What stops the run, and how long it takes to train again.
        checkpoint_interval: Seconds of training between saves whose ETTR is told; None is Young's and Daly's.
        checkpoint_time, checkpoint_write_time: Seconds that training stands still for a save, and from then until it is
            written, where they were measured.
        run_days: Of each simulated run.
    """

    model: str
    num_parameters: int
    device: str
    devices: int
    devices_per_node: int
    device_memory: float
    host_memory: float
    disk: float
    layout: Layout
    workload: Workload
    estimate: Estimate
    traffic: dict[str, AxisTraffic]
    timeline: Timeline
    reasons: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()
    runner_ups: tuple[Alternative, ...] = ()
    considered: int = 1
    fitting: int = 1
    others: tuple[OtherEngine, ...] = ()
    interruptions: Interruptions = field(default_factory=Interruptions)
    checkpoint_interval: float | None = None
    checkpoint_time: float | None = None
    checkpoint_write_time: float | None = None
    run_days: float = 30.0

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has enough memory, and its node enough for what is offloaded."""
        needs = self.estimate
        on_node = needs.host_bytes <= self.host_memory and needs.disk_bytes <= self.disk
        return needs.memory.total <= self.device_memory and on_node

    @property
    def saving(self) -> Saving:
        """What checkpoints cost, and how often to make one."""
        device_hours = self.interruptions.mtbf(self.devices) / 3600 * self.devices
        return estimate_saving(
            self.estimate.saved_bytes, self.devices, device_hours, self.checkpoint_time, self.checkpoint_write_time
        )

    @cached_property
    def effectiveness(self) -> Effectiveness:
        """What share of the wall time trains."""
        saving = self.saving
        interval = saving.interval if self.checkpoint_interval is None else self.checkpoint_interval
        run = self.interruptions.run(self.devices, interval, saving.blocked, saving.written)
        return weigh(run, self.run_days)

    @property
    def steps_between_saves(self) -> int:
        """For `every_n_train_steps`."""
        return max(1, round(self.saving.interval / self.estimate.step_seconds))

    def strategy_arguments(self) -> dict[str, Any]:
        """The `init_args` of the layout's strategy; what is its default is left out."""
        return strategy_arguments(self.layout)

    def run_file(self) -> dict[str, Any]:
        """What a LightningCLI run file says for this plan, as nested dictionaries."""
        layout = self.layout
        trainer: dict[str, Any] = {
            "devices": min(self.devices, self.devices_per_node),
            "num_nodes": -(-self.devices // self.devices_per_node),
            "precision": self.workload.precision,
            "strategy": strategy_of(layout),
        }
        if layout.pipeline_parallel_size == 1 and layout.microbatches > 1:
            trainer["accumulate_grad_batches"] = layout.microbatches
        return {
            "trainer": trainer,
            "model": {"model": self.model},
            "data": {"batch_size": layout.global_batch, "seq_len": self.workload.seq_len},
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Everything, the timeline included."""
        values = dataclasses.asdict(self)
        values["timeline"] = [[[*span.action, span.start, span.end] for span in rank] for rank in self.timeline.spans]
        values["engine"] = self.layout.engine
        values["strategy"] = self.strategy_arguments()
        for other, engine in zip(values["others"], self.others, strict=True):
            other["strategy"] = None if engine.layout is None else strategy_arguments(engine.layout)
        values["memory_total"] = self.estimate.memory.total
        values["fits"] = self.fits
        values["saving"] = {**dataclasses.asdict(self.saving), "every_n_train_steps": self.steps_between_saves}
        values["effectiveness"] = {
            **dataclasses.asdict(self.effectiveness),
            "run": _finite(dataclasses.asdict(self.effectiveness.run)),
            "shares": self.effectiveness.shares._asdict(),
        }
        values["interruptions"] = _finite(values["interruptions"])
        values["bubble_by_rank"] = [self.timeline.bubble(rank) for rank in range(len(self.timeline.spans))]
        values["in_flight_by_rank"] = [self.timeline.most_in_flight(rank) for rank in range(len(self.timeline.spans))]
        return json.dumps(values, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        values = json.loads(text)
        made = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        made["layout"] = _layout(values["layout"])
        made["workload"] = Workload(**values["workload"])
        made["estimate"] = Estimate(**{**values["estimate"], "memory": Memory(**values["estimate"]["memory"])})
        made["traffic"] = {axis: AxisTraffic(**fields) for axis, fields in values["traffic"].items()}
        made["timeline"] = Timeline(
            tuple(
                tuple(Span(Action(kind, stage, microbatch), start, end) for kind, stage, microbatch, start, end in rank)
                for rank in values["timeline"]
            )
        )
        made["reasons"], made["departures"] = tuple(values["reasons"]), tuple(values["departures"])
        made["runner_ups"] = tuple(
            Alternative(**{**other, "layout": _layout(other["layout"])}) for other in values["runner_ups"]
        )
        made["others"] = tuple(
            OtherEngine(**{**_known(OtherEngine, other), "layout": other["layout"] and _layout(other["layout"])})
            for other in values["others"]
        )
        given = values["interruptions"]
        every = math.inf if given["planned_every"] is None else given["planned_every"]
        made["interruptions"] = Interruptions(**{**given, "planned_every": every})
        return cls(**made)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null says never."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def _known(cls: type[OtherEngine], values: dict[str, Any]) -> dict[str, Any]:
    """Of what was written, the fields; what is computed from them was written beside."""
    return {field.name: values[field.name] for field in dataclasses.fields(cls)}


def _layout(values: dict[str, Any]) -> Layout:
    stages = values["layers_per_stage"]
    return Layout(**{**values, "layers_per_stage": None if stages is None else tuple(stages)})


def plan(
    model: str | DecoderConfig,
    devices: int,
    device: str = "h100",
    *,
    name: str | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    precision: str = "bf16-mixed",
    optimizer: str = "adamw",
    float8: bool = False,
    devices_per_node: int | None = None,
    memory_gib: float | None = None,
    host_memory_gib: float | None = None,
    nvme_gb: float | None = None,
    layout: Layout | None = None,
    engine: str = "auto",
    options: Options | None = None,
) -> Plan:
    """Parallel sizes for a model on a cluster, and what they cost.

    Args:
        model: A preset's name or a configuration.
        devices: How many.
        device: A row of `devices.DEVICES`.
        name: What the plan calls a model that is given as a configuration.
        seq_len: Tokens per sequence; by default 8,192, or what the model is meant for if that is less.
        global_batch: Sequences per optimizer step; by default what Llama 3 was trained with, 1, 4 or 16 million tokens
            by the model's size, and at least one sequence per eight devices.
        precision: Lightning's name.
        optimizer: "adamw" or "muon".
        float8: Linear layers multiply in float8.
        devices_per_node: By default what such nodes have.
        memory_gib: Of one device, if not what the table says.
        host_memory_gib: Of a node, if not what such nodes usually have (`hosts.py`).
        nvme_gb: Of a node, likewise.
        layout: Estimate this one instead of searching; `global_batch` follows from it.
        engine: "fsdp2", "deepspeed", or "auto": FSDP2 unless the model does not fit, or DeepSpeed is clearly faster.
        options: What the search may choose from.

    Raises:
        ConfigurationError: Unknown names, or nothing fits: then with the closest miss and what would help.
    """
    config = model if isinstance(model, DecoderConfig) else DecoderConfig.preset(model)
    name = name or (config.model_type if isinstance(model, DecoderConfig) else model)
    if devices < 1:
        raise ConfigurationError(f"devices={devices} must be at least 1.")
    row = _with_host(device_of(device), host_memory_gib, nvme_gb)
    cluster = Cluster(
        device=row,
        count=devices,
        per_node=min(devices, devices_per_node or row.per_node),
        memory=row.memory if memory_gib is None else memory_gib * 2**30,
    )
    if devices % cluster.per_node:
        raise ConfigurationError(
            f"{devices} devices are not a whole number of nodes of {cluster.per_node}. Change one of the two."
        )
    workload = Workload(
        seq_len=seq_len or min(MAX_SEQ_LEN, config.max_position_embeddings),
        precision=precision,
        optimizer=optimizer,
        float8=float8,
    )
    shape = Shape.of(config)
    if layout is not None:
        if layout.world_size != devices:
            raise ConfigurationError(f"The layout is for {layout.world_size} devices, not {devices}.")
        return _plan(name, shape, cluster, workload, layout, estimate(shape, layout, workload, cluster))
    batch = global_batch or default_global_batch(shape.num_parameters, workload.seq_len, devices)
    choice = choose(shape, cluster, workload, batch, options or Options(), engine)
    found = choice.found
    return _plan(
        name,
        shape,
        cluster,
        workload,
        found.layout,
        found.estimate,
        reasons=(*choice.reasons, *reasons(found, shape, workload, cluster)),
        departures=departures(found, shape, workload, cluster),
        runner_ups=tuple(
            Alternative(other, result.step_seconds, result.mfu, result.memory.total)
            for other, result in found.runner_ups
        ),
        considered=found.considered,
        fitting=found.fitting,
        others=choice.others,
    )


def _with_host(row: Device, memory_gib: float | None, nvme_gb: float | None) -> Device:
    """The device in a node with so much memory and so large disks."""
    host = row.host
    if memory_gib is not None:
        host = replace(host, memory=memory_gib * GIB)
    if nvme_gb is not None:
        host = replace(host, disk=nvme_gb * GB)
    return replace(row, host=host)


def _plan(
    name: str,
    shape: Shape,
    cluster: Cluster,
    workload: Workload,
    layout: Layout,
    result: Estimate,
    **more: Any,
) -> Plan:
    return Plan(
        model=name,
        num_parameters=shape.num_parameters,
        device=cluster.device.name,
        devices=cluster.count,
        devices_per_node=cluster.per_node,
        device_memory=cluster.memory,
        host_memory=cluster.device.host.memory,
        disk=cluster.device.host.disk,
        layout=layout,
        workload=workload,
        estimate=result,
        traffic=traffic(shape, layout, workload, cluster),
        timeline=timeline_of(shape, layout, workload, cluster),
        **more,
    )


def default_global_batch(num_parameters: int, seq_len: int, devices: int) -> int:
    """Sequences per optimizer step where the user gives none; see `plan`."""
    tokens = next(tokens for limit, tokens in BATCH_TOKENS if num_parameters < limit)
    sequences = max(tokens // seq_len, 1)
    per_device = 2 ** max(0, (devices - 1).bit_length() - 3)  # a power of two at or above devices / 8
    odd = devices // (devices & -devices)  # so that an unusual number of devices divides it
    return max(sequences, per_device) * odd
