"""Safetensors in and out: transformers reads what we write and the other way round, and damage is named."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.weights import (
    SafetensorsSource,
    check_names,
    load_weights,
    parse_size,
    save_weights,
    torch_dtype,
)
from tests.models.conftest import VARIANTS, WITH_EXPERTS

CONFIG = DecoderConfig.preset("tiny", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
EXPORTED = ["llama", "llama-biases", "llama-longrope", "llama-llama3", "smollm2", "mistral-window", "ministral"]
EXPORTED += ["qwen2-window", "qwen3", "qwen3-bias-window", *WITH_EXPERTS]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sharded folder written by us."""
    Decoder(CONFIG).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(files(tmp_path / "model")) > 4
    return tmp_path / "model"


@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("variant", EXPORTED)
def test_transformers_loads_what_we_save(variant, max_shard_size, reference, tmp_path):
    import transformers

    original, folder = reference(variant)
    Decoder.from_pretrained(folder).save_pretrained(tmp_path / "out", max_shard_size=max_shard_size)
    assert ("model.safetensors" in files(tmp_path / "out")) == (max_shard_size == "5GB")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(original)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 211, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(Decoder.from_pretrained(tmp_path / "out")(ids), expected, rtol=1e-5, atol=1e-5)


def test_we_load_shards_written_by_transformers(reference, tmp_path):
    model, _ = reference("qwen2")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert "model.safetensors.index.json" in files(tmp_path / "sharded")
    decoder = Decoder.from_pretrained(tmp_path / "sharded")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(decoder(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_trip(dtype, tmp_path):
    decoder = Decoder(CONFIG).to(dtype)
    decoder.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    loaded = Decoder.from_pretrained(tmp_path)
    for (name, before), after in zip(decoder.named_parameters(), loaded.parameters(), strict=True):
        assert after.dtype == dtype and torch.equal(before, after), name
    widened = Decoder.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(widened.lm_head.weight, decoder.lm_head.weight.float())


def test_loading_does_not_touch_global_state_or_keep_files_mapped(saved):
    before = torch.get_default_dtype(), torch.random.get_rng_state()
    decoder = Decoder.from_pretrained(saved, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(saved) not in maps.read_text()
    assert next(decoder.parameters()).requires_grad


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_a_box_is_slicing_the_whole(dtype, tmp_path, data):
    file = tmp_path / "model.safetensors"
    shapes = {"matrix": (13, 7), "vector": (9,), "cube": (3, 4, 5)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if not file.exists():
        save_file(tensors, file)
    name = data.draw(st.sampled_from(list(shapes)))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shapes[name]]
    box = tuple(slice(start, stop) for start, stop in bounds)
    with SafetensorsSource(tmp_path) as source:
        assert torch.equal(source.read(name, box, shapes[name]), tensors[name][box])


def test_only_the_box_is_read(tmp_path):
    """A part of a tensor is read from a file whose other parts do not exist on disk (a hole of 2 GB)."""
    rows, columns = 1 << 20, 512
    header = json.dumps({"big": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}})
    header = header.ljust(-(-len(header) // 8) * 8)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + rows * columns * 4)
        file.seek(8 + len(header) + 777 * columns * 4)
        file.write(torch.arange(columns, dtype=torch.float32).numpy().tobytes())
    status = Path("/proc/self/statm")

    def resident() -> int:
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0

    before = resident()
    with SafetensorsSource(tmp_path) as source:
        part = source.read("big", (slice(776, 778), slice(0, 512)), (rows, columns)).clone()
        assert resident() - before < 64 << 20
    assert torch.equal(part[1], torch.arange(512.0))
    assert not part[0].any()


def test_load_into_shards_and_by_name(saved):
    whole = Decoder.from_pretrained(saved)

    rank = Decoder(CONFIG)
    projections = rank.model.layers["1"].self_attn
    # As a tensor-parallel rank holds them: half the rows of one projection, and an empty share of another.
    projections.q_proj.weight = torch.nn.Parameter(torch.zeros(16, 32))
    projections.k_proj.weight = torch.nn.Parameter(torch.zeros(0, 32))

    def local(parameter):
        if parameter is projections.q_proj.weight:
            return parameter.detach(), (slice(16, 32), slice(0, 32)), (32, 32)
        return parameter.detach(), (slice(16, 16), slice(0, 32)), (16, 32)

    with SafetensorsSource(saved) as source:
        asked: list[str] = []

        class Recording:
            def read(self, name, box, shape):
                asked.append(name)
                return source.read(name, box, shape)

        names = [f"model.layers.1.self_attn.{part}.weight" for part in ("q_proj", "k_proj")]
        load_weights(rank, Recording(), local=local, names=names)
        assert asked == names[:1]  # nothing is read for an empty share
        assert torch.equal(projections.q_proj.weight, whole.model.layers["1"].self_attn.q_proj.weight[16:])

        fresh = Decoder(CONFIG)
        fresh.reset_parameters(seed=9)
        untouched = fresh.lm_head.weight.clone()
        load_weights(fresh, source, names=["model.norm.weight", "model.embed_tokens.weight"])
    assert torch.equal(fresh.model.embed_tokens.weight, whole.model.embed_tokens.weight)
    assert torch.equal(fresh.lm_head.weight, untouched)


def test_leaving_the_source_unmaps_its_files(saved):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this system")
    with SafetensorsSource(saved) as source:
        source.read("model.norm.weight", (slice(0, 32),), (32,))
        assert str(saved) in maps.read_text()
    assert str(saved) not in maps.read_text()
    assert source.names()


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path):
    Decoder(CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError) as error:
        Decoder.from_pretrained(tmp_path)
    message = str(error.value)
    assert "1 missing: model.layers.1.mlp.up_proj.weight" in message
    assert "1 that this model does not have: model.layers.2.mlp.up_proj.weight" in message
    assert "1 of another shape: model.norm.weight is [31], not [32]" in message
    assert str(tmp_path) in message


def test_a_long_list_of_names_is_cut(tmp_path):
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source, pytest.raises(ConfigurationError, match="20 missing: .* and 12 more"):
        check_names(CONFIG.parameter_shapes(), source)


def test_harmless_extras_are_ignored(tmp_path):
    tied = CONFIG.replace(tie_word_embeddings=True)
    decoder = Decoder(tied)
    decoder.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = Decoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, decoder.lm_head.weight)


def test_quantised_tensors_are_refused(tmp_path):
    Decoder(CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"model.norm.weight holds torch.int8"):
        Decoder.from_pretrained(tmp_path)


def test_damaged_files_are_named(saved):
    shards = [name for name in files(saved) if name.endswith(".safetensors")]
    shard = saved / shards[1]
    good = shard.read_bytes()
    for damage in (good[:-50], good[:4], b"", b"\xff" * len(good), b"not a tensor" * 40):
        shard.write_bytes(damage)
        with pytest.raises(ConfigurationError, match=f"{shard.name} cannot be read .*truncated or damaged"):
            Decoder.from_pretrained(saved)
    shard.unlink()
    with pytest.raises(ConfigurationError, match=f"lists {shard.name}, which is missing"):
        Decoder.from_pretrained(saved)
    shard.write_bytes((saved / shards[2]).read_bytes())
    with pytest.raises(ConfigurationError, match=f"{shard.name} lacks model.* says it has"):
        Decoder.from_pretrained(saved)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}", "\xff"])
def test_a_damaged_index_is_named(saved, content):
    (saved / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigurationError, match=r"index\.json is damaged"):
        Decoder.from_pretrained(saved)


def test_an_index_may_not_point_outside(saved):
    index = saved / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="points outside its folder"):
        Decoder.from_pretrained(saved)


