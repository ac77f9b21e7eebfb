"""Logits to tokens, for a whole batch at once. The engine calls it once a step, with a row for each sequence.

What happens to a row, in vLLM's order: log-probabilities of the model's own logits are set aside; then bias, grammar,
min_tokens, penalties, temperature, min_p, top_k, top_p, and the draw. Nothing is sorted, and a row's token depends on
nothing but its own logits and `SamplingState`, whatever shares the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_llm.serving.engine.sampling_state import SamplingState

_NO_TOKEN = -1
_LEAST_TEMPERATURE = (
    1e-5  # below, float32 has no room for logits / temperature; the likeliest token is all that is left
)
_CDF_BLOCK = 128  # tokens whose probabilities are summed before looking for the drawn one among them


@dataclass(slots=True)
class Sampled:
    """The next token of one sequence.

    Attributes:
        token_id: The token; -1 where there is an error.
        logprob: Its log-probability under the model's own logits; None if `SamplingParams.logprobs` is None.
        top: The likeliest tokens and their log-probabilities, likeliest first: `SamplingParams.logprobs` many.
        error: Why this sequence cannot go on; None if all is well.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    error: str | None = None


class Sampler:
    """Chooses the next token of each sequence."""

    def __init__(self) -> None:
        self._scratch = _Scratch()

    @torch.inference_mode()
    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
        """Chooses a token for each row. Does not touch `logits`, nor any state but its generator.

        Args:
            logits: What the model says, `[rows, vocab]` float32.
            states: The row's sequences.

        Returns:
            One answer a row. A row that has no answer (NaN or infinity from the model, nothing that the grammar allows)
            says so in `error`, and the other rows are as if it were not there.
        """
        logits = logits.float()
        best = logits.amax(dim=-1)  # NaN if there is one, so that this also tells which rows are broken
        answers = [
            Sampled(_NO_TOKEN, error=None if math.isfinite(value) else _describe(value)) for value in best.tolist()
        ]
        greedy: list[int] = []
        other: list[int] = []
        for row, (state, answer) in enumerate(zip(states, answers, strict=True)):
            if answer.error is None:
                (greedy if state.params.greedy and not state.changes_logits else other).append(row)
        if greedy:
            for row, token in zip(greedy, _rows(logits, greedy).argmax(dim=-1).tolist(), strict=True):
                answers[row].token_id = token
        if other:
            chosen = _choose(logits, best, other, [states[row] for row in other], self._scratch)
            for row, (token, error) in zip(other, chosen, strict=True):
                answers[row].token_id, answers[row].error = token, error
        self._add_logprobs(answers, logits, states)
        return answers

    def logprobs_of(
        self, logits: Tensor, token_ids: Sequence[int], k: int
    ) -> list[tuple[float, list[tuple[int, float]]]]:
        """Log-probabilities of given tokens, and of the k likeliest, as for those of a prompt.

        Args:
            logits: `[rows, vocab]`.
            token_ids: A token a row.
            k: How many of the likeliest; may be 0.

        Returns:
            For each row the token's own and `[(token, log-probability), ...]`, likeliest first.
        """
        return _logprobs(logits, token_ids, k)

    def _add_logprobs(self, answers: list[Sampled], logits: Tensor, states: Sequence[SamplingState]) -> None:
        rows = [
            row for row, state in enumerate(states) if state.params.logprobs is not None and answers[row].error is None
        ]
        if not rows:
            return
        most = max(states[row].params.logprobs or 0 for row in rows)
        found = _logprobs(_rows(logits, rows), [answers[row].token_id for row in rows], most)
        for row, (logprob, top) in zip(rows, found, strict=True):
            answers[row].logprob, answers[row].top = logprob, top[: states[row].params.logprobs]


def _describe(best: float) -> str:
    if best == -math.inf:
        return "no token is possible: the model gives every one the probability 0"
    return "the model's logits are not finite (NaN or infinity)"


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """These rows, in ascending order; not a copy where they are all that there are."""
    if len(rows) == len(values):
        return values
    return values.index_select(0, torch.tensor(rows, dtype=torch.int64, device=values.device))


