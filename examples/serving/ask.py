"""Serves a model, asks it over HTTP with OpenAI's client, prints the answer as it comes, and stops the server.

python examples/serving/ask.py runs/demo/model "def "
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

START_TIMEOUT = 300  # seconds


@contextmanager
def served(model: str) -> Iterator[str]:
    """A server for a model, as a process of its own; gives its address and ends it as Kubernetes would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("lightning-llm")
    command = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    server = subprocess.Popen(command)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGTERM)
        if server.wait(timeout=60) != 0:
            raise RuntimeError(f"The server ended with exit code {server.returncode}.")
    finally:
        server.kill()


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Returns when the model is loaded."""
    deadline = time.monotonic() + START_TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it is not listening yet
        time.sleep(0.1)
    raise RuntimeError(f"The server at {url} did not get ready.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="?", default="def ")
    arguments = parser.parse_args()
    with served(arguments.model) as url:
        print(f"{url} serves {arguments.model}. It is asked to go on with {arguments.prompt!r}:\n")
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        [model] = client.models.list().data
        print(arguments.prompt, end="", flush=True)
        began, tokens = time.monotonic(), 0
        stream = client.completions.create(
            model=model.id,
            prompt=arguments.prompt,
            max_tokens=80,
            temperature=0.7,
            top_p=0.9,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.text, end="", flush=True)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        print(f"\n\n{tokens} tokens in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
