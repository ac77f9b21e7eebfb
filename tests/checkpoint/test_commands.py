"""`lightning-llm verify`, `checkpoints`, `export`, `reshard`, and how a run ends that finds no good checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.manifest import MANIFEST, Manifest
from lightning_llm.cli import main
from tests.checkpoint.damage import flip_bit
from tests.checkpoint.runs import run
from tests.commands import call_forked
from tests.distributed import run_distributed
from tests.test_cli import COMMAND

RANK_0, RANK_1 = "rank_00000.safetensors", "rank_00001.safetensors"


def save_twice(corpus: Path, folder: Path) -> None:
    run(2, {}, corpus, steps=4, save_at={step: folder / f"step={step}.ckpt" for step in (2, 4)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "run"
    run_distributed(save_twice, 2, corpus, folder)
    (folder / "last.ckpt").symlink_to("step=4.ckpt")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """step=2.ckpt, step=4.ckpt and last.ckpt, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run", symlinks=True)


def answer(*arguments: object, code: int = 0) -> Any:
    done = call_forked(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_verify_shows_every_file(folder: Path) -> None:
    manifest = Manifest.from_bytes((folder / "step=4.ckpt" / MANIFEST).read_bytes())
    shown = call_forked("verify", folder / "step=4.ckpt")
    assert shown.returncode == 0, shown.stderr
    assert "all good" in shown.stdout
    for file, record in manifest.files.items():
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(file)]
        assert record.digest in line and line.split()[-1] == "ok"
    assert {RANK_0, RANK_1, "index.json", "trainer.json", "config.json"} <= manifest.files.keys()

    (found,) = answer("verify", folder / "last.ckpt")
    assert found["status"] == "verified" and found["problems"] == []
    assert {row["file"]: (row["size"], row["digest"], row["state"]) for row in found["files"]} == {
        file: (record.size, record.digest, "ok") for file, record in manifest.files.items()
    }


def test_verify_names_file_chunk_and_digests(folder: Path) -> None:
    flip_bit(folder / "step=4.ckpt" / RANK_1, 4321, bit=5)
    (folder / "step=4.ckpt" / "config.json").unlink()
    (folder / "step=4.ckpt" / "notes.txt").write_text("mine")
    shown = call_forked("verify", folder)
    assert shown.returncode == 1
    assert f"{RANK_1}: chunk 0 (bytes 0 to " in shown.stdout
    assert "config.json: it is missing" in shown.stdout
    assert "notes.txt: the manifest does not list it" in shown.stdout
    assert "1 of 2 checkpoints cannot be loaded: step=4.ckpt" in shown.stdout

    bad, good = answer("verify", folder, code=1)
    manifest = Manifest.from_bytes((folder / "step=4.ckpt" / MANIFEST).read_bytes())
    missing, flipped = sorted(bad["problems"], key=lambda problem: problem["file"])
    assert missing["file"] == "config.json" and flipped["file"] == RANK_1 and flipped["chunk"] == 0
    assert flipped["expected"] == manifest.files[RANK_1].chunks[0] != flipped["actual"]
    states = {row["file"]: row["state"] for row in bad["files"]}
    assert states == dict.fromkeys(manifest.files, "ok") | {RANK_1: "damaged", "config.json": "missing"}
    assert bad["unlisted"] == ["notes.txt"] and good["status"] == "verified" and good["unlisted"] == []


def test_what_verifies_again_loses_its_note(folder: Path) -> None:
    flip_bit(folder / "step=4.ckpt" / RANK_0, 9000)
    assert call_forked("verify", folder / "last.ckpt").returncode == 1
    note = json.loads((folder / "step=4.ckpt.corrupt").read_text())
    assert note["problems"][0]["file"] == RANK_0
    assert not (folder / "last.ckpt.corrupt").exists(), "the note is beside the checkpoint that the alias stands for"
    flip_bit(folder / "step=4.ckpt" / RANK_0, 9000)
    assert call_forked("verify", folder / "last.ckpt").returncode == 0
    assert not (folder / "step=4.ckpt.corrupt").exists()