class _Scratch:
    """Memory that each step writes anew: to get megabytes of new pages takes longer than to compute what is in them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, int], device: torch.device) -> Tensor:
        """A float32 tensor of this shape, with whatever was in it before."""
        size = shape[0] * shape[1]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.device != device:
            buffer = self._buffers[name] = torch.empty(size, dtype=torch.float32, device=device)
        return buffer[:size].view(shape)


@torch.inference_mode()
def _logprobs(logits: Tensor, token_ids: Sequence[int], k: int) -> list[tuple[float, list[tuple[int, float]]]]:
    logits = logits.float()
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    index = torch.tensor(token_ids, device=logits.device)[:, None]
    own = (logits.gather(1, index) - normaliser)[:, 0].tolist()
    if k == 0:
        return [(value, []) for value in own]
    values, ids = logits.topk(min(k, logits.shape[1]), dim=-1)
    tops = zip(ids.tolist(), (values - normaliser).tolist(), strict=True)
    return [(value, list(zip(*top, strict=True))) for value, top in zip(own, tops, strict=True)]


def _choose(
    logits: Tensor, best: Tensor, rows: list[int], states: list[SamplingState], scratch: _Scratch
) -> list[tuple[int, str | None]]:
    """A token, or why there is none, for each of `rows`. `best` is the largest logit of every row."""
    work = scratch.get("work", (len(rows), logits.shape[1]), logits.device)
    torch.index_select(logits, 0, torch.tensor(rows, dtype=torch.int64, device=logits.device), out=work)
    best = _rows(best, rows)
    errors: list[str | None] = [None] * len(rows)
    tokens = [_NO_TOKEN] * len(rows)
    if any(state.changes_logits for state in states):
        _add_bias(work, states)
        _apply_grammars(work, states, errors)
        _mask_ends(work, states)
        _penalise(work, states)
        best = work.amax(dim=-1)
        for row, value in enumerate(best.tolist()):
            if errors[row] is None and not math.isfinite(value):
                errors[row] = "no token is possible: the grammar, the bias, min_tokens and the penalties leave none"
    greedy = [row for row, state in enumerate(states) if errors[row] is None and state.params.greedy]
    if greedy:
        for row, token in zip(greedy, _rows(work, greedy).argmax(dim=-1).tolist(), strict=True):
            tokens[row] = token
    drawn = [row for row, state in enumerate(states) if errors[row] is None and not state.params.greedy]
    if drawn:
        picks = _draw(_rows(work, drawn), _rows(best, drawn), [states[row] for row in drawn], scratch)
        for row, token in zip(drawn, picks, strict=True):
            tokens[row] = token
    return list(zip(tokens, errors, strict=True))


# --- what changes the logits ----------------------------------------------------------------------------------------


def _flat_index(ids: list[np.ndarray], rows: list[int], vocab: int, device: torch.device) -> Tensor:
    """Where `ids[i]` of row `rows[i]` are in the flattened logits."""
    index = np.concatenate([row * vocab + tokens for row, tokens in zip(rows, ids, strict=True)])
    return torch.from_numpy(index).to(device)


def _add_bias(logits: Tensor, states: list[SamplingState]) -> None:
    rows = [row for row, state in enumerate(states) if len(state.bias_ids)]
    if rows:
        index = _flat_index([states[row].bias_ids for row in rows], rows, logits.shape[1], logits.device)
        values = torch.from_numpy(np.concatenate([states[row].bias_values for row in rows])).to(logits.device)
        logits.view(-1).index_add_(0, index, values)


def _apply_grammars(logits: Tensor, states: list[SamplingState], errors: list[str | None]) -> None:
    rows = [row for row, state in enumerate(states) if state.grammar is not None]
    for row in rows:
        grammar = states[row].grammar
        assert grammar is not None
        forbidden = grammar.forbidden()
        if forbidden is None:
            errors[row] = f"the answer cannot be held to its grammar: {grammar.error}"
        else:
            logits[row].masked_fill_(torch.from_numpy(forbidden).to(logits.device), -torch.inf)


def _mask_ends(logits: Tensor, states: list[SamplingState]) -> None:
    ids = [state.masked_ids for state in states]
    rows = [row for row, masked in enumerate(ids) if len(masked)]
    if rows:
        logits.view(-1)[_flat_index([ids[row] for row in rows], rows, logits.shape[1], logits.device)] = -torch.inf


def _penalise(logits: Tensor, states: list[SamplingState]) -> None:
    rows, counted = [], []
    for row, state in enumerate(states):
        if state.counts is not None and len(state.counts.ids):
            rows.append(row)
            counted.append(state.counts)
    if not rows:
        return
    device = logits.device
    index = _flat_index([tokens.ids for tokens in counted], rows, logits.shape[1], device)
    counts = torch.from_numpy(np.concatenate([tokens.counts for tokens in counted])).to(device)
    params = [states[row].params for row in rows]
    penalties = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params], np.float32)
    lengths = [len(tokens.ids) for tokens in counted]
    repetition, frequency, presence = torch.from_numpy(np.repeat(penalties, lengths, axis=0)).to(device).unbind(1)
    flat = logits.view(-1)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    flat[index] = values - frequency * counts - presence * (counts > 0)


# --- the draw -------------------------------------------------------------------------------------------------------


def _draw(logits: Tensor, best: Tensor, states: list[SamplingState], scratch: _Scratch) -> list[int]:
    """Draws a token for each row; writes to `logits` `[rows, vocab]`, whose maximum is `best`.

    Each row is cut at a weight, never at a place in some order: a token is as welcome as any other that is as likely.
    """
    params = [state.params for state in states]
    temperature = _column([max(p.temperature, _LEAST_TEMPERATURE) for p in params], logits)
    weights = logits.sub_(best[:, None]).div_(temperature).exp_()  # probabilities over the likeliest one's
    if any(p.min_p > 0 for p in params):
        _keep(weights, _column([p.min_p for p in params], weights), scratch)
    _cut_top_k(weights, [p.top_k for p in params], scratch)

    totals: Tensor | None = None
    tokens = [_NO_TOKEN] * len(states)
    waiting = list(range(len(states)))
    while waiting:
        drawn, sums = _inverse_cdf(weights, [states[row].uniform() for row in waiting])
        if totals is None:
            totals = sums
        for row, token in zip(waiting, drawn.tolist(), strict=True):
            tokens[row] = token
        # top_p without a sort: a token belongs if those likelier than it do not yet make up top_p. One that does not
        # belong is drawn again, from what is likelier than it (arXiv:2501.01005 calls it rejection with a pivot).
        unsure = [at for at, row in enumerate(waiting) if params[row].top_p < 1]
        if not unsure:
            break
        waiting = [waiting[at] for at in unsure]
        weights, totals, drawn = _rows(weights, unsure), _rows(totals, unsure), _rows(drawn, unsure)
        _keep(weights, weights.gather(1, drawn[:, None]), scratch, compare=torch.gt)
        likelier = _block_sums(weights).sum(dim=-1)
        outside = likelier >= totals * _column([params[row].top_p for row in waiting], totals)[:, 0]
        again = [at for at, is_outside in enumerate(outside.tolist()) if is_outside]
        waiting = [waiting[at] for at in again]
        weights, totals = _rows(weights, again), _rows(totals, again)
    return tokens


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _keep(weights: Tensor, least: Tensor, scratch: _Scratch, *, compare: Callable[..., Tensor] = torch.ge) -> None:
    """Sets weights that do not compare to `least` `[rows, 1]` to 0."""
    # A comparison that writes floats, then a product: many times faster on a CPU than masks of booleans.
    mask = scratch.get("mask", (weights.shape[0], weights.shape[1]), weights.device)
    weights.mul_(compare(weights, least, out=mask))


def _cut_top_k(weights: Tensor, top_k: list[int], scratch: _Scratch) -> None:
    """Keeps the k largest weights of each row, and all that equal the k-th; k of 0 or less keeps all."""
    vocab = weights.shape[1]
    least = torch.zeros(len(top_k), 1, dtype=weights.dtype, device=weights.device)
    # Rows whose k is of one size go together: finding the largest thousand takes much longer than the largest ten.
    groups: dict[int, list[int]] = {}
    for row, k in enumerate(top_k):
        if 0 < k < vocab:
            groups.setdefault(k.bit_length(), []).append(row)
    for rows in groups.values():
        largest = _rows(weights, rows).topk(max(top_k[row] for row in rows), dim=-1).values
        at = torch.tensor([[top_k[row] - 1] for row in rows], device=weights.device)
        least[rows] = largest.gather(1, at)
    if groups:
        _keep(weights, least, scratch)


def _inverse_cdf(weights: Tensor, uniforms: list[float]) -> tuple[Tensor, Tensor]:
    """The index `[rows]` at which each row's running sum passes its share `uniforms` of the total, and the total.

    Never an index of weight 0. Sums of blocks find the block first: a running sum over the whole vocabulary takes many
    times as long.
    """
    running = _block_sums(weights).cumsum(dim=-1)
    totals = running[:, -1]
    block, rest = _first_above(running, _column(uniforms, totals) * totals[:, None])
    places = block * _CDF_BLOCK + torch.arange(_CDF_BLOCK, device=weights.device)
    last = weights.shape[1] - 1
    within = weights.gather(1, places.clamp(max=last)).double().where(places <= last, 0.0).cumsum(dim=-1)
    index, _ = _first_above(within, rest)
    return (block * _CDF_BLOCK + index)[:, 0], totals


def _block_sums(weights: Tensor) -> Tensor:
    """Sums of `_CDF_BLOCK` weights each, `[rows, blocks]` float64; the last block may be shorter."""
    whole = weights.shape[1] // _CDF_BLOCK * _CDF_BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _CDF_BLOCK)).sum(dim=-1)
    if whole < weights.shape[1]:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    return sums.double()


def _first_above(running: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each running sum `[rows, n]` first passes its target `[rows, 1]`, and the target less the sum before it."""
    # A product that rounds up to the total must still find something.
    targets = torch.minimum(targets, running[:, -1:].nextafter(torch.zeros_like(targets)))
    index = (running <= targets).sum(dim=-1, keepdim=True)
    before = running.gather(1, (index - 1).clamp(min=0)).where(index > 0, 0.0)
    return index, targets - before
