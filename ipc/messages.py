"""Every message that crosses a process boundary: one frozen dataclass each. As bytes: wire.py.

The annotation of a field is what is checked when it comes in (codec.py): its type, and its bounds. Arrays of
token ids, slots and blocks travel as bytes of little-endian integers (arrays.py), so that a long prompt costs
one copy and not one object a token.

Every message after the handshake bears the generation of the process group that sent it: a new group
(after a fault) has a higher one, and what an old one still sends is recognised and dropped.

    runtime                      scheduler                        rank i
       │◄────────────────────────── Hello ◄───────────── Hello ─────┤   versions are compared
       │                              │◄────────────── RankLoaded ──┤   how many KV blocks it could hold
       │                              ├─ Allocate ─────────────────►│   the smallest of those
       │◄──────── SchedulerReady ─────┤◄────────────── RankReady ───┤
       ├─ Vocabulary, Submit, Abort ─►├─ BatchPlan ────────────────►│
       │◄───── StepOutput, Failed ────┤◄────────────── StepResult ──┤   rank 0 alone
       ├─ Stop ──────────────────────►├─ Stop ─────────────────────►│
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tpworker.ipc.codec import Within
from tpworker.values import MAX_RANKS

PROTOCOL_VERSION = 6

MAX_STEP = 2**62
MAX_SLOTS = 4096
MAX_BLOCKS = 1 << 30
MAX_SEQUENCE = 1 << 22  # tokens of one request, prompt and output together
MAX_BIAS = 1024
MAX_BARRED = 128
MAX_BARRED_LENGTH = 16  # tokens
NO_LOGPROBS = -1
MAX_DRAFTS = 8  # of a slot, in one step
MAX_GRAMMAR = 1 << 20  # characters of a grammar
MAX_TOKENIZER = 1 << 25  # characters of a tokenizer.json
MAX_TOLD = 1 << 16  # tokens of one plan's chunks, of prompts whose logprobs are asked for
LOGPROB_ROW_BYTES = 164
"""float32 [21]: the token's logprob and the likeliest ones', best first; int32 [20]: their ids, -1: none."""


Step = Annotated[int, Within(0, MAX_STEP)]
Slot = Annotated[int, Within(0, MAX_SLOTS - 1)]
Rank = Annotated[int, Within(0, MAX_RANKS - 1)]
Generation = Annotated[int, Within(0, 2**31)]
RequestId = Annotated[int, Within(0, 2**62)]
Length = Annotated[int, Within(0, MAX_SEQUENCE)]
Count = Annotated[int, Within(0, 2**62)]
Priority = Annotated[int, Within(-(2**31), 2**31 - 1)]
Salt = Annotated[str, Within(0, 256)]
Nanoseconds = Annotated[int, Within(0, 2**63 - 1)]
NumLogprobs = Annotated[int, Within(-1, 20)]  # likeliest tokens told of beside the token itself
NumDrafts = Annotated[int, Within(0, MAX_DRAFTS)]
Name = Annotated[str, Within(1, 64)]
Text = Annotated[str, Within(0, 1 << 16)]
GrammarText = Annotated[str, Within(1, MAX_GRAMMAR)]  # as llguidance reads it: Lark, or its JSON
TokenizerText = Annotated[str, Within(1, MAX_TOKENIZER)]  # tokenizer.json
Int32s = Annotated[bytes, Within(0, 4 * MAX_SEQUENCE)]
Float32s = Annotated[bytes, Within(0, 4 * MAX_SEQUENCE)]
Int64s = Annotated[bytes, Within(0, 8 * MAX_SEQUENCE)]
LogprobRows = Annotated[bytes, Within(0, 1 << 25)]


# ------------------------------------------------------------------------------------ handshake


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on every channel, from the process that connected."""

    version: Annotated[int, Within(0, 2**31)]
    name: Name
    generation: Generation


@dataclass(frozen=True, slots=True)
class RankLoaded:
    """A rank has its weights and knows how many KV blocks its device could hold."""

    generation: Generation
    rank: Rank
    max_kv_blocks: Annotated[int, Within(0, MAX_BLOCKS)]
    has_kept: bool = False  # its KV cache is what an earlier generation left, whole, with just so many blocks


@dataclass(frozen=True, slots=True)
class Allocate:
    """Sizes are agreed on before anything is allocated: the smallest offer of all ranks."""

    generation: Generation
    num_kv_blocks: Annotated[int, Within(1, MAX_BLOCKS)]


@dataclass(frozen=True, slots=True)
class RankReady:
    """A rank has its KV blocks (and graphs) and waits for step 0."""

    generation: Generation
    rank: Rank