def test_a_manifest_that_is_damaged_is_a_damaged_checkpoint(folder: Path) -> None:
    flip_bit(folder / "step=4.ckpt" / MANIFEST, 200)
    shown = call_forked("verify", folder / "step=4.ckpt")
    assert shown.returncode == 1 and "manifest.json: its digest is" in shown.stdout
    (folder / "step=4.ckpt" / MANIFEST).unlink()
    shown = call_forked("verify", folder)
    assert shown.returncode == 1 and "manifest.json: it is missing or empty" in shown.stdout


def test_an_extra_file_is_no_failure(folder: Path) -> None:
    (folder / "step=4.ckpt" / "notes.txt").write_text("mine")
    shown = call_forked("verify", folder / "step=4.ckpt")
    assert shown.returncode == 0 and "notes.txt: the manifest does not list it" in shown.stdout


@pytest.mark.parametrize("command", ["verify", "checkpoints"])
def test_where_nothing_is_the_exit_code_is_2(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        done = call_forked(command, tmp_path / place)
        assert done.returncode == 2 and "There is no checkpoint at" in done.stderr
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / ".metadata").touch()
    done = call_forked(command, tmp_path / "old")
    assert done.returncode == 2 and "lightning-llm import" in done.stderr


def test_checkpoints_lists_what_is_there(folder: Path) -> None:
    draft = folder / ".staging-step=6.ckpt-elsewhere-4711-1f3a"
    draft.mkdir()
    (draft / RANK_0).write_bytes(bytes(1000))
    found = answer("checkpoints", folder)
    newest, oldest = found["checkpoints"]
    assert [newest["name"], oldest["name"]] == ["step=4.ckpt", "step=2.ckpt"]
    assert [newest["step"], newest["world_size"], newest["weights_only"], newest["status"]] == [4, 2, False, "verified"]
    assert newest["size"] == sum(p.stat().st_size for p in (folder / "step=4.ckpt").iterdir() if p.name != MANIFEST)
    assert newest["mesh"]["data_parallel_size"] == 2
    assert found["loaded"] == "step=4.ckpt" and found["aliases"] == {"last.ckpt": "step=4.ckpt"}
    assert found["drafts"] == {draft.name: 1000}
    shown = call_forked("checkpoints", folder).stdout
    assert "-> step=4.ckpt is what a run goes on from" in shown and "last.ckpt -> step=4.ckpt" in shown
    assert "interrupted: 1, 1.0 kB" in shown and "dp2" in shown


def test_checkpoints_tells_which_one_would_be_loaded(folder: Path, corpus: Path) -> None:
    flip_bit(folder / "step=4.ckpt" / RANK_0, 9000)
    unread = answer("checkpoints", folder, "--no-verify")
    assert unread["loaded"] == "step=4.ckpt" and unread["checkpoints"][0]["status"] == "not verified"
    read = answer("checkpoints", folder)
    assert read["loaded"] == "step=2.ckpt"
    assert [c["status"] for c in read["checkpoints"]] == ["damaged", "verified"]
    noted = answer("checkpoints", folder, "--no-verify")
    assert noted["loaded"] == "step=2.ckpt" and noted["checkpoints"][0]["status"] == "noted as damaged"
    assert "rank_00000.safetensors: chunk 0" in call_forked("checkpoints", folder).stdout

    (losses,) = run_distributed(go_on, 1, folder, corpus)
    assert len(losses) == 5 - 2, "the run goes on from there too"
    flip_bit(folder / "step=2.ckpt" / "trainer.json", 10)
    assert answer("checkpoints", folder, code=1)["loaded"] is None


def go_on(folder: Path, corpus: Path) -> list[float]:
    return run(1, {}, corpus, steps=5, resume=folder)["losses"]


