"""Logits to tokens, for a whole batch at once. The engine calls it once a step, with a row for each sequence.

What happens to a row, in vLLM's order: log-probabilities of the model's own logits are set aside; then bias, grammar,
min_tokens, penalties, temperature, min_p, top_k, top_p, and the draw. Nothing is sorted, and a row's token depends on
nothing but its own logits and `SamplingState`, whatever shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        best, tokens = logits.max(dim=-1)  # NaN if there is one, so that this also tells which rows are broken
        best_values, token_ids = best.tolist(), tokens.tolist()
        answers = [
            Sampled(token) if np.isfinite(value) else Sampled(_NO_TOKEN, error=_describe(value))
            for token, value in zip(token_ids, best_values, strict=True)
        ]
        work = [
            row
            for row, state in enumerate(states)
            if answers[row].error is None and (state.changes_logits or not state.params.greedy)
        ]
        if work:
            chosen = _choose(_take(logits, work), _take(best, work), [states[row] for row in work])
            for row, (token, error) in zip(work, chosen, strict=True):
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
        found = _logprobs(_take(logits, rows), [answers[row].token_id for row in rows], most)
        for row, (logprob, top) in zip(rows, found, strict=True):
            answers[row].logprob, answers[row].top = logprob, top[: states[row].params.logprobs]


def _describe(best: float) -> str:
    if best == -np.inf:
        return "no token is possible: the model gives every one the probability 0"
    return "the model's logits are not finite (NaN or infinity)"


def _take(values: Tensor, rows: list[int]) -> Tensor:
    """A copy of these rows."""
    if len(rows) == len(values):
        return values.clone(memory_format=torch.contiguous_format)
    return values.index_select(0, torch.tensor(rows, dtype=torch.int64, device=values.device))


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


def _choose(logits: Tensor, best: Tensor, states: list[SamplingState]) -> list[tuple[int, str | None]]:
    """A token, or why there is none, for each row; writes to `logits` `[rows, vocab]`. `best` is their maximum."""
    errors: list[str | None] = [None] * len(states)
    token_ids = [_NO_TOKEN] * len(states)
    if any(state.changes_logits for state in states):
        _add_bias(logits, states)
        _apply_grammars(logits, states, errors)
        _mask_ends(logits, states)
        _penalise(logits, states)
        best, tokens = logits.max(dim=-1)
        token_ids = tokens.tolist()
        for row, value in enumerate(best.tolist()):
            if errors[row] is None and not np.isfinite(value):
                errors[row] = "no token is possible: the grammar, the bias and min_tokens leave none"
    drawn = [row for row, state in enumerate(states) if errors[row] is None and not state.params.greedy]
    if drawn:
        picks = _draw(
            _take(logits, drawn) if len(drawn) < len(states) else logits, best[drawn], [states[row] for row in drawn]
        )
        for row, token in zip(drawn, picks, strict=True):
            token_ids[row] = token
    return [(_NO_TOKEN if error else token, error) for token, error in zip(token_ids, errors, strict=True)]


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


def _draw(logits: Tensor, best: Tensor, states: list[SamplingState]) -> list[int]:
    """Draws a token for each row; writes to `logits` `[rows, vocab]`, whose maximum is `best`.

    Each row is cut at a weight, never at a place in some order: a token is as welcome as any other that is as likely.
    """
    params = [state.params for state in states]
    temperature = _column([max(p.temperature, _LEAST_TEMPERATURE) for p in params], logits)
    weights = logits.sub_(best[:, None]).div_(temperature).exp_()  # probabilities over the likeliest one's
    if any(p.min_p > 0 for p in params):
        _keep(weights, _column([p.min_p for p in params], weights))
    _cut_top_k(weights, [p.top_k for p in params])

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
        if len(unsure) < len(waiting):
            weights, totals, drawn = _take(weights, unsure), _take(totals, unsure), _take(drawn, unsure)
            waiting = [waiting[at] for at in unsure]
        pivots = weights.gather(1, drawn[:, None])
        weights.mul_(torch.gt(weights, pivots, out=torch.empty_like(weights)))
        likelier = weights.sum(dim=-1, dtype=torch.float64)
        outside = likelier >= totals * _column([params[row].top_p for row in waiting], totals)[:, 0]
        again = [at for at, is_outside in enumerate(outside.tolist()) if is_outside]
        weights, totals = _take(weights, again), _take(totals, again)
        waiting = [waiting[at] for at in again]
    return tokens


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _keep(weights: Tensor, least: Tensor) -> None:
    """Sets weights below `least` `[rows, 1]` to 0."""
    # A comparison that writes floats, then a product: many times faster on a CPU than masks of booleans.
    weights.mul_(torch.ge(weights, least, out=torch.empty_like(weights)))


def _cut_top_k(weights: Tensor, top_k: list[int]) -> None:
    """Keeps the k largest weights of each row, and all that equal the k-th; k of 0 or less keeps all."""
    vocab = weights.shape[1]
    least = torch.zeros(len(top_k), 1, dtype=weights.dtype, device=weights.device)
    # Rows whose k is of one size go together: finding the largest thousand takes much longer than the largest ten.
    groups: dict[int, list[int]] = {}
    for row, k in enumerate(top_k):
        if 0 < k < vocab:
            groups.setdefault(k.bit_length(), []).append(row)
    for rows in groups.values():
        largest = _take(weights, rows).topk(max(top_k[row] for row in rows), dim=-1).values
        at = torch.tensor([[top_k[row] - 1] for row in rows], device=weights.device)
        least[rows] = largest.gather(1, at)
    if groups:
        _keep(weights, least)


def _inverse_cdf(weights: Tensor, uniforms: list[float]) -> tuple[Tensor, Tensor]:
    """The index `[rows]` at which each row's running sum passes its share `uniforms` of the total, and the total.

    Exact to float64; never an index of weight 0. Sums of blocks find the block first: a running sum over the
    vocabulary takes twenty times as long.
    """
    rows, vocab = weights.shape
    padding = -vocab % _CDF_BLOCK
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    blocks = weights.view(rows, -1, _CDF_BLOCK)
    running = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    totals = running[:, -1]
    block, rest = _first_above(running, _column(uniforms, totals) * totals[:, None])
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, _CDF_BLOCK))[:, 0]
    within, _ = _first_above(chosen.cumsum(dim=-1, dtype=torch.float64), rest)
    return (block * _CDF_BLOCK + within)[:, 0], totals


def _first_above(running: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each running sum `[rows, n]` first passes its target `[rows, 1]`, and the target less the sum before it."""
    # A product that rounds up to the total must still find something.
    targets = torch.minimum(targets, running[:, -1:].nextafter(torch.zeros_like(targets)))
    index = (running <= targets).sum(dim=-1, keepdim=True)
    before = running.gather(1, (index - 1).clamp(min=0)).where(index > 0, 0.0)
    return index, targets - before
