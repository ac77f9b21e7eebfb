"""`LLM` against transformers, token for token."""

import numpy as np
import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.decoder import Decoder
from lightning_llm.serving import LLM, SamplingParams
from lightning_llm.serving.errors import RequestError
from tests.serving.engine.models import ARCHITECTURES, make_decoder, prompts, tokenizer
from tests.serving.smollm2 import smollm2_folder

QUESTIONS = [
    "What is the capital of France?",
    "Write a Python function that adds 123 and 4567.",
    "Explain gravity to a child.",
    "Translate 'good morning' into Spanish, French and German.",
]
MORE = [
    "List the planets.", "Who wrote Hamlet?", "What is 17 times 23?", "Name three prime numbers above 100.",
    "Why is the sky blue?", "Tell a joke about a cat.", "Summarise the water cycle.", "What does HTTP 404 mean?",
    "Give me a recipe for pancakes.", "Write a limerick.", "Describe the colour red.", "What is a haiku?",
    "How do airplanes fly?", "What is DNA?", "Count from 1 to 20.", "Naïve café — 東京 🙂: what languages are these?",
]  # fmt: skip


def folder_of(decoder: Decoder, path) -> str:
    decoder.save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    return str(path)


def greedy_of_transformers(folder, asked: list[list[int]], count: int, **settings) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for ids in asked:
        given = torch.tensor([ids])
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, **settings
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_models_answer_as_in_transformers(architecture, tmp_path):
    folder = folder_of(make_decoder(architecture, torch.float32), tmp_path)
    asked = prompts(6)
    llm = LLM(folder, kv_cache_blocks=40, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=24))
    expected = greedy_of_transformers(folder, asked, 24, pad_token_id=0)
    assert [output.token_ids for output in outputs] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gpu_answers_as_transformers_does_on_a_cpu(architecture, tmp_path):
    folder = folder_of(make_decoder(architecture, torch.float32), tmp_path)
    asked = prompts(6)
    expected = greedy_of_transformers(folder, asked, 24, pad_token_id=0)
    sizes = {"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    for cache in ({"kv_cache_blocks": 40}, {"kv_cache_blocks": 20, "swap_blocks": 40}, {}):
        llm = LLM(folder, device="cuda", **sizes, **cache)
        assert llm.engine.runner.kernel == "triton"  # the one that takes float32
        for _ in range(2):  # the second time the prompts are in the cache
            outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=24))
            assert [output.token_ids for output in outputs] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_a_gpu_draws_the_same_tokens_however_it_is_asked(kv_cache_dtype, tmp_path):
    folder = folder_of(make_decoder("llama", torch.bfloat16), tmp_path)
    asked = prompts(6)
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=7, max_tokens=24, logprobs=3)
    llm = LLM(folder, device="cuda", block_size=16, kv_cache_blocks=40, kv_cache_dtype=kv_cache_dtype)
    together, again = llm.generate(asked, params), llm.generate(asked, params)
    assert [output.token_ids for output in together] == [output.token_ids for output in again]
    assert all(output.finish_reason in ("length", "stop") for output in together)


