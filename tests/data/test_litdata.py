"""What we rely on in litdata: if a new version changes one of these, this file says so."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_llm.data._litdata import TokenBlocks, import_litdata, optimize_environment
from lightning_llm.data.corpus import TokenizedCorpus
from lightning_llm.errors import ConfigurationError
from tests.data.corpora import tokens_of

# Run apart, because optimize changes its process; no main guard, as in a user's script.
OPTIMIZE = """
import sys
from pathlib import Path
import numpy as np
from lightning_llm.data._litdata import optimize_tokens
def tokens(item):
    return np.arange(item * 100, item * 100 + 20 + item, dtype=np.uint16)
chunks = optimize_tokens(tokens, 7, Path(sys.argv[1]), num_workers=int(sys.argv[2]), start_method="fork")
print([(chunk.filename, chunk.tokens, chunk.bytes) for chunk in chunks])
"""


def optimize(output: Path, workers: int, environment: dict[str, str]) -> str:
    command = [sys.executable, "-W", "ignore", "-c", OPTIMIZE, str(output), str(workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_each_item_becomes_a_chunk_in_order_whatever_the_workers_and_nothing_else_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # litdata's own default is to delete and recreate `chunks` and `data` in the system's temporary folder.
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    for folder in ("chunks", "data"):
        (tmp_path / "tmp" / folder).mkdir(parents=True)
        (tmp_path / "tmp" / folder / "mine").write_text("keep me")
    monkeypatch.setenv("WORLD_SIZE", "4")  # as under torchrun
    printed = {}
    for workers in (1, 3):
        environment = optimize_environment(tmp_path / f"scratch{workers}") | {"PYTHONPATH": os.pathsep.join(sys.path)}
        printed[workers] = optimize(tmp_path / f"out{workers}", workers, environment)
    assert printed[1] == printed[3]
    assert printed[1].strip() == str([(f"chunk-0-{k}.bin", 20 + k, (20 + k) * 2 + 12) for k in range(7)])
    for name in [*(f"chunk-0-{k}.bin" for k in range(7)), "index.json"]:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "out3")) == sorted([*(f"chunk-0-{k}.bin" for k in range(7)), "index.json"])
    for folder in ("chunks", "data"):
        assert (tmp_path / "tmp" / folder / "mine").read_text() == "keep me"

    blocks = TokenBlocks(tmp_path / "out3", 9)  # 2 blocks of 9 in each chunk of 20 to 26 tokens
    assert [int(blocks[place][0]) for place in range(14)] == [100 * k + start for k in range(7) for start in (0, 9)]


def test_random_access_does_not_depend_on_rank_or_world_size(
    corpus: TokenizedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = sum(corpus.train.sequences_per_chunk(16))
    alone = TokenBlocks(corpus.path / "train", 17)
    expected = [alone[place].tolist() for place in range(sequences)]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GLOBAL_RANK", "2")
    among_four = TokenBlocks(corpus.path / "train", 17)
    assert [among_four[place].tolist() for place in range(sequences)] == expected


def test_blocks_are_the_tokens_of_each_chunk_in_order(corpus: TokenizedCorpus) -> None:
    tokens, blocks = tokens_of(corpus, "train"), TokenBlocks(corpus.path / "train", 33)
    start = place = 0
    for chunk in corpus.train.chunks:
        for block in range(chunk.tokens // 33):
            np.testing.assert_array_equal(blocks[place], tokens[start + block * 33 :][:33])
            place += 1
        start += chunk.tokens
    assert place > 50 and len(corpus.train.chunks) > 4


def test_blocks_can_be_sent_to_another_process(corpus: TokenizedCorpus) -> None:
    blocks = TokenBlocks(corpus.path / "train", 17)
    first = blocks[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(blocks))[0], first)


def test_index_has_what_we_read(corpus: TokenizedCorpus) -> None:
    index = json.loads((corpus.path / "train" / "index.json").read_text())
    assert index["config"]["item_loader"] == "TokensLoader"
    assert index["config"]["data_format"] == ["no_header_numpy:5"]  # uint16
    assert [entry["dim"] for entry in index["chunks"]] == [chunk.tokens for chunk in corpus.train.chunks]


def test_missing_litdata_names_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(ConfigurationError) as error:
        import_litdata()
    assert 'pip install "lightning-llm[data]"' in str(error.value)
    assert "pip install --no-deps litdata" in str(error.value)
