"""Logprobs on their way to who asked: each with its token, whatever comes at once or again, or is cut."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_choices import by_index, sent_by
from tests.runtime.test_requests import ids, step, with_text
from tests.runtime.test_runtime import MakeRuntime, collect, ids_only, rest_of, run, tokens_of
from tests.runtime.test_sync import sync_runtime
from tests.server.fake_runtime import byte_tokenizer
from tpworker import InvalidRequest, PromptTooLong, RequestOutput, SamplingParams
from tpworker.ipc.arrays import pack_int32, unpack_logprobs
from tpworker.ipc.messages import NO_LOGPROBS, Abort, PromptLogprobs, StepOutput, Submit
from tpworker.outputs import TokenLogprobs
from tpworker.runtime.logprobs import LogprobRecord
from tpworker.runtime.requests import Request, Requests
from tpworker.testing.fake_rank import logprob_row

pytestmark = pytest.mark.usefixtures("nothing_left")


def expected(context: Sequence[int], token: int, num_top: int) -> TokenLogprobs:
    """Of a token behind this context, in the world of the fakes."""
    ((own, top),) = unpack_logprobs(logprob_row(context, token))
    return TokenLogprobs(token, own, tuple(top[:num_top]))


def expected_of(prompt: Sequence[int], tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    whole = [*prompt, *tokens]
    return [expected(whole[:place], whole[place], num_top) for place in range(len(prompt), len(whole))]


def expected_of_prompt(prompt: Sequence[int], num_top: int) -> tuple[TokenLogprobs | None, ...]:
    return (None, *expected_of(prompt[:1], prompt[1:], num_top))


# ------------------------------------------------------------------------------ one request's record


def with_rows(output: StepOutput, rows: dict[int, bytes]) -> StepOutput:
    """A step's output with logprob rows for the tokens at these places."""
    return replace(output, logprobs_of=pack_int32(rows), logprobs=b"".join(rows.values()))


def open_request(
    requests: Requests,
    num_top: int | None = None,
    num_prompt_top: int | None = None,
    prompt: Sequence[int] = (),
) -> Request:
    request = requests.open("a")
    request.logprobs = LogprobRecord(num_top, num_prompt_top, prompt)
    return request


def test_each_token_comes_with_its_own() -> None:
    """Among others that ask for fewer, or for none; the rows name the tokens that they are of."""
    requests = Requests()
    a, plain, b = open_request(requests, 2), requests.open("plain"), open_request(requests, 0)
    rows = [logprob_row([5, 6], token) for token in (7, 8, 9)]
    requests.deliver(with_rows(step((plain, 0, 3), (b, 0, 7), (a, 0, 8)), {1: rows[0], 2: rows[1]}))
    requests.deliver(with_rows(step((a, 1, 9), (plain, 1, 4)), {0: rows[2]}))
    assert a.take().logprobs == (expected([5, 6], 8, 2), expected([5, 6], 9, 2))
    assert b.take().logprobs == (expected([5, 6], 7, 0),)
    assert plain.take().logprobs is None
    requests.deliver(with_rows(step((a, 2, 7)), {0: rows[0]}))
    assert a.take().logprobs == (expected([5, 6], 7, 2),), "each once"


def test_each_of_several_tokens_of_a_step_comes_with_its_own() -> None:
    """Also where some of them are known already."""
    requests = Requests()
    a, b = open_request(requests, 1), open_request(requests, 0)
    rows = [logprob_row([place], place) for place in range(5)]
    output = step((a, 0, 0), (a, 1, 1), (b, 0, 0), (a, 2, 2), proposed=[2, 0, 0, 0])
    requests.deliver(with_rows(output, dict(enumerate([rows[0], rows[1], rows[0], rows[2]]))))
    output = step((a, 1, 1), (a, 2, 2), (a, 3, 3), (a, 4, 4), proposed=[3, 0, 0, 0])
    requests.deliver(with_rows(output, dict(enumerate(rows[1:]))))
    taken = a.take()
    assert taken.token_ids == (0, 1, 2, 3, 4)
    assert taken.logprobs == tuple(expected([place], place, 1) for place in range(5))
    assert b.take().logprobs == (expected([0], 0, 0),)