def test_export_takes_the_newest_good_one(folder: Path, tmp_path: Path) -> None:
    flip_bit(folder / "step=4.ckpt" / RANK_0, 9000)
    done = call_forked("export", folder, tmp_path / "model")
    assert done.returncode == 0 and (tmp_path / "model" / "model.safetensors").is_file()
    assert (folder / "step=4.ckpt.corrupt").exists() and not (folder / "step=2.ckpt.corrupt").exists()
    done = call_forked("export", folder / "step=4.ckpt", tmp_path / "other")
    assert done.returncode == 77 and "step=4.ckpt cannot be loaded: rank_00000" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "other").exists()
    done = call_forked("generate", folder / "step=4.ckpt", "--prompt", "x")
    assert done.returncode == 2 and "is a checkpoint. Export it first" in done.stderr


def test_reshard_as_a_command(folder: Path, tmp_path: Path) -> None:
    done = call_forked("reshard", folder, tmp_path / "new", "--ranks", 3)
    assert done.returncode == 0, done.stderr
    assert "weights and optimizer states of step 4" in done.stdout and "tensors in 3 files" in done.stdout
    (found,) = answer("verify", tmp_path / "new")
    assert found["world_size"] == 3 and found["source"] == answer("verify", folder)[0]["uuid"]
    again = call_forked("reshard", folder, tmp_path / "new", "--ranks", 3)
    assert again.returncode == 2 and "is a checkpoint already" in again.stderr
    assert call_forked("reshard", folder, tmp_path / "other").returncode == 2, "--ranks must be said"


def full_disk() -> int:
    """The command, where no file may grow beyond 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return main()


def test_a_copy_that_cannot_be_written_ends_with_1_and_one_sentence(folder: Path, tmp_path: Path) -> None:
    done = call_forked("reshard", folder, tmp_path / "new", "--ranks", 2, run=full_disk)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "new could not be written: [Errno 27] File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../../secret": FileRecord(1, "00", ("00",))}}, "lists '../../secret', which is no file of a"),
        ({"files": {"/etc/passwd": FileRecord(1, "00", ("00",))}}, "lists '/etc/passwd', which is no file of a"),
        ({"files": {"a//b": FileRecord(1, "00", ("00",))}}, "lists 'a//b', which is no file of a"),
        ({"files": None}, "does not have the form of a manifest"),
    ],
    ids=["above", "elsewhere", "odd", "none"],
)
def test_a_manifest_cannot_point_elsewhere(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "step=4.ckpt" / MANIFEST
    manifest = Manifest.from_bytes(path.read_bytes())
    path.write_bytes(dataclasses.replace(manifest, **change).to_bytes())
    shown = call_forked("verify", folder / "step=4.ckpt")
    assert shown.returncode == 1 and message in shown.stdout


def test_a_run_without_a_good_checkpoint_ends_with_77(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Real processes: the list is on stderr, once, and nobody stays behind."""
    flip_bit(folder / "step=4.ckpt" / RANK_0, 9000)
    flip_bit(folder / "step=2.ckpt" / RANK_1, 9000)
    settings = {
        "accelerator": "cpu",
        "devices": 2,
        "max_steps": 6,
        "logger": "false",
        "limit_val_batches": 0,
        "enable_checkpointing": "false",
        "default_root_dir": tmp_path,
    }
    process = subprocess.Popen(
        [
            *(COMMAND, "fit", "--model.model=tiny", "--model.vocab_size=512", f"--data.path={corpus}"),
            *("--data.seq_len=32", f"--ckpt_path={folder}"),
            *(f"--trainer.{name}={value}" for name, value in settings.items()),
        ],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "stderr").open("w"),
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=120) == 77
        deadline = time.monotonic() + 5
        while left := [p for p in psutil.process_iter() if _is_of(p, process.pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    errors = (tmp_path / "stderr").read_text()
    assert errors.count("lightning-llm: None of the 2 checkpoints in") == 1, errors
    listed = errors[errors.index("lightning-llm: None of") :]
    assert "step=4.ckpt: rank_00000.safetensors: chunk 0" in listed
    assert "step=2.ckpt: rank_00001.safetensors: chunk 0" in listed
    assert "Traceback" not in errors
    assert {path.name for path in folder.glob("*.corrupt")} == {"step=2.ckpt.corrupt", "step=4.ckpt.corrupt"}


def _is_of(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
