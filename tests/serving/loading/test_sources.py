"""What a model's name can be: each kind of source gives the same model, and each mistake says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open

from lightning_llm import DecoderConfig
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.store import open_store
from lightning_llm.data.tokenize import tokenize
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from lightning_llm.serving.loading import load_model
from lightning_llm.serving.loading.cache import ENTRY, ModelCache
from tests.checkpoint.runs import run
from tests.data.corpora import prose
from tests.distributed import run_distributed
from tests.object_storage import ObjectStorage
from tests.serving.loading.ggufs import write_gguf
from tests.serving.loading.hub import COMMIT, serve_hub
from tests.serving.loading.models import write_model
from tests.serving.loading.test_gguf import build

IDS = torch.arange(20)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCache:
    monkeypatch.setenv("LIGHTNING_LLM_CACHE", str(tmp_path / "cache"))
    return ModelCache()


def entries(cache: ModelCache) -> list[Path]:
    return sorted(path.parent for path in cache.folder.glob(f"*/{ENTRY}"))


@torch.no_grad()
def logits(source: Any, **arguments: Any) -> torch.Tensor:
    return load_model(source, **arguments).decoder(IDS)


# Folders and files


def test_a_folder_needs_no_cache(tmp_path: Path, cache: ModelCache) -> None:
    expected = write_model(tmp_path / "model")
    for source in (tmp_path / "model", str(tmp_path / "model"), f"file://{tmp_path}/model"):
        assert torch.equal(logits(source), expected(IDS))
    assert load_model(tmp_path / "model").name == "model"
    assert load_model(tmp_path / "model", name="mine").name == "mine"
    assert not cache.folder.exists()


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: ModelCache) -> None:
    path = write_gguf(tmp_path / "small.gguf", build("Llama"), "llama")
    model = load_model(path)
    assert model.name == "small"
    assert model.folder == entries(cache)[0]
    before = (model.folder / "model.safetensors").stat().st_mtime_ns
    assert load_model(path).folder == model.folder
    assert (model.folder / "model.safetensors").stat().st_mtime_ns == before
    assert next(load_model(path, dtype="float16").decoder.parameters()).dtype == torch.float16
    assert len(entries(cache)) == 2, "each type is another conversion"
    write_gguf(path, build("Llama", tie_word_embeddings=True), "llama")
    assert load_model(path).decoder.config.tie_word_embeddings, "the file is another one"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing/here/at-all", r"There is no nothing/here/at-all: a model is .*\.gguf .*hub"),
        ("/nothing", "There is no /nothing"),
        ("folder/model.safetensors", "one file of a model: give the folder"),
        ("folder/model.bin", "is a pickled file.*lightning-llm import"),
        ("folder/notes.txt", "is no model"),
        ("folder/nested", "is empty"),
        ("folder", "There is no .*folder/config.json"),
        ("ggufs", r"has .gguf files: name one, such as .*a.gguf"),
    ],
)
def test_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "nested").mkdir(parents=True)
    for name in ("model.safetensors", "model.bin", "notes.txt"):
        (tmp_path / "folder" / name).touch()
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").touch()
    with pytest.raises(ConfigurationError, match=message):
        load_model(source)


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    place = tmp_path_factory.mktemp("trained")
    (place / "text.txt").write_text(prose(0, 1200))
    tokenize([place / "text.txt"], place / "tokens", vocab_size=300, val_fraction=0.4, num_workers=1, progress=False)
    config = DecoderConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    saves = {step: place / "run" / f"step-{step}.ckpt" for step in (1, 2)}
    run_distributed(_train, 1, place / "tokens", config, saves)
    return place / "run"


def _train(corpus: Path, config: DecoderConfig, saves: dict[int, Path]) -> None:
    run(1, {}, corpus, config=config, save_at=saves, steps=2)


def test_a_checkpoint(trained: Path, cache: ModelCache) -> None:
    model = load_model(trained / "step-2.ckpt")
    assert next(model.decoder.parameters()).dtype == torch.float32, "as it was trained"
    assert model.name == "step-2.ckpt"
    assert model.tokenizer.decode(model.tokenizer.encode("Some text.")) == "Some text."
    assert model.tokenizer.eos_token_ids == {0}
    assert torch.equal(logits(trained), model.decoder(IDS)), "of a folder of checkpoints the newest"
    assert not torch.equal(logits(trained / "step-1.ckpt"), model.decoder(IDS))
    assert len(entries(cache)) == 2
    with safe_open(load_model(trained, dtype="bfloat16").folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_a_damaged_checkpoint_is_not_served(trained: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(trained, run_folder)
    expected = logits(run_folder / "step-1.ckpt")
    file = run_folder / "step-2.ckpt" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(NoGoodCheckpointError, match="rank_00000.safetensors"):
        load_model(run_folder / "step-2.ckpt")
    assert torch.equal(logits(run_folder), expected), "the one before"


# Buckets


@pytest.fixture(scope="module")
def bucket(object_storage: ObjectStorage) -> Callable[[Path, str], str]:
    """Uploads a folder to a prefix; returns its address."""
    name = object_storage.bucket("models")
    client = object_storage.client()

    def upload(folder: Path, prefix: str) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), name, f"{prefix}/{path.relative_to(folder)}")
        return f"s3://{name}/{prefix}"

    return upload


def test_a_folder_in_a_bucket(bucket: Callable[[Path, str], str], tmp_path: Path, cache: ModelCache) -> None:
    expected = write_model(tmp_path / "model", shards="20KB")
    for unwanted in ("pytorch_model.bin", "code.py", "README.md"):
        (tmp_path / "model" / unwanted).write_text("x")
    url = bucket(tmp_path / "model", "team/tiny")
    model = load_model(url)
    assert torch.equal(model.decoder(IDS), expected(IDS))
    assert model.name == "tiny"
    assert {path.suffix for path in model.folder.iterdir()} == {".json", ".safetensors"}, "nothing else is fetched"
    assert load_model(url + "/", dtype="float32").folder == model.folder, "one download for all types"
    other = write_model(tmp_path / "model", shards="20KB", rope_theta=5.0)
    bucket(tmp_path / "model", "team/tiny")
    assert torch.equal(logits(url), other(IDS)), "it was replaced there"
    assert len(entries(cache)) == 2


def test_a_gguf_file_in_a_bucket(bucket: Callable[[Path, str], str], tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    path = write_gguf(tmp_path / "up" / "small.gguf", build("Llama"), "llama")
    url = bucket(tmp_path / "up", "ggufs")
    model = load_model(f"{url}/small.gguf")
    assert torch.equal(model.decoder(IDS), logits(path))
    assert model.name == "small"
    assert not list(model.folder.glob("**/*.gguf"))
    with pytest.raises(ConfigurationError, match=r"There is no s3://.*/other.gguf"):
        load_model(f"{url}/other.gguf")


def test_a_checkpoint_in_a_bucket(bucket: Callable[[Path, str], str], trained: Path, tmp_path: Path) -> None:
    store = open_store(bucket(tmp_path / "nothing", "run"))
    opened = Checkpoint.open(trained / "step-2.ckpt", alone=True)
    location = store.create("step-2.ckpt", "a")
    folder = opened.local(*opened.manifest.files)
    for file in opened.manifest.files:
        store.write(location, file, [(folder / file).read_bytes()], opened.manifest.algorithm)
    store.commit(location, "step-2.ckpt", opened.manifest.to_bytes())
    expected = logits(trained / "step-2.ckpt")
    assert torch.equal(logits(f"{store.url}/step-2.ckpt"), expected)
    assert torch.equal(logits(store.url), expected)


def test_what_is_no_model_in_a_bucket(bucket: Callable[[Path, str], str], tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "config.json").write_text("{}")
    (tmp_path / "up" / "pytorch_model.bin").write_text("x")
    url = bucket(tmp_path / "up", "pickled")
    with pytest.raises(ConfigurationError, match="pytorch_model.bin, which is pickled"):
        load_model(url)
    with pytest.raises(ConfigurationError, match="There is no checkpoint at"):
        load_model(f"{url}/nothing")


# The hub


@pytest.fixture
def hub_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points huggingface_hub at an endpoint, and at a cache of its own: it reads the variables only on import."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def use(endpoint: str) -> None:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)

    return use


def test_models_of_the_hub(
    tmp_path: Path, hub_settings: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_model(tmp_path / "up")
    for unwanted in ("pytorch_model.bin", "modeling_evil.py", "consolidated.safetensors", "original/a.safetensors"):
        (tmp_path / "up" / unwanted).parent.mkdir(exist_ok=True)
        (tmp_path / "up" / unwanted).write_text("x")
    name = "some-org/Some_Model-1.5"
    with serve_hub(name, tmp_path / "up") as hub:
        hub_settings(hub.endpoint)
        model = load_model(name)
        assert model.name == name
        assert torch.equal(model.decoder(IDS), expected(IDS))
        assert load_model(name, revision=COMMIT).folder == model.folder
        assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        with pytest.raises(ConfigurationError, match="has no revision 'v9'"):
            load_model(name, revision="v9")
        with pytest.raises(ConfigurationError, match="no folder some-org/none here, and no model of that name on the"):
            load_model("some-org/none")
    assert load_model(name).folder == model.folder, "the hub is gone, and what was fetched before is still here"
    unreachable = "could not be fetched from the hub, nor was it before .*: check the network, HF_HUB_OFFLINE"
    with pytest.raises(ConfigurationError, match=unreachable):
        load_model("some-org/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=unreachable):
        load_model("some-org/new")
