"""The part of a snapshot that is taken while training goes on: the tensors that only an optimizer's step changes.

    save        copies everything else at once, and notes how these tensors look
    a thread    copies them during the next forward and backward, and looks again
    the step    of one of their optimizers waits for what is left of the copy, when its gradients are there

So it was done in CheckFreq (Mohan et al., FAST 2021) and DataStates-LLM (https://arxiv.org/abs/2406.10707). Neither
looks again; here a tensor that something else has changed meanwhile fails the save. saver.py calls this.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_llm._torch import copy_all
from lightning_llm.checkpoint.committing import FinalError
from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.checkpoint.planning import local_part

SAMPLES = 16  # elements of a tensor that are looked at

log = logging.getLogger(__name__)

_Place = tuple[str, int, int]  # device, address, bytes


def stepped_tensors(tensors: Mapping[str, Tensor | Pieces], optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Which tensors are an optimizer's parameters or states, or parts of such; all others may change at any time.

    They are known by their memory, since a state dict has objects of its own, and an engine's one buffer has those of
    many. What is not contiguous, or not all in one tensor of an optimizer, is not found.

    Returns:
        Name -> the optimizer's own object.
    """
    owners: dict[_Place, Tensor] = {}
    for optimizer in optimizers:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for state in optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        for owner in held:
            local = local_part(owner)
            place = _place(getattr(local, "_tensor", local))  # torchao wraps weights to be gathered in float8
            if place is not None:
                owners[place] = owner
    ordered = sorted(owners)
    found = {}
    for name, tensor in tensors.items():
        parts = [piece.tensor for piece in tensor.pieces] if isinstance(tensor, Pieces) else [local_part(tensor)]
        around = {_around(_place(part), ordered) for part in parts}
        whose = around.pop() if len(around) == 1 else None
        if whose is not None:
            found[name] = owners[whose]
    return found


def _place(tensor: Tensor) -> _Place | None:
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_contiguous() or not tensor.numel():
        return None
    return str(tensor.device), tensor.data_ptr(), tensor.numel() * tensor.itemsize


def _around(place: _Place | None, ordered: list[_Place]) -> _Place | None:
    """Which of the places, in order, contains a place."""
    if place is None:
        return None
    device, start, size = place
    before = bisect_right(ordered, (device, start), key=lambda outer: outer[:2])
    if not before:
        return None
    outer = ordered[before - 1]
    return outer if outer[0] == device and start + size <= outer[1] + outer[2] else None


class OverlappedCopy:
    """A copy that is still to be made. One thread calls `run`; `wait` is the training's.

    Args:
        places: Name -> where on the host it is copied to.
        tensors: Name -> this rank's part of it.
        owners: Name -> the optimizer's own object.
        optimizers: Whose steps wait for the copy.

    Attributes:
        waited: Seconds that training stood still for it.
    """

    def __init__(
        self,
        places: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        owners: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
    ) -> None:
        self.waited = 0.0
        self._error: FinalError | None = None
        self._made = threading.Event()
        self._places = list(places.values())
        self._tensors = [tensors[name] for name in places]
        self._looks: _Looks | None = _Looks(dict(zip(places, self._tensors, strict=True)), owners)
        self._device = next((tensor.device for tensor in self._tensors if tensor.is_cuda), None)
        self._ready = torch.cuda.current_stream(self._device).record_event() if self._device is not None else None
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def run(self) -> None:
        """Makes the copy. What goes wrong is told by `check`."""
        try:
            with torch.no_grad(), self._beside():
                copy_all(self._places, self._tensors)
                assert self._looks is not None
                changed = self._looks.changed()
            if changed:
                self._error = FinalError(
                    f"{changed[0]} was changed before it was copied (one of {len(changed)} such tensors), and not by a "
                    "step of its optimizer. A hook or a callback that edits weights needs snapshot='copy'"
                )
        except Exception as error:  # it must not vanish with the thread
            log.exception("The snapshot failed")
            self._error = FinalError(f"the snapshot failed: {type(error).__name__}: {error}")
        finally:
            self._places, self._tensors, self._looks = [], [], None  # they may be given back
            self._made.set()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Work on a device runs beside the training's, after what was queued when the state was saved."""
        if self._device is None:
            yield
            return
        assert self._ready is not None
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            yield
        stream.synchronize()

    def check(self) -> None:
        """Returns if the copy is good.

        Raises:
            FinalError: It is not.
        """
        self._made.wait()
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Returns when the tensors may be changed."""
        if not self._made.is_set():
            began = time.monotonic()
            self._made.wait()
            self.waited += time.monotonic() - began

    def release(self) -> None:
        """Takes its hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Waits before a step changes anything. A closure, which has the forward and backward in it, comes first."""
        if self._made.is_set():
            return None
        this, *rest = args
        closure = kwargs.get("closure", rest[0] if rest else None)
        if closure is None:
            self.wait()
            return None

        def closure_and_wait() -> Any:
            result = closure()
            self.wait()
            return result

        return (this, closure_and_wait, *rest[1:]), {name: value for name, value in kwargs.items() if name != "closure"}


class _Looks:
    """How tensors look now, to be compared later.

    Autograd counts what is done to a tensor in place, be it to a single element. It does not see what goes through
    `.data`, lists of DTensors (`torch._foreach_mul_`) or fused optimizers: for these, some elements of each tensor are
    kept.

    Args:
        tensors: Name -> this rank's part, contiguous.
        owners: Name -> the object that it is a part of.
    """

    def __init__(self, tensors: Mapping[str, Tensor], owners: Mapping[str, Tensor]) -> None:
        self._counts = {name: (owners[name], _changes(owners[name])) for name in tensors}
        self._samples: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            count = min(SAMPLES, tensor.numel())
            sample = tensor.as_strided((count,), (tensor.numel() // count,))
            self._samples[tensor.device, tensor.dtype][name] = sample
        self._before = {kind: _bits(samples) for kind, samples in self._samples.items()}

    def changed(self) -> list[str]:
        """Names of the tensors that do not look as they did."""
        found = [name for name, (owner, changes) in self._counts.items() if _changes(owner) != changes]
        for kind, samples in self._samples.items():
            after = _bits(samples)
            if not torch.equal(after, self._before[kind]):
                sizes = [len(sample) * sample.itemsize for sample in samples.values()]
                pairs = zip(samples, after.split(sizes), self._before[kind].split(sizes), strict=True)
                found += [name for name, new, old in pairs if name not in found and not torch.equal(new, old)]
        return found


def _bits(samples: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(samples.values())).view(torch.uint8)  # as bits NaN equals itself


def _changes(owner: Tensor) -> tuple[int, int]:
    """Counts of changes in place: of a DTensor, and of its part on this rank, which have one each."""
    return owner._version, local_part(owner)._version