def test_missing_folders_and_pickles_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="no folder .*absent"):
        SafetensorsSource(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match=r"neither model\.safetensors nor"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigurationError, match=r"pytorch_model\.bin, but pickled weights are never loaded"):
        SafetensorsSource(tmp_path)


def test_shards_respect_the_limit_and_the_index_is_right(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    tensors["big"] = torch.zeros(1000)
    paths = save_weights(tensors.items(), tmp_path, max_shard_size=1200)
    assert [path.name for path in paths] == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 400 * 10 + 4000
    assert list(index["weight_map"]) == list(tensors)
    with SafetensorsSource(tmp_path) as source:
        assert source.names() == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name, (slice(None),), tuple(tensor.shape)), tensor)
    for path in paths[:-1]:
        assert sum(t.nbytes for t in load_file(path).values()) <= 1200


def test_views_and_strides_are_saved_as_what_they_show(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    save_weights(
        [("left", base[:, :3]), ("right", base[:, 3:]), ("turned", base.T), ("row", base[1]), ("rows", base[1:3])],
        tmp_path,
    )
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["left"], base[:, :3]) and torch.equal(loaded["right"], base[:, 3:])
    assert torch.equal(loaded["turned"], base.T) and torch.equal(loaded["row"], base[1])
    assert torch.equal(loaded["rows"], base[1:3])


