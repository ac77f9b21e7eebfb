"""What is private in torch, or has other names in 2.11 than in 2.13, which warns of the old ones."""

import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.checkpoint.state_dict import _get_fqns

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# torch.compiler.disable, which imports the compiler at once; this does when the function is called.
untraced = _disable_dynamo
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def own_store() -> dist.Store:
    """A connection of one's own, for one thread, to the store that the processes found each other by."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def parameter_names(module: nn.Module) -> dict[Tensor, str]:
    """Names that parameters have in state dicts, where the names of wrappers are left out."""
    return {parameter: next(iter(_get_fqns(module, name))) for name, parameter in module.named_parameters()}
