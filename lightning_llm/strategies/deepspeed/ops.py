"""DeepSpeed's C++ operators: which there are, which are built, and how one is made ready without ever hanging.

DeepSpeed compiles an operator when it is first used. Here that happens before training, once for a machine, into a
folder whose name says what it was compiled for: `LLM3DDeepSpeedStrategy` calls `prepare_ops` in every rank before
`deepspeed.initialize`, and `lightning-llm doctor` shows `op_states`. To build ahead of the first run, as in an image:

    python -m lightning_llm.strategies.deepspeed.ops cpu_adam async_io

They are kept in $TORCH_EXTENSIONS_DIR, or else in torch_extensions/ of $LIGHTNING_LLM_CACHE or ~/.cache/lightning_llm.
Nothing here imports DeepSpeed or torch until it has to. What is private in DeepSpeed was read in 0.19.8.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lightning_llm._processes import end_group_with_parent
from lightning_llm.checkpoint.cache import CACHE_VARIABLE
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.deepspeed.building import TIME_LIMIT, build_once, missing_tools, stale_locks

EXTENSIONS_VARIABLE = "TORCH_EXTENSIONS_DIR"

_COMPILE = "from lightning_llm.strategies.deepspeed.ops import compile_op; compile_op()"

# Shared memory for the all-reduce of DeepSpeed's tensor parallelism in inference, on CPUs. Training never calls it, it
# reduces over all processes whatever group is asked for, and each machine would compile it for a minute.
_LEFT_OUT = "deepspeed_shm_comm"


@dataclass(frozen=True)
class Op:
    """An operator that our strategy may use.

    Attributes:
        name: DeepSpeed's.
        builder: Name of DeepSpeed's class that builds it.
        purpose: What it is for; empty for a part of another one.
        needs: Operators that are loaded before it.
        libraries: That it links to, see `missing_tools`.
        instead: What does its work where it cannot be built; empty: nothing does.
    """

    name: str
    builder: str
    purpose: str = ""
    needs: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    instead: str = ""


OPS = {
    op.name: op
    for op in (
        Op(
            name="cpu_adam",
            builder="CPUAdamBuilder",
            purpose="offload_optimizer: AdamW on the CPU",
            instead="torch.optim.AdamW, which is slower on the CPU",
        ),
        Op(name="pin_memory", builder="PinMemoryBuilder"),
        Op(
            name="async_io",
            builder="AsyncIOBuilder",
            purpose="offload to NVMe",
            needs=("pin_memory",),
            libraries=("aio",),
        ),
    )
}


@dataclass(frozen=True)
class OpState:
    """How far an operator is on this machine.

    Attributes:
        op: The operator.
        state: "built": by us, here; "installed": compiled when DeepSpeed was installed; "buildable": when it is first
            needed; "missing": it cannot be built.
        path: Of the built file, or where it would be.
        missing: What the build lacks, each with what brings it.
    """

    op: Op
    state: Literal["built", "installed", "buildable", "missing"]
    path: Path
    missing: tuple[str, ...] = ()


def is_installed() -> bool:
    """Whether DeepSpeed is; does not import it."""
    return importlib.util.find_spec("deepspeed") is not None


def accelerator_name() -> str:
    """What DeepSpeed runs on, as DeepSpeed decides: $DS_ACCELERATOR, or what torch finds. Does not import DeepSpeed."""
    if chosen := os.environ.get("DS_ACCELERATOR"):
        return chosen
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def import_deepspeed(accelerator: str) -> ModuleType:
    """Imports DeepSpeed, for devices of one kind; without that choice it warns of GPUs that it did not find.

    Args:
        accelerator: "cpu" or "cuda".

    Raises:
        ConfigurationError: It is not installed, or it has been set up for devices of another kind in this process.
    """
    if not is_installed():
        raise ConfigurationError('DeepSpeed is not installed: pip install "lightning-llm[deepspeed]".')
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    import deepspeed

    found = deepspeed.accelerator.get_accelerator().device_name()
    if found != accelerator:
        raise ConfigurationError(
            f"This run is on {accelerator}, but in this process DeepSpeed was set up for {found} before: by the "
            f"environment variable DS_ACCELERATOR, or by code that imports it. Set DS_ACCELERATOR={accelerator}."
        )
    return deepspeed


def op_states() -> list[OpState]:
    """How far each operator is that a user can ask for. Builds nothing, imports no DeepSpeed, takes a moment.

    DeepSpeed must be installed.
    """
    return [_state(op) for op in OPS.values() if op.purpose]


def dead_locks() -> list[Path]:
    """Locks that builders of torch's JIT left, at which DeepSpeed, used without our strategy, would wait for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    if folder := os.environ.get(EXTENSIONS_VARIABLE):
        return stale_locks(Path(folder))
    return [lock for root in sorted(Path(get_default_build_root()).glob("*")) for lock in stale_locks(root)]