@dataclass(frozen=True, slots=True)
class SchedulerReady:
    """Every rank is ready; requests may come."""

    generation: Generation
    num_kv_blocks: Annotated[int, Within(1, MAX_BLOCKS)]
    num_kept_blocks: Count = 0  # whose contents an earlier generation has computed


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave in good order. Open requests have been ended by then."""

    generation: Generation


# -------------------------------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class LogitRules:
    """What changes a request's logits before its tokens are chosen. Part of `Sampling`."""

    repetition_penalty: Annotated[float, Within(1e-6, 1e6)]  # 1: none
    presence_penalty: Annotated[float, Within(-1e6, 1e6)]  # 0: none
    frequency_penalty: Annotated[float, Within(-1e6, 1e6)]
    bias_ids: Int32s  # all different, at most MAX_BIAS
    bias: Float32s  # in their order
    allowed_ids: Int32s | None  # None: all
    barred: tuple[Int32s, ...]  # words of 1 to MAX_BARRED_LENGTH tokens; of several: at most MAX_BARRED


@dataclass(frozen=True, slots=True)
class Sampling:
    """A request's sampling parameters with every default filled in. Part of `Submit` and `Admission`."""

    temperature: Annotated[float, Within(0, 100)]
    top_p: Annotated[float, Within(0, 1)]
    top_k: Annotated[int, Within(0, 2**31 - 1)]  # 0: all
    seed: Annotated[int, Within(-(2**63), 2**63 - 1)]
    max_tokens: Annotated[int, Within(1, MAX_SEQUENCE)]
    min_tokens: Length
    stop_ids: Annotated[bytes, Within(0, 64)]  # int32: end-of-sequence ids (unless ignored), stop token ids
    min_p: Annotated[float, Within(0, 1)] = 0.0  # 0: all
    rules: LogitRules | None = None
    num_logprobs: NumLogprobs = NO_LOGPROBS
    num_prompt_logprobs: NumLogprobs = NO_LOGPROBS


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request; or, after a restart, one whose first `num_delivered` tokens its client already has.

    `tokens` is the prompt followed by the delivered tokens, so that prompt length is their difference.
    `request` is unique in the runtime's life: one number for each (request, choice) of a client.
    Each choice comes whole, so that none needs another one to be there still.
    """

    generation: Generation
    request: RequestId
    tokens: Int32s
    num_delivered: Length
    sampling: Sampling
    group: RequestId | None = None  # of several choices: the number of the first
    priority: Priority = 0  # lower is earlier
    salt: Salt = ""  # KV blocks are shared only with those of the same
    grammar: GrammarText | None = None  # what the output is held to, known to compile
    is_resumed: bool = False  # it had a slot before a restart: its prompt has been counted


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What grammars are compiled for. Comes before the first `Submit` that has one, once a generation."""

    generation: Generation
    tokenizer: TokenizerText
    eos_ids: Int32s  # what ends an output


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that cannot go on, for a reason of its own. It has ended; others are not affected."""

    generation: Generation
    request: RequestId
    reason: Text


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """No request that comes after this finds anything that was computed before. The scheduler sends it back
    when that is so, here and for every generation to come."""

    generation: Generation
    number: Count


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody wants the tokens of this request any more. Unknown and finished requests are ignored."""

    generation: Generation
    request: RequestId


# ----------------------------------------------------------------------------------------- plans


@dataclass(frozen=True, slots=True)
class Admission:
    """A slot is given to a request. Part of `BatchPlan`.

    `tokens` is all that is known of its sequence: the prompt, and after a preemption or a restart what
    was generated before. KV of the first `num_cached` of them is in `blocks` already (prefix cache).
    `num_prompt` tells prompt from output: `min_tokens` counts from there. It ends at `max_length` tokens, of
    both, which a step that yields several must not overrun.
    """

    slot: Slot
    tokens: Int32s
    num_prompt: Length
    num_cached: Length
    blocks: Int32s
    sampling: Sampling
    is_guided: bool = False  # its tokens are chosen under masks, see masks.py
    max_length: Length = MAX_SEQUENCE


