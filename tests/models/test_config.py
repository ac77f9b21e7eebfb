"""`DecoderConfig`: published sizes, what is refused and how, and both ways through Hugging Face's config.json."""

import json

import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.expert_weights import file_shapes
from lightning_llm.models.presets import PRESETS
from lightning_llm.models.weights import SafetensorsSource
from tests.models.conftest import LLAMA3, LONGROPE, SIZES, VARIANTS, YARN

SMALL = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LIKE_DEEPSEEK = {"scoring_func": "sigmoid", "use_routing_bias": True, "n_shared_experts": 1, "first_k_dense_replace": 1}

# Parameter counts as the models' own pages state them.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "olmoe-1b-7b": 6_919_161_856,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_presets_have_the_published_number_of_parameters(name, count):
    assert DecoderConfig.preset(name).num_parameters() == count


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_shapes_are_the_decoders(name):
    config = DecoderConfig.preset(name)
    with torch.device("meta"):
        decoder = Decoder(config)
    check_shapes(config, decoder)


def check_shapes(config: DecoderConfig, decoder: Decoder) -> None:
    own = {n: tuple(t.shape) for n, t in decoder.state_dict().items()}
    if config.tie_word_embeddings:
        del own["lm_head.weight"]
    assert list(own.items()) == list(config.parameter_shapes().items())
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_shapes_are_transformers(variant, reference):
    model, folder = reference(variant)
    config = DecoderConfig.load(folder)
    check_shapes(config, Decoder(config))
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    with SafetensorsSource(folder) as source:
        assert {name: source.shape(name) for name in source.names()} == file_shapes(config)


def test_preset_names_are_forgiving_about_case_and_unknown_ones_list_all():
    assert DecoderConfig.preset("SmolLM2-135M") == DecoderConfig.preset("smollm2-135m")
    assert DecoderConfig.preset("tiny", vocab_size=99).vocab_size == 99
    with pytest.raises(ConfigurationError, match="'llama9'.*tiny.*qwen3-8b"):
        DecoderConfig.preset("llama9")


def test_tiny():
    config = DecoderConfig.preset("tiny")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_dim) == (4096, 256, 4, 32)
    assert not config.tie_word_embeddings