def prepare_ops(names: Iterable[str], *, time_limit: float = TIME_LIMIT) -> frozenset[str]:
    """Builds operators that are not built yet and loads them into this process, so that DeepSpeed compiles nothing.

    To be called in every rank before `deepspeed.initialize`: one process of the machine builds, and the others wait for
    it. An operator that cannot be had and that something else can stand in for is left out with a warning. Machines
    may differ in that: ranks should agree on the answer before they act on it.

    Args:
        names: Of `OPS`.
        time_limit: Seconds that a build may take, and that another process's build is waited for.

    Returns:
        Those of `names` that are loaded.

    Raises:
        ConfigurationError: An operator without a stand-in cannot be built or loaded; says what to install.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

    _leave_out(_LEFT_OUT)
    ready = set()
    for op in (OPS[name] for name in names):
        try:
            _load(op, time_limit, rank_zero_info)
            ready.add(op.name)
        except ConfigurationError as error:
            if not op.instead:
                raise
            rank_zero_warn(f"{error}\nIts place is taken by {op.instead}.")
    return frozenset(ready)


def build(op: Op, *, time_limit: float = TIME_LIMIT, tell: Callable[[str], object] = print) -> Path | None:
    """Builds an operator and what it needs unless they are built; returns its file, None of one that DeepSpeed brought.

    Args:
        op: Of `OPS`.
        time_limit: Seconds for each build, and for waiting for another process's.
        tell: Called with what the user should know when this takes time.

    Raises:
        ConfigurationError: It cannot be built; says what is missing, or how the build failed.
    """
    state = _state(op)
    if state.state == "missing":
        lacking = "; ".join(state.missing)
        raise ConfigurationError(f"DeepSpeed's {op.name} ({op.purpose}) cannot be built here. Missing: {lacking}.")
    if state.state == "installed":
        return None
    parts = [path for name in op.needs if (path := build(OPS[name], time_limit=time_limit, tell=tell)) is not None]
    if state.state == "buildable":
        command = [sys.executable, "-c", _COMPILE, op.builder, *map(str, parts)]
        build_once(state.path, command, time_limit=time_limit, tell=tell)
    return state.path


def compile_op() -> None:
    """The body of the process that `build` starts: sys.argv names DeepSpeed's builder and the parts that are built."""
    threading.Thread(target=end_group_with_parent, daemon=True).start()
    builder, *parts = sys.argv[1:]
    for part in parts:
        _adopt(Path(part))
    _builder(builder).load(verbose=True)


def main() -> int:
    """Builds the operators named in sys.argv, or lists them; 1 where one cannot be built."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_llm.strategies.deepspeed.ops",
        description="Build DeepSpeed's C++ operators before they are needed; without a name, tell how far they are.",
    )
    names = [op.name for op in OPS.values() if op.purpose]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, metavar="SECONDS", help="for each of them")
    arguments = parser.parse_args()
    if not is_installed():
        parser.error("DeepSpeed is not installed")
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no such operator: {', '.join(sorted(unknown))}")
    failed = False
    for name in arguments.names:
        begin = time.monotonic()
        try:
            path = build(OPS[name], time_limit=arguments.time_limit)
            print(f"{name}: {path or 'came with DeepSpeed'} ({time.monotonic() - begin:.0f} s)")
        except ConfigurationError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    if not arguments.names:
        for state in op_states():
            print(f"{state.op.name}: {state.state} {state.path} {'; '.join(state.missing)}".rstrip())
    return int(failed)


def _state(op: Op) -> OpState:
    accelerator = accelerator_name()
    path = _folder(accelerator) / f"{op.name}.so"
    if path.is_file():
        return OpState(op, "built", path)
    if op.name in _installed_ops(accelerator):
        return OpState(op, "installed", path)
    missing = missing_tools(op.libraries)
    return OpState(op, "missing" if missing else "buildable", path, missing)


def _folder(accelerator: str) -> Path:
    """Where operators are that fit this Python, torch, DeepSpeed and processor, for which alone they are compiled."""
    if chosen := os.environ.get(EXTENSIONS_VARIABLE):
        root = Path(chosen)
    else:
        root = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/lightning_llm") / "torch_extensions"
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    processor = hashlib.sha256(_instruction_sets().encode()).hexdigest()[:8]
    name = f"{sys.implementation.cache_tag}-{versions}-{accelerator}-{platform.machine()}-{processor}"
    return root.expanduser().absolute() / name


def _instruction_sets() -> str:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text(encoding="utf-8", errors="replace") if listing.is_file() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)  # x86, Arm
    return " ".join(sorted(found[1].split())) if found else platform.processor()


def _installed_ops(accelerator: str) -> set[str]:
    """Operators that were compiled when DeepSpeed was installed (DS_BUILD_OPS=1), by what its setup wrote down."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.submodule_search_locations is not None
    record = Path(spec.submodule_search_locations[0], "git_version_info_installed.py")
    values: dict[str, Any] = {}
    for statement in ast.parse(record.read_text()).body if record.is_file() else ():
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = ast.literal_eval(statement.value)
    if values.get("accelerator_name") != accelerator:
        return set()
    return {name for name, is_installed in values["installed_ops"].items() if is_installed}


# ---- from here on: what imports DeepSpeed ----


def _load(op: Op, time_limit: float, tell: Callable[[str], object]) -> None:
    path = build(op, time_limit=time_limit, tell=tell)
    for name in op.needs:
        _load(OPS[name], time_limit, tell)
    try:
        if path is not None:
            _adopt(path)
        _builder(op.builder).load()
    except ImportError as error:
        raise ConfigurationError(
            f"DeepSpeed's {op.name} is built, but cannot be loaded: {error}. If that is not the reason, remove "
            f"{path} to have it built again."
        ) from error


def _adopt(path: Path) -> None:
    """Makes a built operator the one that DeepSpeed has loaded already, so that it does not turn to torch's JIT."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    name = path.stem
    if name in OpBuilder._loaded_ops:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    OpBuilder._loaded_ops[name] = module


def _builder(name: str) -> Any:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    if builder is None:
        raise ConfigurationError(f"DeepSpeed has no {name} for {get_accelerator().device_name()}.")
    return builder


def _leave_out(name: str) -> None:
    """Has DeepSpeed do without an operator that it would build by itself (deepspeed/comm/torch.py, build_shm_op)."""
    import deepspeed

    deepspeed.ops.__compatible_ops__[name] = False


if __name__ == "__main__":
    sys.exit(main())
