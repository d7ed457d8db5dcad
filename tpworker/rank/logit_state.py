"""What requests ask of their logits, on the device: penalties, bias, allowed tokens, barred words.

    admission ──staged──► rows of the tables are set: what the known tokens, prompt and output, add up to
    each step             reads them (`adjust`), and counts what it has chosen (`count_tokens`)

So counts are exact after a preemption and a restart too: whoever admits a request knows its tokens. Steps of
whose slots none has a rule touch nothing of this, and neither do admissions without one into such slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tpworker.ipc.messages import MAX_BARRED, MAX_BARRED_LENGTH, MAX_BIAS, Admission, LogitRules
from tpworker.kernels.operands import BIASED, GUIDED, IN_PROMPT, MASKED, PENALISED, WORDS_BARRED, LogitTables
from tpworker.model.kv_cache import zeroed
from tpworker.rank.staging import StagedArray, StagingBuffer

HISTORY = 2 * MAX_BARRED_LENGTH  # tokens that are remembered of a sequence, a power of two

_Int32s = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _RowDelta:
    """Rows of one slot, staged. None: its rules do not need it."""

    slot: int
    columns: StagedArray | None = None  # int64 [n], of `counts`; the others become 0
    counts: StagedArray | None = None  # int32 [n]
    allowed: StagedArray | None = None  # int32 [ceil(V / 32)]
    bias_ids: StagedArray | None = None  # int32 [MAX_BIAS]
    bias: StagedArray | None = None  # float32 [MAX_BIAS]
    barred: StagedArray | None = None  # int32 [MAX_BARRED, MAX_BARRED_LENGTH]
    history: StagedArray | None = None  # int32 [HISTORY]


@dataclass(frozen=True, slots=True)
class RuleDeltas:
    """What a plan changes: slots that have rules now, or had some."""

    slots: StagedArray  # int64 [C]
    uses: StagedArray  # int32 [C]
    penalties: StagedArray  # float32 [C, 3]
    rows: tuple[_RowDelta, ...]


class LogitState:
    """The tables, and how admissions change them.

    Args:
        num_slots: rows, without the null slot.
        vocab_start, vocab_size: this rank's part of the vocabulary.
        device: where the tensors live.
    """

    def __init__(self, num_slots: int, vocab_start: int, vocab_size: int, device: torch.device) -> None:
        rows = num_slots + 1
        barred = (rows, MAX_BARRED, MAX_BARRED_LENGTH)
        self.tables = LogitTables(
            vocab_start,
            uses=torch.zeros(rows, dtype=torch.int32, device=device),
            penalties=torch.zeros(rows, 3, device=device),
            counts=zeroed((rows, vocab_size), torch.int32, device),
            allowed=zeroed((rows, -(-vocab_size // 32)), torch.int32, device),
            bias_ids=zeroed((rows, MAX_BIAS), torch.int32, device),
            bias=zeroed((rows, MAX_BIAS), torch.float32, device),
            barred=zeroed(barred, torch.int32, device),
            history=zeroed((rows, HISTORY), torch.int32, device),
        )
        self._vocab_start, self._vocab_size = vocab_start, vocab_size
        self._has_rules = np.zeros(rows, np.bool_)

    def stage(self, admitted: Sequence[Admission], staging: StagingBuffer) -> RuleDeltas | None:
        """Puts what changes into a plan's staging buffer (launch thread); None: nothing does."""
        changed = [a for a in admitted if _has_rules(a) or self._has_rules[a.slot]]
        if not changed:
            return None
        uses, penalties, rows = [], [], []
        for admission in changed:
            rules = admission.sampling.rules
            self._has_rules[admission.slot] = _has_rules(admission)
            uses.append(_uses(rules, admission.is_guided))
            penalties.append((1.0, 0.0, 0.0) if rules is None else _penalties(rules))
            if rules is not None:
                rows.append(self._stage_row(admission, rules, uses[-1], staging))
        return RuleDeltas(
            staging.put(np.array([admission.slot for admission in changed], np.int64)),
            staging.put(np.array(uses, np.int32)),
            staging.put(np.array(penalties, np.float32)),
            tuple(rows),
        )

    def _stage_row(
        self, admission: Admission, rules: LogitRules, uses: int, staging: StagingBuffer
    ) -> _RowDelta:
        known = _int32s(admission.tokens)
        staged: dict[str, StagedArray] = {}
        if uses & PENALISED:
            counts = self._counts(known, admission.num_prompt)
            columns = counts.nonzero()[0]
            staged |= {"columns": staging.put(columns), "counts": staging.put(counts[columns])}
        if uses & MASKED and not uses & GUIDED:
            staged["allowed"] = staging.put(self._allowed(rules))
        if uses & BIASED:
            ids = np.full(MAX_BIAS, -1, np.int32)
            bias = np.zeros(MAX_BIAS, np.float32)
            given = _int32s(rules.bias_ids)
            ids[: len(given)] = given
            bias[: len(given)] = np.frombuffer(rules.bias, np.dtype("<f4"))
            staged |= {"bias_ids": staging.put(ids), "bias": staging.put(bias)}
        if uses & WORDS_BARRED:
            staged |= {"barred": staging.put(_barred(rules)), "history": staging.put(_history(known))}
        return _RowDelta(admission.slot, **staged)

    def _here(self, ids: _Int32s) -> _Int32s:
        """Columns of those ids that are this rank's."""
        columns = ids - self._vocab_start
        return columns[(columns >= 0) & (columns < self._vocab_size)]

    def _counts(self, known: _Int32s, num_prompt: int) -> _Int32s:
        counts = np.bincount(self._here(known[num_prompt:]), minlength=self._vocab_size).astype(np.int32)
        is_in_prompt = np.zeros(self._vocab_size, np.bool_)
        is_in_prompt[self._here(known[:num_prompt])] = True
        counts[is_in_prompt] += IN_PROMPT
        return counts

    def _allowed(self, rules: LogitRules) -> _Int32s:
        bits = np.zeros(32 * self.tables.allowed.shape[1], np.bool_)
        if rules.allowed_ids is None:
            bits[:] = True
        else:
            bits[self._here(_int32s(rules.allowed_ids))] = True
        for word in rules.barred:
            if len(word) == 4:
                bits[self._here(_int32s(word))] = False
        return np.packbits(bits, bitorder="little").view(np.dtype("<i4")).astype(np.int32)

    def apply(self, deltas: RuleDeltas) -> None:
        """Writes staged deltas into the tables (compute stream)."""
        tables, slots = self.tables, deltas.slots.get()
        tables.uses[slots] = deltas.uses.get()
        tables.penalties[slots] = deltas.penalties.get()
        for row in deltas.rows:
            if row.columns is not None and row.counts is not None:
                tables.counts[row.slot].zero_()
                tables.counts[row.slot][row.columns.get()] = row.counts.get()
            for name in ("allowed", "bias_ids", "bias", "barred", "history"):
                staged: StagedArray | None = getattr(row, name)
                if staged is not None:
                    getattr(tables, name)[row.slot].copy_(staged.get())