def test_what_is_repeated_is_dropped_with_its_logprobs() -> None:
    """After a restart: some that are known, then new ones."""
    requests = Requests()
    a = open_request(requests, 1)
    rows = [logprob_row([place], place) for place in range(4)]
    requests.deliver(with_rows(step((a, 0, 0)), {0: rows[0]}))
    requests.deliver(with_rows(step((a, 1, 1)), {0: rows[1]}))
    requests.deliver(with_rows(step((a, 0, 0)), {0: rows[3]}))
    requests.deliver(with_rows(step((a, 1, 1)), {0: rows[3]}))
    requests.deliver(with_rows(step((a, 2, 2)), {0: rows[2]}))
    output = a.take()
    assert output.token_ids == (0, 1, 2)
    assert output.logprobs == tuple(expected([place], place, 1) for place in range(3))


def test_those_of_closed_and_unknown_requests_are_dropped() -> None:
    requests = Requests()
    a, b = open_request(requests, 1), open_request(requests, 1)
    requests.close(a)
    told = PromptLogprobs(a.number, 1, logprob_row([1], 2))
    output = with_rows(step((a, 0, 5), (b, 0, 6)), {0: logprob_row([1], 5), 1: logprob_row([1], 6)})
    requests.deliver(replace(output, prompt_logprobs=(told,)))
    assert b.take().logprobs == (expected([1], 6, 1),)
    assert a.take().logprobs == ()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_stop_string_cuts_them_where_it_cuts_the_tokens(at_once: bool) -> None:
    requests = Requests()
    a = with_text(open_request(requests, 1), "END")
    tokens = ids("text END and more")
    outputs = []
    for place, token in enumerate(tokens):
        requests.deliver(with_rows(step((a, place, token)), {0: logprob_row(tokens[:place], token)}))
        if not at_once and a.finish is None:
            outputs.append(a.take())
    if at_once:
        outputs.append(a.take())
    kept = [token for output in outputs for token in output.token_ids]
    assert kept == ids("text END")
    assert [found for output in outputs for found in output.logprobs or ()] == expected_of([], kept, 1)
    assert all(len(output.logprobs or ()) == len(output.token_ids) for output in outputs)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_a_prompt_is_told_of_once_it_is_whole(length: int) -> None:
    """In parts of any size, and parts that come again, or overlap, after a preemption or a restart."""
    prompt = list(range(50, 50 + length))
    rows = [b"", *(logprob_row(prompt[:place], prompt[place]) for place in range(1, length))]
    draw = random.Random(length)
    for _ in range(30):
        requests = Requests()
        a = open_request(requests, None, 2, prompt)
        known = 1
        while known < length:
            first, last = draw.randint(1, known), draw.randint(1, length)
            if first < last:
                told = PromptLogprobs(a.number, first, b"".join(rows[first:last]))
                requests.deliver(replace(step(), prompt_logprobs=(told,)))
                known = max(known, last)
            if known < length:
                assert a.take().prompt_logprobs is None
        requests.deliver(step((a, 0, 5)))
        output = a.take()
        assert output.prompt_logprobs == expected_of_prompt(prompt, 2)
        assert output.logprobs is None
        requests.deliver(
            replace(step((a, 1, 6)), prompt_logprobs=(PromptLogprobs(a.number, 1, b"".join(rows)),))
        )
        assert a.take().prompt_logprobs is None, "told already"


def test_nan_is_told_as_it_is_and_minus_infinity_is_no_likely_token() -> None:
    record = LogprobRecord(20, None)
    record.append(5, (math.nan, [(5, math.nan), (6, math.nan)]))
    ((token, own, top),), _ = record.take(1)
    assert token == 5
    assert math.isnan(own)
    assert [candidate for candidate, _ in top] == [5, 6]
    ((_, row),) = unpack_logprobs(logprob_row([1, 2], 9))
    assert row == [(9, row[0][1]), (2, row[1][1])], "-1: there is none"


