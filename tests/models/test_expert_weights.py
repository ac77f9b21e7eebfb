"""Stacked experts and a folder with one tensor per expert: the same numbers, read and written part by part."""

import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_llm import LLMModule
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.expert_weights import PretrainedWeights, file_shapes, to_files
from lightning_llm.models.initialization import RandomInit
from lightning_llm.models.weights import load_weights, save_weights

QWEN = DecoderConfig.preset(
    "tiny-moe", vocab_size=97, hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2, mlp_only_layers=(0,)
)
MIXTRAL = QWEN.replace(
    model_type="mixtral", qk_norm=False, intermediate_size=24, moe_intermediate_size=None, mlp_only_layers=()
)
DOTS1 = QWEN.replace(
    model_type="dots1",
    scoring_func="sigmoid",
    use_routing_bias=True,
    n_shared_experts=1,
    mlp_only_layers=(),
    first_k_dense_replace=1,
)
CONFIGS = {"qwen3_moe": QWEN, "mixtral": MIXTRAL, "dots1": DOTS1}
with_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def with_bias(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config)
    for name, buffer in decoder.named_buffers():
        assert name.endswith("e_score_correction_bias")
        buffer.copy_(torch.linspace(-1, 1, buffer.numel()) / 3)
    return decoder


@with_configs
def test_files_have_hugging_faces_names_and_come_back(config, tmp_path):
    decoder = with_bias(config)
    decoder.save_pretrained(tmp_path, max_shard_size="20KB")
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
    assert found == file_shapes(config)
    experts = "model.layers.1.block_sparse_moe.experts" if config is MIXTRAL else "model.layers.1.mlp.experts"
    assert found[f"{experts}.7.{'w2' if config is MIXTRAL else 'down_proj'}.weight"] == (32, 24)
    loaded = Decoder.from_pretrained(tmp_path)
    for (name, one), other in zip(decoder.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("config", [QWEN, MIXTRAL], ids=["qwen3_moe", "mixtral"])
def test_a_box_is_a_slice_of_the_stack(config, tmp_path, data):
    decoder = Decoder(config)
    if not (tmp_path / "config.json").exists():
        decoder.save_pretrained(tmp_path)
    name = data.draw(st.sampled_from([f"model.layers.1.mlp.experts.{p}_proj" for p in ("gate", "up", "down")]))
    whole = decoder.get_parameter(name)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
    box = tuple(slice(start, stop) for start, stop in bounds)
    with PretrainedWeights(tmp_path, config) as source:
        assert torch.equal(source.read(name, box, tuple(whole.shape)), whole[box])


def test_only_the_experts_in_the_box_are_read(tmp_path, monkeypatch):
    Decoder(QWEN).save_pretrained(tmp_path)
    with PretrainedWeights(tmp_path, QWEN) as source:
        asked = []
        read = source._source.read
        monkeypatch.setattr(source._source, "read", lambda name, *box: asked.append(name) or read(name, *box))
        part = source.read("model.layers.1.mlp.experts.up_proj", (slice(2, 4), slice(0, 6), slice(None)), (8, 24, 32))
    assert part.shape == (2, 6, 32)
    assert asked == [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 3)]


@with_configs
def test_what_does_not_fit_is_told_in_hugging_faces_names(config, tmp_path):
    Decoder(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if ".experts.5." in name)
    del tensors[lost]
    extra = lost.replace(".5.", ".8.")
    tensors[extra] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError) as error:
        Decoder.from_pretrained(tmp_path)
    assert f"1 missing: {lost}" in str(error.value)
    assert f"1 that this model does not have: {extra}" in str(error.value)


def test_one_stacked_tensor_at_a_time_is_in_memory(tmp_path):
    alive = most = 0

    def freed() -> None:
        nonlocal alive
        alive -= 1

    def produce():
        nonlocal alive, most
        for name, shape in config.parameter_shapes().items():
            tensor = torch.zeros(shape)
            if "experts" in name:
                weakref.finalize(tensor.untyped_storage(), freed)
                alive += 1
                most = max(most, alive)
            yield name, tensor
            del tensor

    config = QWEN.replace(num_hidden_layers=6)
    save_weights(to_files(produce(), config), tmp_path, max_shard_size="4KB")
    assert most <= 2  # one whose last expert is being written, and the next


def test_conversion_leaves_the_routing_bias_exact(tmp_path):
    decoder = with_bias(DOTS1)
    tensors = dict(to_files(((n, t) for n, t in decoder.state_dict().items()), DOTS1, torch.bfloat16))
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    decoder.bfloat16().save_pretrained(tmp_path)
    loaded = Decoder.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    bias = loaded.model.layers["1"].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, decoder.model.layers["1"].mlp.gate.e_score_correction_bias)
    assert bias.dtype == torch.float32


def test_a_module_loads_the_folder(tmp_path):
    decoder = with_bias(DOTS1)
    decoder.save_pretrained(tmp_path)
    module = LLMModule(str(tmp_path))
    built = module.build_model()
    load_weights(built, module.weight_source())
    for (name, one), other in zip(decoder.state_dict().items(), built.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_each_expert_is_drawn_as_the_matrix_that_it_would_be_alone():
    source = RandomInit(QWEN, 3)
    shape = (8, 24, 32)
    for projection in ("gate_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{projection}"
        whole = source.read(name, (slice(None),) * 3, shape)
        for expert in (0, 7):
            alone = f"model.layers.1.mlp.experts.{expert}.{projection}.weight"
            assert torch.equal(whole[expert], source.read(alone, (slice(None),) * 2, shape[1:]))
        box = (slice(3, 6), slice(1, 20), slice(5, 6))
        assert torch.equal(source.read(name, box, shape), whole[box])
        assert not torch.equal(whole[0], whole[1])
        std = 0.02 / (2 if projection == "down_proj" else 1)  # two layers: sqrt(2 * 2)
        assert whole.std().item() == pytest.approx(std, rel=0.05)
    assert not source.read("model.layers.1.mlp.gate.e_score_correction_bias", (slice(None),), (8,)).any()
    assert source.read("model.layers.1.mlp.gate.weight", (slice(None),) * 2, (8, 32)).std() > 0.015
