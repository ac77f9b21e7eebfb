"""Servers as processes of their own, for serve.py: begun, waited for, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

HERE = Path(__file__).parent
OURS = ("-m", "lightning_llm.cli", "serve", "--log-level", "warning", "--host", "127.0.0.1", "--max-model-len", "2048")
LITSERVE = (str(HERE / "server_litserve.py"),)


@contextmanager
def serving(
    kind: Sequence[str], folder: Path, dtype: str, *, threads: int, most: int, patience: float = 240
) -> Iterator[str]:
    """The URL of a server that answers; it calls its model "model".

    Args:
        kind: `OURS` or `LITSERVE`.
        folder: The model.
        dtype: Of its weights.
        threads: Of torch.
        most: Sequences at a time.
        patience: Seconds until it must be ready.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"--served-model-name": "model", "--port": port, "--dtype": dtype, "--max-num-seqs": most}
    command = [sys.executable, *kind, folder, *(word for pair in options.items() for word in pair)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, time.monotonic() + patience)
            yield url
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            _end(process)


def _wait(url: str, process: subprocess.Popen[bytes], until: float) -> None:
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with {process.returncode}")
        if time.monotonic() > until:
            raise RuntimeError("The server is not ready in time")
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks it to end; what is left then is killed (stock LitServe leaves its children when it is ended by SIGTERM)."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
