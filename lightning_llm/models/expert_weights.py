"""Between a decoder's stacked experts and a Hugging Face folder, which has one tensor per expert, in both directions.

    in memory   model.layers.0.mlp.experts.gate_proj                        [experts, intermediate, hidden]
    on disk     model.layers.0.mlp.experts.7.gate_proj.weight               [intermediate, hidden]
    Mixtral     model.layers.0.block_sparse_moe.experts.7.w1.weight

Called by whoever reads or writes such folders. For dense models the names on both sides are the same.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.sizes import EXPERT_PROJECTIONS, ROUTING_BIAS
from lightning_llm.models.weights import Box, SafetensorsSource, box_bounds, check_names

_STACKED = re.compile(rf"(.+\.mlp\.experts)\.({'|'.join(EXPERT_PROJECTIONS)})")
_MIXTRAL = {".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}


def is_stacked(name: str) -> bool:
    """Whether a tensor of the decoder holds one matrix per expert."""
    return _STACKED.fullmatch(name) is not None


def expert_name(name: str, expert: int) -> str:
    """What the matrix of one expert in the stacked tensor `name` is called."""
    match = _STACKED.fullmatch(name)
    assert match is not None
    return f"{match[1]}.{expert}.{match[2]}.weight"


def file_name(name: str, model_type: str) -> str:
    """What a tensor that is not stacked, or the matrix of one expert, is called in a folder of this family."""
    if model_type == "mixtral" and ".mlp." in name:
        for ours, theirs in _MIXTRAL.items():
            name = name.replace(ours, theirs)
        return name.replace(".mlp.", ".block_sparse_moe.")
    return name


def file_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a Hugging Face folder of this model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in config.parameter_shapes().items():
        if is_stacked(name):
            names, shape = [expert_name(name, expert) for expert in range(shape[0])], shape[1:]
        else:
            names = [name]
        shapes.update({file_name(one, config.model_type): shape for one in names})
    return shapes


def read_stacked(
    read: Callable[[str, Box, tuple[int, ...]], Tensor], name: str, box: Box, shape: tuple[int, ...]
) -> Tensor:
    """A box of a stacked tensor from a `read` (see `WeightSource`) of single experts; reads those in the box only."""
    bounds = box_bounds(box, shape)
    first, last = bounds[0]
    out: Tensor | None = None
    for expert in range(first, last):
        part = read(expert_name(name, expert), box[1:], shape[1:])
        if out is None:
            out = part.new_empty((last - first, *part.shape))
        out[expert - first] = part
    return torch.empty([stop - start for start, stop in bounds]) if out is None else out


class PretrainedWeights:
    """The weights in a Hugging Face folder, by the names and shapes of `Decoder`: a `WeightSource`.

    A context manager: leaving it unmaps the files.

    Raises:
        ConfigurationError: a file is missing or damaged, or tensors are missing, extra or of another shape; all are
            named, as they are called in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], config: DecoderConfig) -> None:
        self._model_type = config.model_type
        self._source = SafetensorsSource(folder)
        try:
            check_names(file_shapes(config), self._source)
        except ConfigurationError:
            self._source.close()
            raise

    def read(self, name: str, box: Box, shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        if is_stacked(name):
            return read_stacked(self.read, name, box, shape)
        return self._source.read(file_name(name, self._model_type), box, shape)

    def __enter__(self) -> "PretrainedWeights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()


def to_files(
    tensors: Iterable[tuple[str, Tensor]], config: DecoderConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a decoder -> those of a Hugging Face folder, for `save_weights`; one at a time.

    Args:
        tensors: whole, by the names of `DecoderConfig.parameter_shapes`.
        config: of the decoder.
        dtype: what to convert to; None: nothing is converted. Routing biases never are, as in transformers.
    """
    for name, tensor in tensors:
        if dtype is not None and not name.endswith(ROUTING_BIAS):
            tensor = tensor.to(dtype)
        if is_stacked(name):
            for expert, matrix in enumerate(tensor.unbind(0)):
                yield file_name(expert_name(name, expert), config.model_type), matrix
        else:
            yield file_name(name, config.model_type), tensor
