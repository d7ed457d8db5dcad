from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.server.fake_runtime import byte_tokenizer
from tpworker.ipc.arrays import pack_int32, pack_int64
from tpworker.ipc.messages import Finish, SchedulerLoad, Started, StepOutput, StepTiming
from tpworker.outputs import RequestOutput
from tpworker.runtime.requests import GapError, Request, Requests
from tpworker.text.stream import TextStream

LOAD, TIMING = SchedulerLoad(0, 0, 0, 0), StepTiming(0, 0, 0)


def step(
    *tokens: tuple[Request, int, int],
    finished: Sequence[tuple[int, str]] = (),
    started: Sequence[tuple[Request, int]] = (),
    proposed: Sequence[int] = (),
) -> StepOutput:
    """A step's output from (request, position, token)."""
    return StepOutput(
        0, 0, pack_int64([request.number for request, _, _ in tokens]),
        pack_int32([position for _, position, _ in tokens]), pack_int32([token for _, _, token in tokens]),
        tuple(Finish(*finish) for finish in finished),
        tuple(Started(request.number, num_cached) for request, num_cached in started),
        0, 0, TIMING, LOAD, proposed=pack_int32(proposed),
    )  # fmt: skip


@pytest.fixture
def requests() -> Requests:
    return Requests()


def with_text(request: Request, *stop: str, hidden_ids: Sequence[int] = (), min_tokens: int = 0) -> Request:
    request.text = TextStream(byte_tokenizer(), stop, hidden_ids, min_tokens=min_tokens)
    return request


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def deliver_text(requests: Requests, request: Request, text: str, finish: str | None = None) -> None:
    """One step a character."""
    tokens = ids(text)
    for token in tokens[:-1]:
        requests.deliver(step((request, request.num_received, token)))
    last = (request, request.num_received, tokens[-1])
    requests.deliver(step(last, finished=[(0, finish)] if finish else ()))


def test_tokens_come_in_order_to_the_request_they_are_of(requests: Requests) -> None:
    a, b = requests.open("a"), requests.open("b")
    requests.deliver(step((a, 0, 10), (b, 0, 20)))
    requests.deliver(step((b, 1, 21), (a, 1, 11), finished=[(1, "length")]))
    assert a.take() == RequestOutput("a", "", (10, 11), "length", None, 0, 0, 2, index=0)
    assert b.take() == RequestOutput("b", "", (20, 21), None, None, 0, 0, 2, index=0)
    assert a not in requests
    assert b in requests
    assert requests.num_output_tokens == 4


def test_what_is_repeated_is_dropped(requests: Requests) -> None:
    a = requests.open("a")
    requests.deliver(step((a, 0, 10)))
    requests.deliver(step((a, 1, 11)))
    requests.deliver(step((a, 0, 10)))  # a new generation begins again
    requests.deliver(step((a, 1, 11), (a, 2, 12)))
    assert a.take().token_ids == (10, 11, 12)
    assert requests.num_output_tokens == 3


def test_a_gap_is_an_error_that_says_what_is_missing(requests: Requests) -> None:
    a = requests.open("a")
    requests.deliver(step((a, 0, 10)))
    with pytest.raises(GapError, match=r"'a'.*position 2 came, but that at 1"):
        requests.deliver(step((a, 2, 12)))


def test_several_tokens_of_a_step_are_told_with_the_drafts_they_came_of(requests: Requests) -> None:
    a, b, c = (requests.open(name) for name in "abc")
    requests.deliver(step((a, 0, 10), (b, 0, 20), (c, 0, 30)))
    requests.deliver(
        step((a, 1, 11), (a, 2, 12), (a, 3, 13), (b, 1, 21), (c, 1, 31), proposed=[4, 0, 0, 2, 0])
    )
    assert a.take() == RequestOutput(
        "a", "", (10, 11, 12, 13), None, None, 0, 0, 4, num_draft_tokens=4, num_accepted_tokens=2
    )
    assert (b.take()[-2:], c.take()[-2:]) == ((2, 0), (0, 0))
    last = step((b, 2, 22), (a, 4, 14), (a, 5, 15), proposed=[1, 1, 0], finished=[(2, "stop")])
    requests.deliver(last)
    output = a.take()
    assert (output.token_ids, output.finish_reason, output[-2:]) == ((14, 15), "stop", (5, 3))
    assert b.take()[-2:] == (3, 0)
    assert requests.num_output_tokens == 11


