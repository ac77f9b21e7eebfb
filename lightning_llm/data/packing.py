"""Turn planned shards of text into chunks of token ids, in a process of its own; `tokenize.py` calls `pack`.

Why a process of its own: litdata.optimize changes the start method, seeds and signal handlers of the process that calls
it, prints, and (by spawn) runs the caller's main script again in each worker. Here none of that reaches the user.
The process sends one JSON record a line on its stdout, ends when its stdin ends (so it never outlives us), and holds
the lock on the staging folder until its last worker is gone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lightning_llm._processes import end_group_with_parent
from lightning_llm.data._litdata import optimize_environment, optimize_tokens
from lightning_llm.data.corpus import Chunk, Split
from lightning_llm.data.documents import Piece, SourceFile, read_texts
from lightning_llm.data.tokenizer import load_tokenizer
from lightning_llm.errors import ConfigurationError

# Starts the packing process without the package's own __init__, which imports Lightning: seconds that it does not need.
_PACKAGE = Path(__file__).parent.parent
_START = (
    "import sys, types; package = types.ModuleType('lightning_llm'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['lightning_llm'] = package; from lightning_llm.data.packing import main; main(sys.argv[2])"
)
_RECORD = "\x1e"  # starts a line that is ours; every other line is somebody's chatter
_TAIL_LINES = 30
_LONGEST_TEXT = 3000
_LARGEST_SHORT_ID = 1 << 16


@dataclass(frozen=True)
class Job:
    """All that the packing process needs to know.

    Attributes:
        output: the folder that gets one sub-folder for each split.
        tokenizer: path of the tokenizer.json.
        vocab_size: decides how many bytes an id takes.
        end_of_text_id: appended to each document.
        text_key: where JSON lines have their text.
        files: the files that pieces refer to.
        shards: for each split that is not empty, its shards; each becomes one chunk.
        num_workers: processes to use; changes nothing but the time.
        start_method: how they start.
    """

    output: str
    tokenizer: str
    vocab_size: int
    end_of_text_id: int
    text_key: str
    files: list[SourceFile]
    shards: dict[str, list[list[Piece]]]
    num_workers: int
    start_method: str = field(default_factory=lambda: "fork" if sys.platform.startswith("linux") else "spawn")

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Job:
        """Read what `save` wrote."""
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        values["files"] = [SourceFile(**item) for item in values["files"]]
        values["shards"] = {
            name: [[Piece(*piece) for piece in shard] for shard in shards] for name, shards in values["shards"].items()
        }
        return cls(**values)


def pack(job: Job, scratch: Path, on_bytes: Callable[[int], None], keep_open: int | None = None) -> dict[str, Split]:
    """Run a job in its own process and wait for it.

    Args:
        job: what to do.
        scratch: an empty folder for temporary files; the caller removes it.
        on_bytes: called with the bytes of text that were just tokenised.
        keep_open: a file descriptor that the process and its workers hold (the lock of the staging folder).

    Raises:
        ConfigurationError: the input cannot be used.
        RuntimeError: the process failed for another reason; has the last lines that it printed.
    """
    job_file = scratch / "job.json"
    job.save(job_file)
    environment = optimize_environment(scratch) | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",  # the workers are the parallelism
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _START, str(_PACKAGE), str(job_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches us alone, and we end all of them
        pass_fds=() if keep_open is None else (keep_open,),
    )
    counts = {name: [0, 0] for name in job.shards}  # documents, bytes of text
    chunks: dict[str, tuple[Chunk, ...]] = {}
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        for line in _lines(process):
            if not line.startswith(_RECORD):
                tail.append(line)
                continue
            record = json.loads(line[1:])
            if "error" in record:
                raise ConfigurationError(record["error"])
            if "failure" in record:
                raise RuntimeError(f"Tokenising failed:\n{record['failure']}")
            if "chunks" in record:
                chunks[record["split"]] = tuple(Chunk(**chunk) for chunk in record["chunks"])
                if chunks.keys() == job.shards.keys():
                    return {name: Split(counts[name][0], counts[name][1], chunks[name]) for name in job.shards}
            else:
                count = counts[record["split"]]
                count[0] += record["documents"]
                count[1] += record["text_bytes"]
                on_bytes(record["text_bytes"])
    finally:
        _end(process)
    raise RuntimeError(
        f"Tokenising ended early, with exit code {process.returncode}. The last that it printed:\n" + "\n".join(tail)
    )


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What the process and its workers print, line by line, until it ends."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    while True:
        # Not until the stream ends: when the process is killed, helpers that litdata's workers started hold it open.
        ended = psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        if not select.select([descriptor], [], [], 0.0 if ended else 0.5)[0]:
            if ended:
                return
            continue
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its workers, however far they are. Must come before anything that waits for the process.

    litdata cannot be asked: when a worker fails, its other processes wait for each other for ever.
    """
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group that has ended
        os.killpg(process.pid, signal.SIGKILL)  # it leads its own session and so its own group
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


# ---- from here on: what runs in the packing process and its workers ----


def main(job_file: str) -> None:
    """Do the job in that file; the body of the packing process."""
    threading.Thread(target=end_group_with_parent, daemon=True).start()
    job = Job.load(job_file)
    for split, shards in job.shards.items():
        chunks = optimize_tokens(
            ShardTokens(job_file, split),
            len(shards),
            Path(job.output) / split,
            num_workers=job.num_workers,
            start_method=job.start_method,
        )
        _send(split=split, chunks=[asdict(chunk) for chunk in chunks])


def _send(**record: Any) -> None:
    # One write, past all buffers, so that lines of different workers do not mix (up to 4 kB, which a pipe takes whole;
    # the list of chunks is longer, but is sent when no worker is left).
    data = (_RECORD + json.dumps(record) + "\n").encode()
    while data:
        data = data[os.write(1, data) :]


class ShardTokens:
    """Called with the number of a shard, gives its token ids [tokens]; what litdata's workers run."""

    def __init__(self, job_file: str, split: str) -> None:
        self.job_file = job_file
        self.split = split
        self._job: Job | None = None
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_job": None, "_tokenizer": None}  # cheaper to read again than to send

    def __call__(self, shard: int) -> np.ndarray:
        """Token ids of a shard, in the smallest type that holds the vocabulary."""
        try:
            if self._job is None:
                self._job = Job.load(self.job_file)
                self._tokenizer = load_tokenizer(self._job.tokenizer)
                # A document that spells "<|endoftext|>" holds these characters, not the end of a document.
                self._tokenizer.encode_special_tokens = True
            return self._tokens(self._job, self._job.shards[self.split][shard])
        except ConfigurationError as error:
            _send(error=str(error)[:_LONGEST_TEXT])
            raise
        except Exception:
            _send(failure=traceback.format_exc()[-_LONGEST_TEXT:])
            raise

    def _tokens(self, job: Job, pieces: list[Piece]) -> np.ndarray:
        dtype = np.uint16 if job.vocab_size <= _LARGEST_SHORT_ID else np.uint32
        end_of_text = np.array([job.end_of_text_id], dtype=dtype)
        parts: list[np.ndarray] = []
        for piece in pieces:
            file = job.files[piece.file]
            texts = read_texts(file, piece, job.text_key)
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                parts.append(np.array(encoding.ids, dtype=dtype))
                if piece.ends_document:
                    parts.append(end_of_text)
            documents = len(texts) if piece.ends_document else 0
            _send(split=self.split, documents=documents, text_bytes=piece.size)
        tokens = np.concatenate(parts) if parts else end_of_text
        return tokens if len(tokens) else end_of_text  # a chunk must not be empty