def smollm2_agrees(questions: list[str], count: int) -> None:
    folder = smollm2_folder("float32")
    roomy = LLM(folder, kv_cache_blocks=512, max_num_seqs=32)
    texts = [roomy.tokenizer.apply_chat_template([{"role": "user", "content": one}]) for one in questions]
    asked = [roomy.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = greedy_of_transformers(folder, asked, count)
    params = SamplingParams(temperature=0, max_tokens=count)
    tight = LLM(folder, kv_cache_blocks=40, max_num_seqs=8, max_num_batched_tokens=24, swap_blocks=40)
    for llm in (roomy, tight):
        for _ in range(2):  # the second time the prompts are in the cache
            outputs = llm.generate(asked, params)
            assert [output.token_ids for output in outputs] == expected
            assert [output.text for output in outputs] == [llm.tokenizer.decode(ids) for ids in expected]
        assert llm.engine.stats().prefix_cache_hits > 0


def test_smollm2_answers_as_in_transformers():
    smollm2_agrees(QUESTIONS[:2], 12)


@pytest.mark.slow
def test_smollm2_answers_twenty_prompts_as_in_transformers():
    smollm2_agrees(QUESTIONS + MORE, 64)


@pytest.mark.slow
def test_smollm2_in_bfloat16_has_the_logits_of_transformers_within_rounding():
    """Log-probabilities of a prompt's tokens: as far from float32's as those of transformers in bfloat16 are."""
    from transformers import AutoModelForCausalLM

    folder = smollm2_folder("float32")
    llm = LLM(folder, dtype="bfloat16", kv_cache_blocks=64, max_num_batched_tokens=24, max_num_seqs=8)
    for question in QUESTIONS:
        text = llm.tokenizer.apply_chat_template([{"role": "user", "content": question}])
        ids = llm.tokenizer.encode(text, add_special_tokens=False)
        [output] = llm.generate([ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
        ours = torch.tensor([one.logprob for one in output.prompt_logprobs[1:]])
        theirs = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            theirs[dtype] = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        rounding = (theirs[torch.bfloat16] - theirs[torch.float32]).abs()
        error = (ours - theirs[torch.float32]).abs()
        assert error.mean() < 2 * rounding.mean() and error.max() < 3 * rounding.max()


def test_ten_lines(tmp_path):
    llm = LLM(folder_of(make_decoder("llama", torch.float32), tmp_path / "model"), kv_cache_blocks=64)
    one = llm.generate("the fox", SamplingParams(temperature=0, max_tokens=4))
    assert one[0].prompt == "the fox" and one[0].prompt_token_ids == llm.tokenizer.encode("the fox")
    assert one[0].text == llm.tokenizer.decode(one[0].token_ids)
    both = llm.generate(["the fox", llm.tokenizer.encode("dog")], [SamplingParams(n=2), SamplingParams(max_tokens=2)])
    assert [len(output.outputs) for output in both] == [2, 1] and both[1].prompt is None
    vectors = llm.embed(["the fox", "dog"])
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1], abs=1e-5)
    saved = LLM(llm.save_pretrained(tmp_path / "again"), kv_cache_blocks=64)
    assert saved.generate("the fox", SamplingParams(temperature=0, max_tokens=4))[0].token_ids == one[0].token_ids


def test_mistakes_are_named(tmp_path):
    folder = folder_of(make_decoder("llama", torch.float32), tmp_path / "model")
    with pytest.raises(ConfigurationError, match="LLM has no setting kv_blocks; it has max_model_len, max_num_seqs"):
        LLM(folder, kv_blocks=3)
    llm = LLM(folder, kv_cache_blocks=64)
    with pytest.raises(RequestError, match="There are 2 prompts and 1 sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(RequestError, match="The prompt has no tokens"):
        llm.generate(["a", ""])
    assert not llm.engine.has_work
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_nothing_stays_of_what_was_refused(tmp_path):
    llm = LLM(folder_of(make_decoder("llama", torch.float32), tmp_path), kv_cache_blocks=64)
    for ask in (llm.generate, llm.embed):
        with pytest.raises(RequestError, match="The prompt has no tokens"):
            ask(["the fox", ""])
        assert not llm.engine.has_work
        assert len(llm.generate("dog", SamplingParams(max_tokens=2))[0].token_ids) == 2


def test_one_that_fails_does_not_take_the_others_along(tmp_path):
    decoder = make_decoder("llama", torch.float32)
    with torch.no_grad():
        decoder.model.embed_tokens.weight[5] = torch.nan
    llm = LLM(folder_of(decoder, tmp_path), kv_cache_blocks=64)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    bad, good = llm.generate([[9, 5], [9, 7]], sampling_params=params)
    assert bad.finish_reason == "error" and bad.error == bad.outputs[0].error and "NaN" in bad.error
    assert good.finish_reason == "length" and good.error is None and len(good.token_ids) == 4


def test_answers_end_with_the_context(tmp_path):
    llm = LLM(folder_of(make_decoder("llama", torch.float32), tmp_path), kv_cache_blocks=64, max_model_len=32)
    params = SamplingParams(temperature=0, max_tokens=500, min_tokens=400, ignore_eos=True)
    output = llm.generate([1, 2, 3], params)[0]
    assert (len(output.token_ids), output.finish_reason) == (29, "length")
    with pytest.raises(RequestError, match="context is 32 tokens: the prompt has 32"):
        llm.generate([1] * 32, params)


def test_prompts_come_in_several_forms(tmp_path):
    llm = LLM(folder_of(make_decoder("llama", torch.float32), tmp_path), kv_cache_blocks=64)
    params = SamplingParams(temperature=0, max_tokens=2)
    ids = llm.tokenizer.encode("the fox")
    alike = llm.generate([{"prompt": "the fox"}, {"prompt_token_ids": ids}, np.array(ids).tolist(), "the fox"], params)
    assert [output.prompt_token_ids for output in alike] == [ids] * 4
    assert llm.generate({"prompt": "the fox"}, params)[0].token_ids == alike[0].token_ids
    for wrong, message in (
        ([[1.0, 2.0]], "Prompt 0 is neither a text nor a sequence of token ids: .1.0, 2.0."),
        (["a", 7.5], "Prompt 1 is neither a text nor a sequence of token ids: 7.5"),
        ("x\ud800", "half a surrogate pair at character 1"),
        ({"prompts": "a"}, "Prompt 0 has prompts: it may have prompt and prompt_token_ids"),
        (5, "prompts is a int"),
    ):
        for ask in (llm.generate, llm.embed):
            with pytest.raises(RequestError, match=message):
                ask(wrong)
    with pytest.raises(RequestError, match="2 prompts and 1 priorities"):
        llm.generate(["a", "b"], params, priority=[1])
    with pytest.raises(RequestError, match="no SamplingParams"):
        llm.generate("a", {"max_tokens": 3})


def test_what_is_saved_is_what_was_loaded(tmp_path):
    folder = tmp_path / "model"
    folder_of(make_decoder("llama", torch.float32), folder)
    (folder / "chat_template.jinja").write_text("the model's")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[0].content }}")
    params = SamplingParams(temperature=0, max_tokens=4)
    llm = LLM(folder, kv_cache_blocks=64)
    expected = llm.generate("the fox", params)[0].token_ids
    assert llm.save_pretrained(folder) == folder, "where it came from"
    copied = llm.save_pretrained(tmp_path / "copied")
    assert (copied / "additional_chat_templates" / "tool_use.jinja").read_text() == "with tools"
    assert LLM(copied, kv_cache_blocks=64).generate("the fox", params)[0].token_ids == expected

    llm = LLM(folder, chat_template=template, kv_cache_blocks=64)
    template.unlink()
    saved = LLM(llm.save_pretrained(copied), kv_cache_blocks=64)
    assert saved.chat([{"role": "user", "content": "the fox"}], params)[0].token_ids == expected
    assert not (copied / "additional_chat_templates").exists()

    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match="has no tokenizer.json any more"):
        llm.save_pretrained(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