def test_drafts_of_what_is_repeated_or_of_nobody_are_not_counted_again(requests: Requests) -> None:
    a, b = requests.open("a"), requests.open("b")
    requests.close(b)
    for _ in range(2):
        requests.deliver(step((a, 0, 10)))
        requests.deliver(step((a, 1, 11), (a, 2, 12), (b, 5, 1), (b, 6, 1), proposed=[3, 0, 3, 0]))
    assert a.take()[-2:] == (3, 1)
    assert b.take()[-2:] == (0, 0)


def test_a_gap_within_a_step_is_an_error(requests: Requests) -> None:
    a = requests.open("a")
    with pytest.raises(GapError, match=r"'a'.*position 2 came, but that at 1"):
        requests.deliver(step((a, 0, 10), (a, 2, 12), proposed=[1, 0]))


def test_a_stop_string_cuts_within_the_tokens_of_a_step(requests: Requests) -> None:
    a = with_text(requests.open("a"), "END")
    text = ids("some EN text ENDmo")
    for first in range(0, len(text), 6):
        part = [(a, first + i, token) for i, token in enumerate(text[first : first + 6])]
        requests.deliver(step(*part, proposed=[5, *[0] * (len(part) - 1)]))
    output = a.take()
    assert (output.text, output.stop_reason, output.num_output_tokens) == ("some EN text ", "END", 16)
    assert output.token_ids == tuple(text[:16])


def test_an_end_is_known_though_its_token_is_a_repetition(requests: Requests) -> None:
    a = requests.open("a")
    requests.deliver(step((a, 0, 10)))
    requests.deliver(step((a, 0, 10), finished=[(0, "stop")]))
    assert a.take().finish_reason == "stop"


def test_tokens_of_closed_and_unknown_requests_are_dropped(requests: Requests) -> None:
    a, b = requests.open("a"), requests.open("b")
    assert requests.close(a)
    assert not requests.close(a)
    requests.deliver(step((a, 5, 10), (b, 0, 20), started=[(a, 3)], finished=[(0, "stop")]))
    assert a.num_received == 0
    assert b.take().token_ids == (20,)


def test_waiting_and_running_are_counted(requests: Requests) -> None:
    a, b, c = (requests.open(name) for name in "abc")
    assert (requests.num_waiting, requests.num_running) == (3, 0)
    requests.deliver(step((a, 0, 1), started=[(a, 5), (b, 0)]))
    assert (requests.num_waiting, requests.num_running) == (1, 2)
    assert a.take().num_cached_tokens == 5
    requests.deliver(step(started=[(a, 0)]))  # again, after a restart: what was cached at first counts
    assert a.num_cached == 5
    requests.close(a)
    requests.close(c)
    assert (requests.num_waiting, requests.num_running) == (0, 1)
    requests.deliver(step((b, 0, 1), finished=[(0, "stop")]))
    assert (requests.num_waiting, requests.num_running) == (0, 0)


def test_the_scheduler_has_work_when_something_was_submitted(requests: Requests) -> None:
    a = requests.open("a")
    assert not requests.any_submitted()
    a.is_submitted = True
    assert requests.any_submitted()
    requests.close(a)
    assert not requests.any_submitted()


