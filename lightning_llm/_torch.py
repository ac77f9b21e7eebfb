"""What is private in torch, or has other names in 2.11 than in 2.13, which warns of the old ones."""

import torch
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


def recorded_collectives() -> list[str]:
    """The traces of torch's flight recorders in JSON, of gloo and of NCCL where there is one; empty if none records."""
    recorders = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    found = [getattr(torch._C._distributed_c10d, name, None) for name in recorders]
    return [recorder().decode() for recorder in found if recorder is not None]


def copy_all(places: list[Tensor], tensors: list[Tensor]) -> None:
    """Copies each tensor to its place, without waiting for devices.

    One call, since Python's lock is taken up again after each: beside a thread that computes in Python, half a
    gigabyte in 700 tensors takes 3.4 s one by one, and 0.04 s so (torch 2.13, one core).
    """
    if places:
        torch._foreach_copy_(places, tensors, non_blocking=True)


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter, also of one that ZeRO-3 has partitioned and emptied (deepspeed's `ds_shape`)."""
    return getattr(parameter, "ds_shape", parameter.shape)
