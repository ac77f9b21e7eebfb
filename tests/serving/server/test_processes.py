"""How the processes of a server find out about each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import multiprocessing
from lightning_llm.serving.server.processes import check_main_module

check_main_module()
worker = multiprocessing.get_context("spawn").Process(target=print)
worker.start()
worker.join()
print("worker ended with", worker.exitcode)
"""


def test_a_program_that_its_own_workers_would_run_again_is_told_what_it_lacks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "worker ended with 1\n"
    assert 'put what starts it under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