def test_a_token_that_asks_for_none_of_its_likeliest_has_its_own() -> None:
    requests = Requests()
    a = open_request(requests, 0)
    requests.deliver(with_rows(step((a, 0, 5)), {0: logprob_row([1], 5)}))
    (found,) = a.take().logprobs or ()
    assert (found.token_id, found.top) == (5, ())
    assert found.logprob < 0


# ------------------------------------------------------------------------------------ through a runtime

PROMPT = [5, 6, 7]


def check(outputs: list[RequestOutput], prompt: Sequence[int], num_top: int) -> None:
    tokens = tokens_of(outputs)
    assert all(len(output.logprobs or ()) == len(output.token_ids) for output in outputs)
    assert [found for output in outputs for found in output.logprobs or ()] == expected_of(
        prompt, tokens, num_top
    )


def test_outputs_have_them_from_the_first_to_the_last(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = await collect(runtime, PROMPT, ids_only(20, logprobs=2, prompt_logprobs=1))
            check(outputs, PROMPT, 2)
            assert outputs[0].prompt_logprobs == expected_of_prompt(PROMPT, 1)
            assert all(output.prompt_logprobs is None for output in outputs[1:])
            plain = await collect(runtime, PROMPT, ids_only(5))
            assert all(output.logprobs is output.prompt_logprobs is None for output in plain)
            own = await collect(runtime, PROMPT, ids_only(5, logprobs=0))
            check(own, PROMPT, 0)
            one = await collect(runtime, [9], ids_only(2, prompt_logprobs=3))
            assert one[0].prompt_logprobs == (None,)
            assert all(output.logprobs is None for output in one)

    run(main)


def test_a_slow_consumer_gets_all_of_them(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            params = ids_only(150, logprobs=1, prompt_logprobs=0)
            async with aclosing(runtime.generate(PROMPT, params)) as outputs:
                slow = [await anext(outputs)]
                await collect(runtime, [7], ids_only(250))
                slow += await rest_of(outputs)
            check(slow, PROMPT, 1)
            assert len(tokens_of(slow)) == 150
            assert len(slow) < 10

    run(main)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": 2}, {"logprobs": 2, "prompt_logprobs": 0}])
def test_no_tokens_at_all(fake_runtime: MakeRuntime, n: int, options: dict[str, int]) -> None:
    """max_tokens=0: an end for each choice, and what was asked for of the prompt."""

    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = await collect(runtime, PROMPT, ids_only(0, n=n, **options))
            assert sorted(output.index for output in outputs) == list(range(n))
            for output in outputs:
                assert (output.token_ids, output.text, output.num_output_tokens) == ((), "", 0)
                assert (output.finish_reason, output.num_prompt_tokens) == ("length", 3)
                assert output.logprobs == (() if "logprobs" in options else None)
                top = options.get("prompt_logprobs")
                is_told = top is not None and output.index == 0
                assert output.prompt_logprobs == (expected_of_prompt(PROMPT, top or 0) if is_told else None)
            assert (runtime.stats().open, runtime.stats().finished) == (0, n)

    run(main)


@pytest.mark.parametrize("options", [{"max_model_len": 48}, {"num_kv_blocks": 4, "block_size": 16}])
def test_no_tokens_need_no_room(fake_runtime: MakeRuntime, options: dict[str, int]) -> None:
    async def main() -> None:
        async with fake_runtime(**options) as runtime:
            (output,) = await collect(runtime, [5] * 48, ids_only(0, prompt_logprobs=1))
            assert (output.num_prompt_tokens, output.finish_reason) == (48, "length")
            assert output.prompt_logprobs == expected_of_prompt([5] * 48, 1)
            for num_prompt, max_tokens in ((49, 0), (48, 1), (48, None)):
                with pytest.raises(PromptTooLong, match="48"):
                    await collect(runtime, [5] * num_prompt, ids_only(max_tokens))

    run(main)


def test_no_tokens_though_the_first_would_be_a_stop_token_or_text(
    fake_runtime: MakeRuntime, model_folder: Path
) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            first = ids("hello")[0]
            for params in (
                SamplingParams(max_tokens=0, stop_token_ids=[first]),
                SamplingParams(max_tokens=0, stop=["h"]),
                SamplingParams(max_tokens=0, logprobs=5),
            ):
                (output,) = await collect(runtime, "hello", params)
                assert (output.text, output.token_ids, output.num_output_tokens) == ("", (), 0)
                assert (output.finish_reason, output.stop_reason) == ("length", None)

    run(main)


def test_choices_have_their_own_and_the_first_alone_the_prompts(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            sent = sent_by(runtime, monkeypatch)
            outputs = await collect(runtime, PROMPT, ids_only(6, n=3, seed=1, logprobs=1, prompt_logprobs=2))
            found = by_index(outputs)
            for index in range(3):
                check(found[index], PROMPT, 1)
                told = [output.prompt_logprobs for output in found[index] if output.prompt_logprobs]
                assert told == ([expected_of_prompt(PROMPT, 2)] if index == 0 else [])
            submits = [message for message in sent if isinstance(message, Submit)]
            assert [submit.sampling.num_logprobs for submit in submits] == [1] * 3
            assert [submit.sampling.num_prompt_logprobs for submit in submits] == [2] + [NO_LOGPROBS] * 2

    run(main)


def test_an_abort_with_logprobs_on_the_way(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has arrived is delivered with its logprobs; the next request is not touched."""

    async def main() -> None:
        async with fake_runtime() as runtime:
            sent = sent_by(runtime, monkeypatch)
            outputs: list[RequestOutput] = []
            params = ids_only(300, logprobs=1, prompt_logprobs=1)
            async for output in runtime.generate(PROMPT, params, request_id="mine"):
                outputs.append(output)
                if len(outputs) == 3:
                    runtime.abort("mine")
            assert outputs[-1].finish_reason == "abort"
            assert outputs[0].prompt_logprobs == expected_of_prompt(PROMPT, 1)
            check(outputs, PROMPT, 1)
            assert sum(isinstance(message, Abort) for message in sent) == 1
            check(await collect(runtime, PROMPT, ids_only(5, logprobs=2)), PROMPT, 2)

    run(main)


def test_a_stop_string_in_a_runtime(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            params = SamplingParams(max_tokens=60, stop=["lo he"], logprobs=1)
            outputs = await collect(runtime, "hello ", params)
            assert "".join(output.text for output in outputs) == "hel"
            check(outputs, ids("hello "), 1)
            assert tokens_of(outputs) == ids("hello he")

    run(main)


def test_bad_words_do_not_hold_up_the_event_loop(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tokenised in threads, and what is wrong with them is that request's error."""
    import threading

    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            threads: list[str] = []
            encode = type(runtime.tokenizer).encode

            def encoding(self: Any, text: str, *args: Any, **options: Any) -> list[int]:
                threads.append(threading.current_thread().name)
                return encode(self, text, *args, **options)

            monkeypatch.setattr(type(runtime.tokenizer), "encode", encoding)
            params = SamplingParams(max_tokens=3, bad_words=["bad", "worse"])
            assert len(tokens_of(await collect(runtime, [40, 41], params))) == 3
            assert len(threads) == 4
            assert all("tokenise" in name for name in threads)
            with pytest.raises(InvalidRequest, match="17 tokens") as caught:
                await collect(runtime, [40, 41], replace(params, bad_words=["seventeen letters"]))
            assert caught.value.parameter == "bad_words"
            assert runtime.stats().open == 0

    run(main)


def test_completions_have_them_whole(model_folder: Path) -> None:
    with sync_runtime(model_folder) as runtime:
        params = ids_only(7, n=2, logprobs=1, prompt_logprobs=0)
        completions = runtime.complete([[5, 6, 7], [8]], params)
        assert [completion.index for completion in completions] == [0, 1, 0, 1]
        for completion, prompt in zip(completions, ([5, 6, 7], [5, 6, 7], [8], [8]), strict=True):
            assert list(completion.logprobs or ()) == expected_of(prompt, completion.token_ids, 1)
            told = expected_of_prompt(prompt, 0) if completion.index == 0 else None
            assert completion.prompt_logprobs == told
        (plain,) = runtime.complete([[5]], ids_only(3))
        assert plain.logprobs is plain.prompt_logprobs is None
