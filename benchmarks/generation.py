"""Who answers many prompts at once in this process, taking turns in serve.py: our engine and transformers, two ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lightning_llm.serving import LLM, SamplingParams

Prompts = Sequence[Sequence[int]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of every side


class TimeIsUpError(Exception):
    """A side took longer than it may."""


class Side(Protocol):
    """One way to answer prompts: greedily, `output_len` tokens each, whatever the model would end with."""

    name: str

    def generate(self, prompts: Prompts, output_len: int) -> list[list[int]]:
        """The answers' tokens."""


class OurEngine:
    name = "ours"

    def __init__(self, folder: Path, dtype: torch.dtype, most: int) -> None:
        self.llm = LLM(folder, dtype=dtype, device=DEVICE, max_model_len=2048, max_num_seqs=most)

    def generate(self, prompts: Prompts, output_len: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        return [output.token_ids for output in self.llm.generate(prompts, params)]


class StaticBatch:
    """`model.generate` on a rectangle of prompts: what most people write first."""

    name = "generate"

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(self, prompts: Prompts, output_len: int) -> list[list[int]]:
        given = torch.tensor([list(prompt) for prompt in prompts], device=DEVICE)
        mask = torch.ones_like(given)
        with torch.inference_mode():
            answer = self.model.generate(given, attention_mask=mask, max_new_tokens=output_len)
        return answer[:, given.shape[1] :].tolist()


class ContinuousBatching:
    """transformers' own scheduler over a paged cache, its manager kept between calls, as a server would.

    It changes how its model attends, so the model is one of its own.

    Args:
        folder: The model.
        dtype: Of its weights.
        longest: Tokens of the longest sequence.
        most: Sequences at a time.
        limit: Seconds that a call may take.
    """

    name = "continuous batching"

    def __init__(self, folder: Path, dtype: torch.dtype, longest: int, most: int, limit: float) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.limit = limit
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
        # Called page_size in later releases than 5.17 of transformers.
        pages = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
        page_size = 32
        self.manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(
                num_blocks=most * -(-longest // page_size), max_batch_tokens=2048, **{pages: page_size}
            ),
        )
        self.manager.start()

    def generate(self, prompts: Prompts, output_len: int) -> list[list[int]]:
        ends = time.perf_counter() + self.limit
        names = self.manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens=output_len)
        answers: dict[str, list[int]] = {}
        while len(answers) < len(names):
            if time.perf_counter() > ends:
                for name in names:
                    self.manager.cancel_request(name)
                raise TimeIsUpError(f"{len(answers)} of {len(names)} answers in {self.limit:g} s")
            if not self.manager.is_running():
                raise RuntimeError("transformers' generation thread has ended")
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[name] for name in names]

    def close(self) -> None:
        self.manager.stop(block=True, hard_stop=True)