@dataclass(frozen=True, slots=True)
class Grant:
    """Blocks are appended to a slot's block table at entry `first`. Part of `BatchPlan`."""

    slot: Slot
    first: Length
    blocks: Int32s


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a slot's known tokens are prefilled. Part of `BatchPlan`.

    `sample` is true for the chunk that reaches the end of the known tokens: a token is sampled there.
    Of a request that asks for it, the result has a logprob row for each prompt token behind one of these; all
    such chunks of a plan together have at most MAX_TOLD tokens.
    """

    slot: Slot
    start: Length
    length: Annotated[int, Within(1, MAX_SEQUENCE)]
    sample: bool


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step: what has changed since the plan before, and what to compute.

    Applied in this order: releases, admissions, grants; then one forward over the slots of `decode`
    (from device state: the last token of each, and its next `num_drafts` drafts) and the chunks. `decode`
    lists slots as int32 bytes, None means 'the same as in the plan before'. Sampled tokens are in the order:
    decode slots, sampling chunks. A decode slot gets one token, and one more for each draft that was right,
    up to the first that was wrong; none, where its sequence has ended. Of all slots that are sampled, as many
    drafts are made for the step after.
    """

    generation: Generation
    step: Step
    released: tuple[Slot, ...] = ()
    admitted: tuple[Admission, ...] = ()
    grants: tuple[Grant, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    decode: Int32s | None = None
    num_drafts: NumDrafts = 0


# --------------------------------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class StepTiming:
    """When a step was launched by the host, and ran on the device. Part of `StepResult`, `StepOutput`.

    CLOCK_MONOTONIC of rank 0's host, nanoseconds. For the step gap see `outputs.step_gap`.
    """

    launched: Nanoseconds
    started: Nanoseconds
    ended: Nanoseconds


@dataclass(frozen=True, slots=True)
class StepResult:
    """The sampled tokens of one step, int32, in the order that `BatchPlan` tells.

    `counts` says how many each slot got, and `proposed` how many drafts it had; empty: one each, and none.
    `logprobs` has a row of LOGPROB_ROW_BYTES for each of them, if any of their requests asks for logprobs;
    `prompt_logprobs` those of prompt tokens, see `Chunk`.
    """

    generation: Generation
    step: Step
    tokens: Int32s
    timing: StepTiming
    logprobs: LogprobRows = b""
    prompt_logprobs: LogprobRows = b""
    counts: Int32s = b""
    proposed: Int32s = b""


@dataclass(frozen=True, slots=True)
class Finish:
    """The request ended with the token at `index` of this `StepOutput`. Part of `StepOutput`."""

    index: Annotated[int, Within(0, MAX_SLOTS * (1 + MAX_DRAFTS))]
    reason: Annotated[str, Within(1, 16)]  # 'stop' (a stop id) or 'length'


@dataclass(frozen=True, slots=True)
class Started:
    """A request got its first slot. Part of `StepOutput`."""

    request: RequestId
    num_cached: Length  # prompt tokens found in the prefix cache


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprob rows of a request's prompt tokens, from `position` on. Part of `StepOutput`."""

    request: RequestId
    position: Length
    rows: LogprobRows


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """What only the scheduler knows, as of a `StepOutput`; all but `free_blocks` and `num_drafts` count since
    its start."""

    free_blocks: Count
    preemptions: Count
    prompt_tokens: Count
    cached_tokens: Count
    drafts: tuple[Count, ...] = ()  # by position: how many there were at the first, the second, …
    accepted: tuple[Count, ...] = ()  # and how many of them were right, all before them too
    num_drafts: NumDrafts = 0  # of this step's plan


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One message a step from scheduler to runtime: every token committed, and what ended.

    `requests` (int64), `positions` and `tokens` (int32) run in parallel; several tokens of a request follow
    each other. A position counts a request's output tokens from 0, over restarts and preemptions too: the
    runtime drops what it already has. `logprobs` has a row for those tokens whose index stands in
    `logprobs_of` (int32). `proposed` (int32) is as long as `tokens`, or empty: none; it has the drafts that a
    request had in this step at its first token, 0 at the others.
    """

    generation: Generation
    step: Step
    requests: Int64s
    positions: Int32s
    tokens: Int32s
    finished: tuple[Finish, ...]
    started: tuple[Started, ...]
    num_prefill_tokens: Count
    num_decodes: Count
    timing: StepTiming
    load: SchedulerLoad
    logprobs_of: Int32s = b""
    logprobs: LogprobRows = b""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    proposed: Int32s = b""


Said = StepOutput | Failed | ResetPrefixCache
"""What a scheduler that is ready says to the runtime."""

Message = (
    Hello
    | RankLoaded
    | Allocate
    | RankReady
    | SchedulerReady
    | Stop
    | Vocabulary
    | Submit
    | Abort
    | ResetPrefixCache
    | BatchPlan
    | StepResult
    | StepOutput
    | Failed
)
