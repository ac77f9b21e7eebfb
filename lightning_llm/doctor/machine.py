"""What this machine offers for training and what is missing for what: the body of `lightning-llm doctor`.

Imports neither Lightning nor any optional part, so that it still answers where importing them fails.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from lightning_llm.doctor.report import Finding, Status
from lightning_llm.strategies.deepspeed import ops

_GIB = 2**30

# distribution, what it is needed for, how to install it
_OPTIONAL_PARTS: tuple[tuple[str, str, str], ...] = (
    (
        "litdata",
        "tokenize, TokenDataModule",
        'pip install "lightning-llm[data]" (with a CPU build of torch: pip install --no-deps litdata)',
    ),
    ("wandb", "callbacks.WandbLogger", 'pip install "lightning-llm[tracking]"'),
    ("transformers", "loading exported folders elsewhere; the parity tests", "pip install transformers"),
    ("deepspeed", "DeepSpeed's engine and its offload to CPU and NVMe", 'pip install "lightning-llm[deepspeed]"'),
    ("boto3", "checkpoints and registries in object storage", 'pip install "lightning-llm[s3]"'),
    ("mlflow", "a registry of models kept by MLflow", 'pip install "lightning-llm[mlflow]"'),
    ("torchao", "FP8 training and quantised weights", "pip install torchao"),
    ("litserve", "serving a model over HTTP", "pip install litserve"),
)


def collect(folder: str | Path = ".") -> list[Finding]:
    """Looks at the machine; takes a few seconds at most unless torchvision is installed.

    Args:
        folder: Working folder whose free disk space is reported.
    """
    return [
        *_python_and_torch(),
        _package("software", "lightning", "everything", "pip install lightning", required=True),
        *_accelerators(),
        *_distributed(),
        *_processor(),
        _disk(Path(folder)),
        *_compilers(),
        *(_package("optional parts", *part) for part in _OPTIONAL_PARTS),
        _torchvision(),
        *_deepspeed(),
    ]


def _python_and_torch() -> list[Finding]:
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    else:
        build = "CPU build"
    system = f"{platform.system()} {platform.machine()}"
    return [
        Finding(section="software", name="python", status="ok", detail=f"{platform.python_version()} on {system}"),
        Finding(section="software", name="torch", status="ok", detail=f"{torch.__version__} ({build})"),
    ]


def _accelerators() -> list[Finding]:
    section, purpose = "accelerators", "training and serving at speed"
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            Finding(
                section=section,
                name=f"cuda:{index}",
                status="ok",
                detail=f"{device.name}, {device.total_memory / _GIB:.1f} GiB, capability {device.major}.{device.minor}",
                needed_for=purpose,
            )
        )
    if torch.backends.mps.is_available():
        found.append(Finding(section=section, name="mps", status="ok", detail="Apple GPU", needed_for=purpose))
    if found:
        return found
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        return [
            Finding(
                section=section,
                name="cuda",
                status="problem",
                detail="an NVIDIA driver is installed, but torch is a build without CUDA",
                needed_for=purpose,
                fix=f"install the CUDA build of torch {torch.__version__.partition('+')[0]}",
            )
        ]
    return [
        Finding(
            section=section,
            name="cuda",
            status="missing",
            detail="no device; everything runs on the CPU",
            needed_for=purpose,
        )
    ]


def _distributed() -> list[Finding]:
    purposes = {
        "gloo": "several processes on CPUs",
        "nccl": "several CUDA devices",
        "mpi": "clusters that start by MPI",
    }
    if not torch.distributed.is_available():
        return [
            Finding(
                section="distributed",
                name="torch.distributed",
                status="problem",
                detail="not in this build of torch",
                needed_for="every parallel strategy",
                fix="install a build of torch with torch.distributed",
            )
        ]
    there = {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
        "mpi": torch.distributed.is_mpi_available(),
    }
    return [
        Finding(
            section="distributed",
            name=name,
            status="ok" if there[name] else "missing",
            detail="in this build of torch" if there[name] else "not in this build of torch",
            needed_for=purpose,
        )
        for name, purpose in purposes.items()
    ]


def _processor() -> list[Finding]:
    name, flags = cpu_name_and_flags()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    kernels = torch.backends.cpu.get_cpu_capability()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    instructions = f"torch uses {kernels}"
    if flags:
        instructions += "; " + ", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in wanted)
    return [
        Finding(section="machine", name="processor", status="ok", detail=name),
        Finding(section="machine", name="instructions", status="ok", detail=instructions),
        Finding(
            section="machine",
            name="cores",
            status="ok",
            detail=f"{usable} usable, {psutil.cpu_count(logical=False) or usable} physical",
        ),
        Finding(
            section="machine",
            name="memory",
            status="ok",
            detail=f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB available",
        ),
    ]


def cpu_name_and_flags() -> tuple[str, set[str]]:
    """Model name and instruction sets; the sets are empty where the system does not list them (macOS)."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):  # x86, Arm
                flags = set(value.split())
                break
    return name, flags


