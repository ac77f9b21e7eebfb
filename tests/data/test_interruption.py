"""Tokenising in real processes that are killed, interrupted or meet each other: nothing half done looks finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lightning_llm.data.corpus import TokenizedCorpus
from lightning_llm.errors import ConfigurationError
from tests.data.corpora import prose, write_documents

# No main guard, on purpose: users' scripts often have none.
SCRIPT = """
import sys
from lightning_llm.data import progress
from lightning_llm.data.tokenize import tokenize
progress._SECONDS_BETWEEN_LINES = 0.0  # a line for every piece: the test waits for one
corpus = tokenize(sys.argv[1], sys.argv[2], vocab_size=300, num_workers=2)
print(corpus.reused, corpus.train.tokens)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), str(folder / "in"), str(folder / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def started_by(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def make_input(folder: Path) -> None:
    (folder / "in").mkdir()
    for number in range(12):  # 2 MB: work for a while after the first piece is done
        (folder / "in" / f"{number}.txt").write_text(prose(number, 50_000))


def wait_until_it_tokenizes(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Give all that it started (the packing process first, then workers) once a first piece is done."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("tokenize: tokenizing:"):
            family = started_by(process)
            assert len(family) >= 3
            return family
    raise AssertionError(f"it ended, with {process.wait()}, before it was interrupted")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_an_interrupted_run_leaves_no_process_and_no_corpus_and_the_next_one_succeeds(
    tmp_path: Path, how: signal.Signals
) -> None:
    make_input(tmp_path)
    process = start(tmp_path)
    family = wait_until_it_tokenizes(process)
    process.send_signal(how)
    process.wait(timeout=20)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert process.returncode == -how
    process.communicate()

    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigurationError, match="does not exist"):
        TokenizedCorpus.load(tmp_path / "out")
    assert (tmp_path / ".out.incomplete").exists() == (how == signal.SIGKILL)  # Ctrl-C still tidies up

    if how == signal.SIGKILL:
        second = start(tmp_path)
        out, err = second.communicate(timeout=120)
        assert second.returncode == 0, err
        corpus = TokenizedCorpus.load(tmp_path / "out")
        corpus.check_files()
        assert out.split() == ["False", str(corpus.train.tokens)]
        assert corpus.train.documents + corpus.val.documents == 12
        assert sorted(os.listdir(tmp_path)) == ["in", "out", "script.py"]


def test_two_runs_at_once_do_the_work_once(tmp_path: Path) -> None:
    write_documents(tmp_path / "in")
    runs = [start(tmp_path) for _ in range(2)]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert sorted(out.split()[0] for out, _ in results) == ["False", "True"]
    TokenizedCorpus.load(tmp_path / "out").check_files()


@pytest.mark.parametrize("victim", [pytest.param("the packing process", marks=pytest.mark.slow), "a worker"])
def test_a_process_that_is_killed_ends_the_run_with_an_error(tmp_path: Path, victim: str) -> None:
    """As the kernel does when memory runs out."""
    make_input(tmp_path)
    process = start(tmp_path)
    family = wait_until_it_tokenizes(process)
    packing = psutil.Process(process.pid).children()[0]
    (packing if victim == "the packing process" else packing.children()[0]).kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "RuntimeError: Tokenising" in err, err
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert sorted(os.listdir(tmp_path)) == ["in", "script.py"]