def test_derived_fields():
    config = DecoderConfig(**{**SMALL, "num_key_value_heads": None})
    assert (config.head_dim, config.num_key_value_heads, config.model_type) == (8, 6, "llama")
    assert config.eos_token_ids == ()
    assert DecoderConfig(**SMALL, eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert DecoderConfig(**SMALL, eos_token_id=7).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, "llama"),
        ({"sliding_window": 8}, "mistral"),
        ({"num_attention_heads": 4, "hidden_size": 50, "head_dim": 8}, "mistral"),  # 50 % 4: Llama refuses it
        ({"sliding_window": 8, "layer_types": ("full_attention",) * 2 + ("sliding_attention",)}, "ministral"),
        ({"attention_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({**EXPERTS}, "mixtral"),
        ({**EXPERTS, "sliding_window": 8}, "mixtral"),
        ({**EXPERTS, "qk_norm": True}, "qwen3_moe"),
        ({**EXPERTS, "qk_norm": True, "moe_intermediate_size": 16, "mlp_only_layers": [1]}, "qwen3_moe"),
        ({**EXPERTS, "qk_norm": True, "qk_norm_whole": True, "norm_topk_prob": False}, "olmoe"),
        ({**EXPERTS, "qk_norm": True, **LIKE_DEEPSEEK}, "dots1"),
        ({"num_experts": 0}, "llama"),
    ],
)
def test_the_fitting_family_is_chosen(changes, family):
    assert DecoderConfig(**{**SMALL, **changes}).model_type == family


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, not 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a positive integer, not 2.5"),
        ({"num_attention_heads": 5}, "hidden_size 48 % num_attention_heads 5 = 3"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 % num_key_value_heads 4 = 2"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"layer_types": ("full_attention",)}, "1 entries for num_hidden_layers 3"),
        ({"layer_types": ("full", "full", "full")}, "layer_types holds full"),
        ({"layer_types": ("sliding_attention",) * 3}, "sliding_window is not set"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": "llama", "qk_norm": True}, "'llama' cannot express.*qk_norm is True"),
        ({"model_type": "qwen3"}, "'qwen3' cannot express.*qk_norm is False"),
        ({"model_type": "qwen2"}, "'qwen2' cannot express.*attention_bias=True"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok is 2, but num_experts is not set"),
        ({"n_shared_experts": 1}, "n_shared_experts is 1, but num_experts is not set"),
        ({"num_experts": 4}, "num_experts_per_tok must be an integer of at least 1, not None"),
        ({**EXPERTS, "num_experts": -1}, "num_experts must be an integer of at least 1, not -1"),
        ({**EXPERTS, "num_experts_per_tok": 5}, "num_experts_per_tok 5 > num_experts 4"),
        ({**EXPERTS, "moe_intermediate_size": 0}, "moe_intermediate_size must be"),
        ({**EXPERTS, "scoring_func": "tanh"}, "scoring_func 'tanh' is not known: use softmax or sigmoid"),
        ({**EXPERTS, "mlp_only_layers": [3]}, "mlp_only_layers names layer 3, but the last of 3 layers is 2"),
        ({**EXPERTS, "decoder_sparse_step": 4}, "none of the 3 layers has experts: decoder_sparse_step 4"),
        ({**EXPERTS, "first_k_dense_replace": 3}, "none of the 3 layers has experts"),
        ({**EXPERTS, "router_aux_loss_coef": -1}, "router_aux_loss_coef must be a number of at least 0"),
        ({**EXPERTS, "routed_scaling_factor": 0}, "routed_scaling_factor must be a positive number"),
        ({"qk_norm_whole": True}, "qk_norm_whole is True, but qk_norm is not"),
        ({**EXPERTS, "model_type": "llama"}, "'llama' cannot express.*num_experts is 4"),
        ({"model_type": "mixtral"}, "'mixtral' cannot express.*num_experts is None"),
        ({**EXPERTS, "model_type": "mixtral", "norm_topk_prob": False}, "norm_topk_prob is False, not True"),
        ({**EXPERTS, "model_type": "mixtral", "moe_intermediate_size": 16}, "moe_intermediate_size is 16, not 64"),
        ({**EXPERTS, **LIKE_DEEPSEEK}, "No Hugging Face architecture .*dots1: qk_norm is False"),
        ({**EXPERTS, "qk_norm": True, **LIKE_DEEPSEEK, "n_shared_experts": 0}, "dots1: n_shared_experts is 0"),
        ({"qk_norm": True, "mlp_bias": True}, "No Hugging Face architecture has this combination"),
        ({"rope_scaling": {"rope_type": "magic"}}, "rope_type 'magic' is not supported.*llama3"),
        ({"rope_scaling": {"factor": 2.0}}, "no rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "kind 'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor must be a positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, "no setting beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "rope_theta": 5.0}}, "rope_theta 5.0, the config says"),
        (
            {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 3}},
            "short_factor has 3 entries, not head_dim 8 // 2 = 4",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 .* high_freq_factor 4.0"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        DecoderConfig(**{**SMALL, **changes})


def test_rope_scaling_is_normalised():
    config = DecoderConfig(**SMALL, rope_scaling={"type": "yarn", "factor": 2.0}, max_position_embeddings=128)
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    assert DecoderConfig(**SMALL, rope_scaling={"rope_type": "default"}).rope_scaling is None


def test_old_and_new_config_json_mean_the_same():
    common = {**{k: v for k, v in SIZES.items() if v is not None}, "model_type": "llama"}
    old = {
        **common,
        "rope_theta": 5e5,
        "rope_scaling": {**YARN, "rope_type": None, "type": "yarn"},
        "torch_dtype": "bfloat16",
    }
    new = {**common, "rope_parameters": {**YARN, "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert DecoderConfig.from_dict(old) == DecoderConfig.from_dict(new)
    assert DecoderConfig.from_dict(new).rope_theta == 5e5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name, tmp_path):
    config = DecoderConfig.preset(name)
    config.save(tmp_path)
    assert DecoderConfig.load(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_configs_survive(variant, reference, tmp_path):
    import transformers

    model, folder = reference(variant)
    config = DecoderConfig.load(folder)
    config.save(tmp_path / "again")
    assert DecoderConfig.load(tmp_path / "again") == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert type(theirs) is type(model.config)
    before, after = model.config.to_dict(), theirs.to_dict()
    for field in (
        "architectures",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "tie_word_embeddings",
        "head_dim",
    ):
        if before.get(field) is not None:
            assert after.get(field) == before[field], field


def test_qwen_windows_that_are_switched_off():
    values = {
        **SIZES,
        "model_type": "qwen2",
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    }
    assert DecoderConfig.from_dict(values).sliding_window is None


def test_qwen_windows_from_a_layer_on():
    values = {**SIZES, "model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}
    config = DecoderConfig.from_dict(values)
    assert [config.layer_window(i) for i in range(3)] == [None, 9, 9]


def test_mistral_with_layer_types_is_a_ministral():
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    values = {**SIZES, "model_type": "mistral", "sliding_window": 5, "layer_types": layer_types}
    config = DecoderConfig.from_dict(values)
    assert config.model_type == "ministral"
    assert [config.layer_window(i) for i in range(3)] == [None, 5, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported: Decoder implements llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"hidden_size": None, "vocab_size": None}, "vocab_size, hidden_size missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ per layer type"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        ({"model_type": "dots1", "n_routed_experts": 8, "n_group": 2}, "n_group 2 is not supported"),
        ({"model_type": "dots1", "n_routed_experts": 8, "topk_group": 4}, "topk_group 4 is not supported"),
        ({"model_type": "dots1"}, "n_routed_experts missing"),
    ],
)
def test_unsupported_config_json_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        DecoderConfig.from_dict({**SIZES, "model_type": "llama", **changes})


def test_bad_config_files_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"There is no .*absent/config\.json"):
        DecoderConfig.load(tmp_path / "absent")
    file = tmp_path / "config.json"
    for content in ("{broken", "\xff\xfe", "[1, 2]", json.dumps({"model_type": "bert"})):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(ConfigurationError, match=r"config\.json"):
            DecoderConfig.load(tmp_path)


def test_flops_per_token():
    config = DecoderConfig(**SMALL)
    # By hand: every matrix but the embedding table, 6 per element; attention 12 * layers * heads * head_dim * context.
    per_layer = 48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 64 + 2 * 48
    parameters = 3 * per_layer + 48 + 100 * 48
    assert config.flops_per_token(32) == 6 * parameters + 12 * 3 * 48 * 32
    assert config.replace(tie_word_embeddings=True).flops_per_token(32) == config.flops_per_token(32)
    windowed = config.replace(sliding_window=8, model_type=None)
    assert windowed.flops_per_token(32) == 6 * parameters + 12 * 3 * 48 * 8
    # Llama 3 405B at 8192: 6N plus attention is within a tenth of 6N.
    big = DecoderConfig.preset("llama3-405b")
    assert 1.0 < big.flops_per_token(8192) / (6 * big.num_parameters()) < 1.1


def test_which_layers_have_experts():
    values = {**SMALL, **EXPERTS, "num_hidden_layers": 6, "qk_norm": True}

    def layers(**changes: object) -> list[int]:
        config = DecoderConfig(**{**values, **changes})
        assert config.num_moe_layers == sum(config.layer_is_moe(i) for i in range(6))
        return [i for i in range(6) if config.layer_is_moe(i)]

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(decoder_sparse_step=2) == [1, 3, 5]
    assert layers(decoder_sparse_step=2, mlp_only_layers=[3, 4]) == [1, 5]
    assert layers(**{**LIKE_DEEPSEEK, "first_k_dense_replace": 4}) == [4, 5]
    dense = DecoderConfig(**SMALL)
    assert dense.num_moe_layers == 0 and not dense.layer_is_moe(0)


# Active parameters as the models' own pages state them, in billions.
ACTIVE = {"mixtral-8x7b": 12.9, "mixtral-8x22b": 39, "qwen3-30b-a3b": 3.3, "qwen3-235b-a22b": 22, "olmoe-1b-7b": 1.3}


@pytest.mark.parametrize(("name", "billions"), ACTIVE.items())
def test_presets_have_the_published_number_of_active_parameters(name, billions):
    assert DecoderConfig.preset(name).num_active_parameters() / 1e9 == pytest.approx(billions, rel=0.02)


def test_active_parameters_and_flops_count_the_experts_of_a_token():
    sparse = DecoderConfig(**SMALL, **EXPERTS, **LIKE_DEEPSEEK, qk_norm=True, moe_intermediate_size=16)
    # The dense model that does the same work: in layers 1 and 2, two experts, a shared one and the router.
    per_expert = 3 * 48 * 16
    dense = DecoderConfig(**SMALL, qk_norm=True)
    work = dense.num_parameters() + 2 * (3 * per_expert + 4 * 48 - 3 * 48 * 64)
    assert sparse.num_active_parameters() == work
    assert sparse.num_parameters() == work + 2 * 2 * per_expert
    assert dense.num_active_parameters() == dense.num_parameters()
    assert sparse.flops_per_token(32) - dense.flops_per_token(32) == 6 * (work - dense.num_parameters())


def test_mixtral_config_json_with_little_in_it():
    values = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = DecoderConfig.from_dict({**values, "num_attention_heads": 8, "model_type": "mixtral"})
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 2, 112)
    assert (config.num_key_value_heads, config.rope_theta, config.sliding_window) == (8, 1e6, None)
    assert config.norm_topk_prob
