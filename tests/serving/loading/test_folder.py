"""Hugging Face folders -> models that share memory with their files, and what is said of folders that are no models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.loading import load_folder
from tests.serving.loading.models import write_model

IDS = torch.arange(20)[None]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral"},
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "qk_norm": True,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "n_shared_experts": 1,
            "model_type": "dots1",
        },
    ],
    ids=["dense", "tied", "mixtral", "dots1"],
)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_the_decoder_is_that_of_the_folder(tmp_path: Path, changes: dict[str, Any], shards: str) -> None:
    expected = write_model(tmp_path, dtype="float32", shards=shards, **changes)
    model = load_folder(tmp_path, dtype="float32")
    assert not model.decoder.training
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())
    assert not any(tensor.is_meta for tensor in model.decoder.state_dict().values())
    assert model.name == tmp_path.name
    with torch.no_grad():
        assert torch.equal(model.decoder(IDS), expected(IDS))
        half = load_folder(tmp_path, dtype="bfloat16").decoder
        expected.bfloat16()
        assert torch.equal(half(IDS), expected(IDS))
        for name, tensor in half.state_dict().items():
            assert tensor.dtype == expected.state_dict()[name].dtype, "also of what stays float32"


def mapped_files(tensor: torch.Tensor) -> str:
    """The file in whose mapping a tensor's memory lies; empty if in none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc")


@needs_proc
def test_weights_of_the_same_type_are_views_of_the_files(tmp_path: Path) -> None:
    write_model(tmp_path, shards="20KB")
    same, other = load_folder(tmp_path).decoder, load_folder(tmp_path, dtype="float32").decoder
    assert next(same.parameters()).dtype == torch.bfloat16
    for name, parameter in same.named_parameters():
        assert mapped_files(parameter).startswith(str(tmp_path)), name
    assert not any(mapped_files(parameter).startswith(str(tmp_path)) for parameter in other.parameters())
    for file in tmp_path.glob("*.safetensors*"):  # they outlive their names
        file.unlink()
    with torch.no_grad():
        assert same(IDS).isfinite().all()


@needs_proc
def test_processes_share_their_pages(tmp_path: Path) -> None:
    import multiprocessing

    write_model(tmp_path, vocab_size=60000)
    context = multiprocessing.get_context("fork")
    ready, done = context.Barrier(3), context.Event()

    def serve() -> None:
        decoder = load_folder(tmp_path).decoder
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.float().sum()  # reads every page
        ready.wait(60)
        done.wait(60)

    processes = [context.Process(target=serve) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        ready.wait(60)
        size = (tmp_path / "model.safetensors").stat().st_size
        for process in processes:
            used = _usage(process.pid, str(tmp_path))
            assert used["Rss"] > 0.95 * size, "all of it was read"
            assert used["Private_Dirty"] == 0, "and nothing of it was copied"
            assert used["Pss"] < 0.6 * size, "half of it counts for each process"
    finally:
        done.set()
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def _usage(pid: int | None, folder: str) -> dict[str, int]:
    """Bytes of the mappings of files in a folder, by the kernel's names for kinds of pages."""
    used = {"Rss": 0, "Pss": 0, "Private_Dirty": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = folder in line
        elif inside and line.split(":")[0] in used:
            used[line.split(":")[0]] += int(line.split()[1]) * 1024
    return used


def test_what_its_makers_say_of_sampling(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert load_folder(tmp_path).generation_defaults == {}
    assert load_folder(tmp_path).tokenizer.eos_token_ids == {0}
    settings = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "eos_token_id": [0, 7],
        "do_sample": True,
        "num_beams": 1,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = load_folder(tmp_path)
    assert model.generation_defaults == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert model.tokenizer.eos_token_ids == {0, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert load_folder(tmp_path).generation_defaults == {"temperature": 0.0}
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "repetition_penalty": 1.1}))
    assert load_folder(tmp_path).generation_defaults == {"temperature": 0.0, "repetition_penalty": 1.1}
    for value in (1.5, "0.9", 0):
        (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": value}))
        with pytest.raises(ConfigurationError, match=r"generation_config\.json: top_p must be"):
            load_folder(tmp_path)


def test_another_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).rename(tmp_path / "words" / name)
    with pytest.raises(ConfigurationError, match=r"has no tokenizer.json, .* `tokenizer=`"):
        load_folder(tmp_path / "model")
    for tokenizer in (tmp_path / "words", tmp_path / "words" / "tokenizer.json"):
        model = load_folder(tmp_path / "model", tokenizer=tokenizer)
        assert model.tokenizer.decode(model.tokenizer.encode("fox 12")) == "fox 12"
        assert model.tokenizer.chat_template is not None


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _replace_weights(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return replace


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


AUTO_MAP = {"AutoModelForCausalLM": "modeling_evil.Evil"}
MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "code in config.json": (
        _edit("config.json", auto_map=AUTO_MAP),
        r"config.json has auto_map \(modeling_evil.Evil\)",
    ),
    "code in tokenizer_config.json": (
        _edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        r"tokenizer_config.json has auto_map .*never run",
    ),
    "an unknown family": (_edit("config.json", model_type="evil"), "model_type 'evil' is not supported"),
    "pytorch_model.bin": (_replace_weights("pytorch_model.bin"), "in pytorch_model.bin, which is pickled"),
    "model.pt": (_replace_weights("model.pt"), "in model.pt, which is pickled"),
    "model.pth": (_replace_weights("model.pth"), "pickled"),
    "last.ckpt": (_replace_weights("last.ckpt"), "pickled"),
    "no weights": (_replace_weights("notes.txt"), "neither model.safetensors nor model.safetensors.index.json"),
    "truncated weights": (_cut, "model.safetensors cannot be read .*truncated or damaged"),
    "weights of another model": (_edit("config.json", hidden_size=64), "of another shape"),
    "a small embedding": (_edit("config.json", vocab_size=100), r"tokenizer has 280 tokens .*100 rows, 180 too few"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "There is no .*config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "an end that is no token": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "eos_token_id is '</s>', not a token id",
    ),
    "nothing": (_empty, "is empty: a model has config.json"),
    "quantised weights": (_edit("config.json", quantization_config={"bits": 4}), "quantised"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, mistake: str) -> None:
    write_model(tmp_path)
    load_folder(tmp_path)
    evil = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    (tmp_path / "modeling_evil.py").write_text(evil)
    (tmp_path / "evil.py").write_text(evil)
    act, message = MISTAKES[mistake]
    if act is _empty:
        (tmp_path / "modeling_evil.py").unlink()
        (tmp_path / "evil.py").unlink()
    act(tmp_path)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "ran").exists()
