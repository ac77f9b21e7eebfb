"""Random initial weights that do not depend on the layout: any part of any tensor can be drawn by itself.

A `WeightSource` like a safetensors folder, so a rank materialises its share of a fresh model and of a loaded one alike.
"""

import hashlib
import math

import torch
from torch import Tensor

from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.expert_weights import is_stacked, read_stacked
from lightning_llm.models.sizes import ROUTING_BIAS
from lightning_llm.models.weights import Box, box_bounds

# Tensors are drawn in blocks of whole rows of about this many elements, each from its own generator: a rank that holds
# some rows of a 405B model draws those and not the rest. Changing it changes all initial weights.
_BLOCK_ELEMENTS = 1 << 18


class RandomInit:
    """Initial weights of a decoder, a pure function of (config, seed, parameter name, element).

    Norms are 1 and biases 0; matrices are normal(0, initializer_range), and those that write to the residual stream
    (o_proj, down_proj) are further divided by sqrt(2 * layers), since that many of them add up there (GPT-2, Radford et
    al. 2019, section 2.3). Each expert is drawn as the matrix that it would be alone.
    """

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    def read(self, name: str, box: Box, shape: tuple[int, ...]) -> Tensor:
        """The part `box` of the parameter `name`, whose whole shape is `shape`: float32 on the CPU."""
        if is_stacked(name):
            return read_stacked(self.read, name, box, shape)
        bounds = box_bounds(box, shape)
        size = tuple(stop - start for start, stop in bounds)
        if name.endswith("norm.weight"):
            return torch.ones(size, device="cpu", dtype=torch.float32)
        if name.endswith((".bias", ROUTING_BIAS)):
            return torch.zeros(size, device="cpu", dtype=torch.float32)
        std = self.config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.config.num_hidden_layers)
        return self._normal(name, bounds, shape) * std

    def _normal(self, name: str, bounds: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> Tensor:
        (first, last), rest = bounds[0], tuple(slice(start, stop) for start, stop in bounds[1:])
        out = torch.empty([stop - start for start, stop in bounds], device="cpu", dtype=torch.float32)
        if out.numel() == 0:
            return out
        rows = max(1, _BLOCK_ELEMENTS // math.prod(shape[1:]))  # rows per block
        generator = torch.Generator(device="cpu")
        for block in range(first // rows, (last - 1) // rows + 1):
            start, stop = block * rows, min((block + 1) * rows, shape[0])
            digest = hashlib.blake2b(f"{self.seed}/{name}/{block}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest, "little"))
            drawn = torch.randn((stop - start, *shape[1:]), generator=generator, device="cpu", dtype=torch.float32)
            low, high = max(start, first), min(stop, last)
            out[low - first : high - first] = drawn[(slice(low - start, high - start), *rest)]
        return out