def test_one_shard_at_a_time_is_in_memory(tmp_path):
    alive = 0
    most = 0

    def freed() -> None:
        nonlocal alive
        alive -= 1

    def produce():
        nonlocal alive, most
        for i in range(40):
            tensor = torch.full((256,), float(i))
            weakref.finalize(tensor, freed)
            alive += 1
            most = max(most, alive)
            yield f"t{i}", tensor

    save_weights(produce(), tmp_path, max_shard_size=4 * 1024)
    # Four fill a shard; one more is in the hands of the producer and one on its way.
    assert most <= 6
    assert len(files(tmp_path)) == 11


def test_saving_again_leaves_nothing_of_the_old(tmp_path):
    (tmp_path / "model_notes.safetensors").write_bytes(b"not ours")
    tensors = [(f"t{i}", torch.zeros(100)) for i in range(6)]
    for size, expected in (("400B", 7), ("1GB", 1), ("800B", 4), ("1GB", 1)):
        save_weights(tensors, tmp_path, max_shard_size=size)
        assert len(files(tmp_path)) == expected + 1
        with SafetensorsSource(tmp_path) as source:
            assert sorted(source.names()) == [name for name, _ in tensors]


@pytest.mark.parametrize("before", ["1GB", "500B", None])
def test_an_interrupted_save_changes_nothing(before, tmp_path):
    if before:
        save_weights([("old", torch.ones(200)), ("older", torch.ones(200))], tmp_path, max_shard_size=before)
    existing = files(tmp_path)

    def breaking_off():
        yield "a", torch.zeros(200)
        yield "b", torch.zeros(200)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_weights(breaking_off(), tmp_path, max_shard_size="500B")
    assert files(tmp_path) == existing
    if before:
        with SafetensorsSource(tmp_path) as source:
            assert sorted(source.names()) == ["old", "older"]


@pytest.mark.parametrize("before", ["1GB", "500B"])
@pytest.mark.parametrize("after", ["1GB", "500B"])
@pytest.mark.parametrize("step", range(6))
def test_a_save_that_dies_while_publishing_never_leaves_a_mixture(before, after, step, tmp_path, monkeypatch):
    old, new = ([(name, torch.full((100,), value)) for name in "abc"] for value in (1.0, 2.0))
    save_weights(old, tmp_path, max_shard_size=before)
    replace, calls = os.replace, []

    def dying(source, target):
        calls.append(target)
        if len(calls) > step:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    try:
        save_weights(new, tmp_path, max_shard_size=after)
    except OSError:
        assert len(calls) > step
    monkeypatch.undo()
    try:
        with SafetensorsSource(tmp_path) as source:
            values = {float(source.read(name, (slice(None),), (100,))[0]) for name in "abc"}
    except ConfigurationError:
        return
    assert values in ({1.0}, {2.0})


def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    (tmp_path / ".saving-999999999-dead").mkdir()
    (tmp_path / ".saving-999999999-dead" / "0").write_bytes(b"half")
    save_weights([("a", torch.zeros(2))], tmp_path)
    assert files(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("200mb", 200 * 10**6), ("7B", 7), ("12", 12)],
)
def test_parse_size(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["5 apples", "", "-3", 0, "GB", "0.0"])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ConfigurationError, match="is not a size"):
        parse_size(size)


def test_torch_dtype():
    assert torch_dtype("bfloat16") is torch_dtype(torch.bfloat16) is torch.bfloat16
    for wrong in ("int8", "nn", "float31"):
        with pytest.raises(ConfigurationError, match=f"'{wrong}' is not a float type"):
            torch_dtype(wrong)


def test_all_variants_have_an_export_family():
    families = {VARIANTS[name][0] for name in EXPORTED}
    assert families == {family for family, _ in VARIANTS.values()}