def test_a_slow_consumer_gets_all_that_came_together(requests: Requests) -> None:
    a = with_text(requests.open("a"))
    deliver_text(requests, a, "hello ")
    deliver_text(requests, a, "world", "length")
    output = a.take()
    assert (output.text, output.finish_reason, output.num_output_tokens) == ("hello world", "length", 11)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_stop_string_cuts_at_its_position_and_overrules_a_later_end(
    requests: Requests, at_once: bool
) -> None:
    a = with_text(requests.open("a"), "END")
    outputs = []
    if at_once:
        deliver_text(requests, a, "some EN text END and more", "length")
        outputs.append(a.take())
    else:
        for char in "some EN text END":
            deliver_text(requests, a, char)
            outputs.append(a.take())
        assert all(output.finish_reason is None for output in outputs[:-1])
    assert "".join(output.text for output in outputs) == "some EN text "
    last = outputs[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "END")
    assert last.num_output_tokens == len("some EN text END")
    assert sum(len(output.token_ids) for output in outputs) == last.num_output_tokens
    assert a.finish == "stop"


def test_an_end_before_a_stop_string_is_complete_shows_what_was_held_back(requests: Requests) -> None:
    a = with_text(requests.open("a"), "END")
    deliver_text(requests, a, "text EN")
    assert a.take().text == "text "
    requests.deliver(step((a, 7, ids("x")[0]), finished=[(0, "length")]))
    assert a.take().text == "ENx"


def test_a_special_token_that_a_stop_string_names_ends_it(requests: Requests) -> None:
    end = byte_tokenizer().special["<end>"]
    a = with_text(requests.open("a"), "<end>")
    deliver_text(requests, a, "hi")
    requests.deliver(step((a, 2, end)))
    deliver_text(requests, a, "more", "length")
    output = a.take()
    assert (output.text, output.token_ids) == ("hi", (*ids("hi"), end))
    assert (output.finish_reason, output.stop_reason, output.num_output_tokens) == ("stop", "<end>", 3)


def test_the_string_counts_where_the_scheduler_ended_it_by_that_token(requests: Requests) -> None:
    end = byte_tokenizer().special["<end>"]
    a = with_text(requests.open("a"), "<end>", hidden_ids=[end])
    deliver_text(requests, a, "hi")
    requests.deliver(step((a, 2, end), finished=[(0, "stop")]))
    output = a.take()
    assert (output.text, output.finish_reason, output.stop_reason) == ("hi", "stop", "<end>")


def test_a_stop_string_before_min_tokens_is_text(requests: Requests) -> None:
    a = with_text(requests.open("a"), "b", min_tokens=4)
    deliver_text(requests, a, "abcdebf", "length")
    output = a.take()
    assert (output.text, output.finish_reason, output.num_output_tokens) == ("abcde", "stop", 6)


def test_stop_tokens_are_outputs_but_not_text(requests: Requests) -> None:
    for own, reason in ((frozenset({ids("!")[0]}), ids("!")[0]), (frozenset(), None)):
        a = with_text(requests.open("a"), hidden_ids=ids("!"))
        a.own_stop_ids = own
        deliver_text(requests, a, "hi!", "stop")
        output = a.take()
        assert output.text == "hi"
        assert output.token_ids == tuple(ids("hi!"))
        assert (output.finish_reason, output.stop_reason) == ("stop", reason)


def test_a_cut_character_waits_for_its_rest_and_comes_at_the_end_at_the_latest(requests: Requests) -> None:
    a = with_text(requests.open("a"))
    first, *rest = ids("ä")
    requests.deliver(step((a, 0, first)))
    output = a.take()
    assert (output.text, output.token_ids) == ("", (first,))
    requests.deliver(step((a, 1, rest[0])))
    assert a.take().text == "ä"
    requests.deliver(step((a, 2, first), finished=[(0, "length")]))
    assert a.take().text == "\ufffd"


def test_the_first_end_counts(requests: Requests) -> None:
    a = requests.open("a")
    a.end("abort")
    a.end("length")
    assert a.take().finish_reason == "abort"
