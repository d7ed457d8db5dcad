"""Penalties, bias, masks, barred words and counts by kernels: bit by bit what the definition makes of them.

With TRITON_INTERPRET=1 and Triton installed they run on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import DEVICE, HAS_GPU, IS_INTERPRETED, captured, on_gpu
from tpworker.kernels.operands import BIASED, IN_PROMPT, MASKED, PENALISED, WORDS_BARRED, LogitTables
from tpworker.model import logit_rules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not IS_INTERPRETED, reason="there is no CUDA device"),
]
VOCABS = (40, 131, 5000) if IS_INTERPRETED else (40, 131, 49_152, 151_936)
NUM_KINDS = 16  # every set of rules
NUM_SLOTS = 2 * NUM_KINDS
every_vocab = pytest.mark.parametrize("vocab", VOCABS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@pytest.fixture
def kernels() -> Any:
    """The module of kernels."""
    pytest.importorskip("triton")
    from tpworker.kernels import logit_kernels

    return logit_kernels


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of the tables: entries of bias, barred words and their tokens, tokens remembered."""

    bias: int = 24
    barred: int = 12
    length: int = 5
    history: int = 8


WIDTHS = {
    "few": Widths(),
    "odd": Widths(bias=37, barred=7, length=3, history=4),
    "one": Widths(bias=1, barred=1, length=1, history=2),
    "served": Widths(bias=1024, barred=128, length=16, history=32),
}