def _compilers() -> list[Finding]:
    cpp_purpose = "torch.compile on a CPU, C++ extensions"
    cpp = next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)
    found = [
        Finding(section="compilers", name="C++", status="ok", detail=_version_of(cpp), needed_for=cpp_purpose)
        if cpp
        else Finding(
            section="compilers",
            name="C++",
            status="missing",
            detail="neither g++ nor clang++",
            needed_for=cpp_purpose,
            fix="install g++ or clang++",
        )
    ]
    for name, purpose, fix in (
        ("nvcc", "CUDA extensions", "install the CUDA toolkit" if torch.version.cuda else ""),
        ("ninja", "building extensions", "pip install ninja"),
    ):
        path = shutil.which(name)
        found.append(
            Finding(
                section="compilers",
                name=name,
                status="ok" if path else "missing",
                detail=_version_of(path) if path else "not found",
                needed_for=purpose,
                fix="" if path else fix,
            )
        )
    return found


def _version_of(program: str) -> str:
    """The line of `program --version` that has a number in it, or where the program is when it does not tell."""
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{program} (does not tell its version: {error})"
    lines = [line.strip() for line in answer.splitlines() if any(letter.isdigit() for letter in line)]
    # nvcc's first line with a number is a copyright; the one that says "release" is meant
    return next((line for line in lines if "release" in line), lines[0] if lines else program)


def _package(section: str, distribution: str, purpose: str, fix: str, *, required: bool = False) -> Finding:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            section=section,
            name=distribution,
            status="problem" if required else "missing",
            detail="not installed",
            needed_for=purpose,
            fix=fix,
        )
    return Finding(section=section, name=distribution, status="ok", detail=version, needed_for=purpose)


def _torchvision() -> Finding:
    """Finds a torchvision that was built for another torch.

    torchmetrics imports torchvision where it is installed, and Lightning imports torchmetrics; a torchvision of another
    build fails there with `operator torchvision::nms does not exist`, and with it every use of Lightning.
    """
    section, name = "optional parts", "torchvision"
    if importlib.util.find_spec("torchvision") is None:
        return Finding(section=section, name=name, status="ok", detail="not installed, and not needed for text")
    try:
        test = subprocess.run(
            [sys.executable, "-c", "import torchmetrics"], capture_output=True, text=True, timeout=120, check=False
        )
        if test.returncode == 0:
            return Finding(section=section, name=name, status="ok", detail="installed, and fits this torch")
        lines = test.stderr.strip().splitlines()
        failure = lines[-1] if lines else f"exit code {test.returncode}"
        is_torchvision = "torchvision" in test.stderr
    except subprocess.TimeoutExpired:
        failure, is_torchvision = "no answer within 120 seconds", False
    return Finding(
        section=section,
        name=name if is_torchvision else "torchmetrics",
        status="problem",
        detail=f"`import torchmetrics`, and so `import lightning`, fails: {failure}",
        needed_for="everything" if not is_torchvision else "",
        fix=f"pip uninstall torchvision (text does not need it), or install the one made for torch {torch.__version__}"
        if is_torchvision
        else "pip install --force-reinstall --no-deps torchmetrics",
    )


def _deepspeed() -> list[Finding]:
    """What DeepSpeed would run on, and how far its C++ operators are; nothing is built, nor DeepSpeed imported."""
    if not ops.is_installed():
        return []  # _OPTIONAL_PARTS tells
    section = "DeepSpeed"
    chosen = " (DS_ACCELERATOR)" if os.environ.get("DS_ACCELERATOR") else ""
    found = [Finding(section=section, name="runs on", status="ok", detail=ops.accelerator_name() + chosen)]
    for state in ops.op_states():
        name, purpose = state.op.name, state.op.purpose
        detail = {
            "built": f"built, {state.path}",
            "installed": "came with DeepSpeed",
            "buildable": "not built; the first run that needs it does, in some minutes, or before that: "
            f"python -m {ops.__name__} {name}",
            "missing": "not built, and cannot be here",
        }[state.state]
        status: Status = "missing" if state.missing else "ok"
        fix = f"install {', '.join(state.missing)}" if state.missing else ""
        found.append(Finding(section=section, name=name, status=status, detail=detail, needed_for=purpose, fix=fix))
    for lock in ops.dead_locks():
        found.append(
            Finding(
                section=section,
                name="lock",
                status="problem",
                detail=f"{lock}: its owner is gone, and whatever wants this extension from torch waits for ever",
                fix=f"rm {lock}",
            )
        )
    return found


def _disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    return Finding(
        section="machine",
        name="disk",
        status="ok",
        detail=f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB in {folder.resolve()}",
        needed_for="tokens, checkpoints, logs",
    )
