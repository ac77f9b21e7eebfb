"""`lightning-llm serve`, and the example that the demo ends with, as a user calls them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.ports import free_port
from tests.serving.engine.models import make_decoder
from tests.serving.test_llm import folder_of

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("lightning-llm"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import torch

    return folder_of(make_decoder("llama", torch.float32), tmp_path_factory.mktemp("served") / "fox")


def serve(*arguments) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_example_serves_asks_and_stops(model):
    script = ROOT / "examples" / "serving" / "ask.py"
    done = subprocess.run([sys.executable, script, model, "the fox"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = re.search(r"go on with 'the fox':\n\nthe fox(.*)\n\n(\d+) tokens in [\d.]+ s\n", done.stdout, re.DOTALL)
    assert found and int(found[2]) > 0, done.stdout
    assert not [process for process in psutil.process_iter(["cmdline"]) if model in (process.info["cmdline"] or ())]


def test_a_wrong_model_ends_with_a_sentence(tmp_path):
    done = serve(tmp_path / "nothing", "--port", free_port())
    assert done.returncode == 2
    assert f"lightning-llm: There is no {tmp_path}/nothing: a model is a Hugging Face folder" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_wrong_arguments_end_with_a_sentence(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = serve(model, "--host", "127.0.0.1", "--port", port)
    assert done.returncode == 2
    assert f"lightning-llm: 127.0.0.1:{port} cannot be listened at (Address already in use)" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_it_starts_ends_it(model):
    server = subprocess.Popen([COMMAND, "serve", model, "--port", str(free_port())], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:  # up to the first thing that it says
        if "Loading " in line:
            break
    children = psutil.Process(server.pid).children(recursive=True)
    os.kill(server.pid, signal.SIGINT)
    rest = server.communicate(timeout=60)[1]
    assert server.returncode in (0, 130) and "Traceback" not in rest
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_it_says_when_it_is_ready_and_answers_those_who_have_the_key(model, tmp_path):
    (tmp_path / "key").write_text("s3cret\n")
    port = free_port()
    command = [COMMAND, "serve", model, "--port", str(port), "--api-key-file", tmp_path / "key"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in server.stderr:
            said.append(json.loads(line)["message"])
            if "is ready" in said[-1]:
                break
        url = f"http://localhost:{port}"
        assert said == [f"Loading {model} ...", f"fox is ready: {url}/ (page), {url}/v1 (API)"]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=3)) as client:
            assert client.get("/readyz").status_code == 200
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.stderr.close()


@pytest.mark.slow
def test_a_worker_that_the_kernel_kills_is_told_in_a_sentence(model):
    server = subprocess.Popen([COMMAND, "serve", model, "--port", str(free_port())], stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if "Loading " in line:
            break
    spawned = []
    while not spawned:
        children = psutil.Process(server.pid).children(recursive=True)
        spawned = [one for one in children if "--multiprocessing-fork" in one.cmdline()]
    for one in spawned:
        one.kill()
    rest = server.communicate(timeout=60)[1]
    assert server.returncode == 1 and "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("lightning-llm: A worker was killed (signal 9) before it was ready")