def _int32s(packed: bytes) -> _Int32s:
    return np.frombuffer(packed, np.dtype("<i4"))


def _penalties(rules: LogitRules) -> tuple[float, float, float]:
    return rules.repetition_penalty, rules.presence_penalty, rules.frequency_penalty


def _has_rules(admission: Admission) -> bool:
    return admission.is_guided or admission.sampling.rules is not None


def _uses(rules: LogitRules | None, is_guided: bool) -> int:
    guided = (GUIDED | MASKED) * is_guided
    if rules is None:
        return guided
    has_masked_word = any(len(word) == 4 for word in rules.barred)
    return (
        guided
        | PENALISED * (_penalties(rules) != (1.0, 0.0, 0.0))
        | MASKED * (rules.allowed_ids is not None or has_masked_word)
        | BIASED * bool(rules.bias_ids)
        | WORDS_BARRED * any(len(word) > 4 for word in rules.barred)
    )


def _barred(rules: LogitRules) -> _Int32s:
    """Words of several tokens, at the ends of their rows."""
    table = np.full((MAX_BARRED, MAX_BARRED_LENGTH), -1, np.int32)
    for row, word in zip(table, (word for word in rules.barred if len(word) > 4), strict=False):
        row[-(len(word) // 4) :] = _int32s(word)
    return table


def _history(known: _Int32s) -> _Int32s:
    """The last tokens, each at its position modulo HISTORY."""
    history = np.full(HISTORY, -1, np.int32)
    first = max(0, len(known) - HISTORY)
    history[np.arange(first, len(known)) % HISTORY] = known[first:]
    return history