def make_tables(vocab: int, start: int, widths: Widths, seed: int = 0) -> LogitTables:
    """On the CPU. Slot i uses the set of rules i % NUM_KINDS; what it does not use may be garbage."""
    draw = torch.Generator().manual_seed(seed)
    shape = (NUM_SLOTS + 1,)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, (*shape, *size), generator=draw, dtype=torch.int32)

    uses = torch.arange(NUM_SLOTS + 1, dtype=torch.int32) % NUM_KINDS
    uses[-1] = 0
    penalties = torch.stack(
        [
            torch.tensor([1.0, 1.3, 0.7, 1e-6, 3.0])[integers(0, 5).long()],
            torch.tensor([0.0, 0.6, -1.7])[integers(0, 3).long()],
            torch.tensor([0.0, 0.1, -0.3, 2.0])[integers(0, 4).long()],
        ],
        dim=1,
    )
    penalties[(uses & PENALISED) == 0] = math.nan
    counts = integers(1, 70, vocab) * (integers(0, 3, vocab) == 0)
    counts += IN_PROMPT * (integers(0, 4, vocab) == 0)
    counts[:, vocab // 2] = IN_PROMPT - 1
    counts = torch.where(((uses & PENALISED) == 0)[:, None], integers(-(2**31), 2**31 - 1, vocab), counts)
    allowed = integers(-(2**31), 2**31 - 1, -(-vocab // 32))
    allowed[3], allowed[NUM_KINDS + 3] = 0, -1
    ids = torch.stack([torch.randperm(vocab + 20, generator=draw)[: widths.bias] for _ in uses]).int()
    if ids.shape[1] < widths.bias:
        ids = torch.nn.functional.pad(ids, (0, widths.bias - ids.shape[1]), value=-1)
    ids = torch.where((ids >= 0) & (integers(0, 5, ids.shape[1]) > 0), ids + start - 10, -1)
    bias = torch.randn(*shape, widths.bias, generator=draw) * 30
    barred = integers(0, 3, widths.barred, widths.length)  # of few tokens, so that many come up
    blank = torch.arange(widths.length) < integers(0, widths.length + 1, widths.barred)[..., None]
    barred[blank] = -1
    last = barred[..., -1] * (vocab // 4) + start - 1  # of one place often, and at times another rank's
    barred[..., -1] = torch.where(barred[..., -1] < 0, -1, last)
    history = integers(0, 3, widths.history)
    assert {x.dtype for x in (uses, counts, allowed, ids, barred, history)} == {torch.int32}
    return LogitTables(start, uses, penalties, counts, allowed, ids, bias, barred, history)


def on_device(tables: LogitTables) -> LogitTables:
    values = {field.name: getattr(tables, field.name) for field in dataclasses.fields(tables)}
    return LogitTables(
        **{n: x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x for n, x in values.items()}
    )


def there(slots: Tensor, positions: Tensor, tables: LogitTables) -> tuple[Tensor, Tensor, LogitTables]:
    """A copy on the device."""
    return slots.to(DEVICE), positions.to(DEVICE), on_device(tables)


def no_drafts(slots: Tensor) -> Tensor:
    return torch.zeros(len(slots), 0, dtype=torch.int64)


def make_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """On the CPU; what the kernels must not choke on is among them."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=draw) * 4
    logits[:, 3::17] = -math.inf
    logits[:, 5::23] = 0.0
    logits[:, 6::23] = -0.0
    logits[1::3, 7::29] = math.nan
    return logits.to(dtype)


def place_rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Slots in any order, the null slot among them more than once, and positions from the first token on."""
    draw = torch.Generator().manual_seed(seed)
    slots = torch.cat([torch.randperm(NUM_SLOTS, generator=draw), torch.full((3,), NUM_SLOTS)])
    return slots, torch.randint(0, 40, slots.shape, generator=draw) * (slots % 7 > 0)


def same(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@every_vocab
@every_dtype
@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_adjust(kernels: Any, vocab: int, dtype: torch.dtype, start: int, widths: Widths) -> None:
    tables, (slots, positions) = make_tables(vocab, start, widths), place_rows()
    logits = make_logits(len(slots), vocab, dtype)
    source = logits.to(DEVICE, copy=True)
    arguments = (slots, positions, tables)
    expected = logit_rules.adjust(logits, *arguments, no_drafts(slots))
    result = kernels.adjust(source, *there(*arguments), no_drafts(slots).to(DEVICE))
    assert result.dtype == torch.float32
    same(result, expected)
    same(source, logits)
    uses = tables.uses[slots]
    unused = uses == 0
    bits = (x.nan_to_num(neginf=-math.inf).view(torch.int32) for x in (result.cpu(), logits.float()))
    assert torch.equal(*(x[unused] for x in bits)), "0 is 0 and -0 is -0"
    for rule in (PENALISED, MASKED):  # what changes nothing would show nothing
        assert not torch.equal(expected[uses == rule].nan_to_num(), logits[uses == rule].float().nan_to_num())


@pytest.mark.parametrize("vocab", VOCABS[1:])
@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_adjust_with_drafts(kernels: Any, vocab: int, width: int, start: int, widths: Widths) -> None:
    """Drafts are of few kinds, often one twice, of this rank or not; some slots have fewer, or none."""
    tables, (slots, positions) = make_tables(vocab, start, widths), place_rows()
    # What barred words are made of, what has a bias, and any.
    listed = torch.stack([ids[torch.randint(len(ids), (width - 1,))] for ids in tables.bias_ids[slots]])
    kinds = torch.stack(
        (torch.randint(0, 3, listed.shape), listed, start + torch.randint(-5, vocab + 5, listed.shape))
    )
    drafts = kinds.long().gather(0, torch.randint(0, 3, (1, *listed.shape)))[0].clamp_(min=0)
    drafts[:, 1:] = torch.where(torch.rand(len(slots), width - 2) < 0.3, drafts[:, :1], drafts[:, 1:])
    drafts[torch.arange(width - 1) >= torch.randint(0, 3 * width, (len(slots), 1))] = -1
    places = (positions[:, None] + torch.arange(width)).flatten()
    logits = make_logits(len(slots) * width, vocab, torch.bfloat16)
    expected = logit_rules.adjust(logits, slots, places, tables, drafts)
    result = kernels.adjust(logits.to(DEVICE), *there(slots, places, tables), drafts.to(DEVICE))
    same(result, expected)
    plain = logit_rules.adjust(logits, slots.repeat_interleave(width), places, tables, no_drafts(places))
    rows = expected.view(-1, width, vocab), plain.view(-1, width, vocab)
    assert torch.equal(*(x[:, 0].nan_to_num() for x in rows))
    uses, changed = tables.uses[slots], (rows[0].nan_to_num() != rows[1].nan_to_num()).flatten(1).any(dim=1)
    assert bool(changed[(uses & PENALISED) != 0].any()), "the case shows nothing"
    if width == 5 and widths.length > 1 and vocab < 1000:  # in larger ones words are hit too seldom
        assert bool(changed[(uses & (PENALISED | WORDS_BARRED)) == WORDS_BARRED].any())


@pytest.mark.parametrize("widths", [WIDTHS["few"], WIDTHS["served"]], ids=["few", "served"])
def test_what_is_listed_changes_its_columns_alone(kernels: Any, widths: Widths) -> None:
    """Bias and barred words: only they, in slots that use nothing else; some are there, and some are not."""
    vocab, start = 300, 50
    tables, (slots, positions) = make_tables(vocab, start, widths), place_rows()
    logits = torch.randn(len(slots), vocab)
    result = kernels.adjust(
        logits.to(DEVICE), *there(slots, positions, tables), no_drafts(slots).to(DEVICE)
    ).cpu()
    changed = result != logits
    uses = tables.uses[slots]
    for row in (uses == BIASED).nonzero()[:, 0].tolist():
        ids = tables.bias_ids[slots[row]]
        here = ids[(ids >= start) & (ids < start + vocab)] - start
        assert sorted(here.tolist()) == changed[row].nonzero()[:, 0].tolist()
    barred = changed[uses == WORDS_BARRED]
    assert (result[uses == WORDS_BARRED][barred] == -math.inf).all()
    assert bool(barred.any(dim=1).any())
    ends = (tables.barred[:, :, -1] - start).unique()
    assert set(barred.any(dim=0).nonzero()[:, 0].tolist()) <= set(ends.tolist())


def word_tables(words: list[list[int]], history: list[int], vocab: int) -> LogitTables:
    """One slot that bars these words, and whose tokens so far are `history`, and the null slot."""
    tables = make_tables(vocab, 0, Widths(barred=len(words), length=4, history=8))
    tables.uses[0] = WORDS_BARRED
    tables.history[0] = 1  # what nobody may take for a token of the sequence
    for row, word in enumerate(words):
        tables.barred[0, row] = torch.tensor([-1] * (4 - len(word)) + word)
    for position, token in enumerate(history):
        tables.history[0, position % 8] = token
    return tables


@pytest.mark.parametrize(
    ("words", "history", "barred"),
    [
        ([[5, 6]], [1, 2, 5], [6]),
        ([[5, 6]], [5, 2], []),
        ([[7]], [], [7]),
        ([[5, 6], [9, 6], [5, 8]], [5], [6, 8]),
        ([[1, 2, 3, 4]], [9, 1, 2, 3], [4]),
        ([[1, 2, 3, 4]], [2, 3], []),
        ([[1, 2, 3, 4]], [*range(20, 30), 1, 2, 3], [4]),
        ([[3, 3, 3], [3, 3, 3, 3]], [3, 3], [3]),
        ([[], [], [8, 9]], [8], [9]),
    ],
)
def test_barred_words(kernels: Any, words: list[list[int]], history: list[int], barred: list[int]) -> None:
    """Longer than the sequence, around the end of the history, two of one end, none at all."""
    tables = word_tables(words, history, 40)
    logits = torch.randn(1, 40)
    slots, positions = torch.tensor([0]), torch.tensor([len(history)])
    expected = logits.clone()
    expected[0, barred] = -math.inf
    same(logit_rules.adjust(logits, slots, positions, tables, no_drafts(slots)), expected)
    same(
        kernels.adjust(logits.to(DEVICE), *there(slots, positions, tables), no_drafts(slots).to(DEVICE)),
        expected,
    )


def test_a_barred_logit_that_is_nan_stays_so(kernels: Any) -> None:
    """What finds it would not see it otherwise."""
    tables = word_tables([[5, 6], [9, 6], [5, 7]], [5], 40)
    logits = torch.randn(1, 40)
    logits[0, 6] = math.nan
    slots, positions = torch.tensor([0]), torch.tensor([1])
    result = kernels.adjust(logits.to(DEVICE), *there(slots, positions, tables), no_drafts(slots).to(DEVICE))
    assert result[0, 6].isnan()
    same(result, logit_rules.adjust(logits, slots, positions, tables, no_drafts(slots)))


def test_rows_with_something_between_them(kernels: Any) -> None:
    vocab = 200
    tables, (slots, positions) = make_tables(vocab, 0, WIDTHS["few"]), place_rows()
    wide = make_logits(len(slots), vocab + 56, torch.float32)
    expected = logit_rules.adjust(wide[:, :vocab], slots, positions, tables, no_drafts(slots))
    arguments = there(slots, positions, tables)
    same(kernels.adjust(wide.to(DEVICE)[:, :vocab], *arguments, no_drafts(slots).to(DEVICE)), expected)
    none = [x[:0] for x in arguments[:2]]
    empty = kernels.adjust(wide.to(DEVICE)[:0, :vocab], *none, arguments[2], no_drafts(none[0]).to(DEVICE))
    assert empty.shape == (0, vocab)


@on_gpu
def test_rows_further_apart_than_32_bits_tell(kernels: Any) -> None:
    vocab = 151_936
    far = 1 << 30
    tables = make_tables(vocab, 0, WIDTHS["few"])
    buffer = torch.empty(2 * far + vocab, dtype=torch.bfloat16, device=DEVICE)
    spread = buffer.as_strided((3, vocab), (far, 1))
    logits = make_logits(3, vocab, torch.bfloat16)
    spread.copy_(logits)
    slots, positions = torch.tensor([15, 3, 31]), torch.tensor([1, 20, 9])
    expected = logit_rules.adjust(logits, slots, positions, tables, no_drafts(slots))
    same(kernels.adjust(spread, *there(slots, positions, tables), no_drafts(slots).to(DEVICE)), expected)


@every_vocab
def test_steps_of_greedy_tokens(kernels: Any, vocab: int) -> None:
    """The tokens of several steps, each of which counts what it has chosen: what a captured step does."""
    start = 7
    tables = make_tables(vocab, start, WIDTHS["few"])
    its_tables = on_device(tables)
    slots, positions = place_rows()
    none = no_drafts(slots).to(DEVICE)
    for step in range(4):
        logits = torch.randn(len(slots), vocab).bfloat16()
        tokens = logit_rules.adjust(logits, slots, positions, tables, none.cpu()).argmax(dim=-1) + start
        arguments = (slots.to(DEVICE), positions.to(DEVICE))
        found = kernels.adjust(logits.to(DEVICE), *arguments, its_tables, none).argmax(dim=-1) + start
        assert torch.equal(found.cpu()[:-3], tokens[:-3]), step
        logit_rules.count_tokens(slots, tokens, positions, tables)
        kernels.count_tokens(arguments[0], found, arguments[1], its_tables)
        assert torch.equal(its_tables.counts[:-1].cpu(), tables.counts[:-1])
        assert torch.equal(its_tables.history[:-1].cpu(), tables.history[:-1])
        positions = positions + (slots < NUM_SLOTS)


@pytest.mark.parametrize("count", [1, 5, NUM_SLOTS, NUM_SLOTS + 300])
def test_count_tokens(kernels: Any, count: int) -> None:
    """Other ranks' tokens, tokens by logits that are NaN, the null slot often; nothing else is touched."""
    vocab, start = 40, 100
    tables = make_tables(vocab, start, WIDTHS["few"])
    real = torch.randperm(NUM_SLOTS)[:count]
    slots = torch.cat([real, torch.full((count - len(real),), NUM_SLOTS)])
    tokens = torch.randint(start - 15, start + vocab + 15, (count,))
    tokens[::4] = start + vocab  # the first that is not here
    tokens[1::4] = start
    tokens[::3] = ~tokens[::3]
    positions = torch.randint(0, 1 << 21, (count,))
    # Rows before and behind the tables, of which nobody may write.
    guarded = {
        name: torch.full(
            (NUM_SLOTS + 3, getattr(tables, name).shape[1]), 77, dtype=torch.int32, device=DEVICE
        )
        for name in ("counts", "history")
    }
    for name, rows in guarded.items():
        rows[1:-1] = getattr(tables, name).to(DEVICE)
    its = dataclasses.replace(on_device(tables), **{name: rows[1:-1] for name, rows in guarded.items()})
    kernels.count_tokens(slots.to(DEVICE), tokens.to(DEVICE), positions.to(DEVICE), its)
    logit_rules.count_tokens(slots, tokens, positions, tables)
    for name, rows in guarded.items():
        assert torch.equal(rows[1:-2].cpu(), getattr(tables, name)[:-1]), name
        assert (rows[0] == 77).all()
        assert (rows[-1] == 77).all()
    kernels.count_tokens(slots[:0].to(DEVICE), tokens[:0].to(DEVICE), positions[:0].to(DEVICE), its)


def test_counting_several_tokens_of_a_slot(kernels: Any) -> None:
    """As steps with drafts do: one token over and over, and rows of the null slot between."""
    width, vocab = 5, 40
    tables = make_tables(vocab, 0, WIDTHS["few"])
    its = on_device(tables)
    slots = torch.randperm(NUM_SLOTS).repeat_interleave(width)
    tokens = torch.randint(0, 3, slots.shape)
    tokens[:width] = 1
    positions = torch.randint(0, 1 << 21, (NUM_SLOTS, 1)) + torch.arange(width)
    slots[torch.randint(0, 4, slots.shape) == 0] = NUM_SLOTS
    arguments = (slots, tokens, positions.flatten())
    logit_rules.count_tokens(*arguments, tables)
    kernels.count_tokens(*(x.to(DEVICE) for x in arguments), its)
    assert torch.equal(its.counts[:-1].cpu(), tables.counts[:-1])
    assert torch.equal(its.history[:-1].cpu(), tables.history[:-1])


@on_gpu
def test_replayed_with_other_tables(kernels: Any) -> None:
    """A captured step reads slots, positions and tables as they are then, and counts what it finds."""
    vocab, start = 151_936, 0
    tables, (slots, positions) = make_tables(vocab, start, WIDTHS["served"]), place_rows()
    at, standing, its = there(slots, positions, tables)
    none = no_drafts(slots).to(DEVICE)
    logits = make_logits(len(slots), vocab, torch.bfloat16).to(DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        adjusted = kernels.adjust(logits, at, standing, its, none)
        tokens = adjusted.nan_to_num(-math.inf).argmax(dim=-1) + start
        kernels.count_tokens(at, tokens, standing, its)
        return adjusted, tokens

    graph, (adjusted, tokens) = captured(step)
    for seed in range(1, 4):
        tables, (slots, positions) = make_tables(vocab, start, WIDTHS["served"], seed), place_rows(seed)
        source = make_logits(len(slots), vocab, torch.bfloat16, seed)
        for field in dataclasses.fields(tables):
            if field.name != "vocab_start":
                getattr(its, field.name).copy_(getattr(tables, field.name))
        at.copy_(slots)
        standing.copy_(positions)
        logits.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        same(adjusted, logit_rules.adjust(source, slots, positions, tables, none.cpu()))
        logit_rules.count_tokens(slots, tokens.cpu(), positions, tables)
        assert torch.equal(its.counts[:-1].cpu(), tables.counts[:-1])
        assert torch.equal(its.history[:-1].cpu(), tables.history[:-1])
