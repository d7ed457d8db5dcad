"""Rings of records: what a thread tells is read once and in order, and what does not fit is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tpworker.ipc.trace import RECORDS, Kind, Record, Rings, Teller, launch_ring, publisher_ring


@pytest.fixture
def rings() -> Iterator[Rings]:
    rings = Rings.create(2)
    yield rings
    rings.close()


def tell(teller: Teller, *steps: int) -> None:
    for step in steps:
        teller.begin(step)
        teller.mark()
        teller.end(Kind.COMMITTED, step, 2**64 - 1)


def drain(rings: Rings) -> list[Record]:
    """What is there: a reader takes it at its second look."""
    return [*rings.drain(), *rings.drain()]


def test_records_are_read_once_and_in_order_ring_by_ring(rings: Rings) -> None:
    rings.switch(True)
    attached = Rings.attach(rings.fd, 2)
    tell(attached.teller(publisher_ring(1), 3), 7, 8)
    tell(attached.teller(launch_ring(0), 3), 7)
    first = list(rings.drain())
    assert first == [], "nothing is taken at the first look: it may not have been written yet"
    records = drain(rings)
    assert [(r.ring, r.kind, r.generation, r.step) for r in records] == [
        (launch_ring(0), Kind.COMMITTED, 3, 7),
        (publisher_ring(1), Kind.COMMITTED, 3, 7),
        (publisher_ring(1), Kind.COMMITTED, 3, 8),
    ]
    for record in records:
        begun, marked, ended, *more = record.values
        assert 0 < begun <= marked <= ended
        assert more == [record.step, 2**64 - 1, 0]
    assert drain(rings) == []
    attached.close()


def test_nobody_tells_anything_while_nobody_wants_to_know(rings: Rings) -> None:
    teller = rings.teller(0, 0)
    tell(teller, 0)
    rings.switch(True)
    tell(teller, 1)
    teller.begin(2)  # begun while it is on: told to its end
    assert teller.is_told
    rings.switch(False)
    teller.end(Kind.COMMITTED)
    tell(teller, 3)
    assert [record.step for record in drain(rings)] == [1, 2]
    rings.switch(True)
    tell(teller, 4)
    rings.switch(False)
    rings.switch(True)  # forgets what was there
    assert drain(rings) == []
    tell(Teller(), 5)


def test_who_is_too_quick_loses_records_and_they_are_counted(rings: Rings) -> None:
    rings.switch(True)
    teller = rings.teller(0, 0)
    tell(teller, *range(RECORDS + 5))
    assert [record.step for record in drain(rings)] == list(range(RECORDS))
    tell(teller, 9000)
    assert [record.step for record in drain(rings)] == [9000]
    assert rings.lost() == 5


def test_the_next_generation_goes_on_behind_what_the_last_has_told(rings: Rings) -> None:
    rings.switch(True)
    dead = rings.teller(0, 0)
    tell(dead, 0, 1)
    dead.begin(2)  # it is killed here
    tell(rings.teller(0, 1), 0)
    assert [(record.generation, record.step) for record in drain(rings)] == [(0, 0), (0, 1), (1, 0)]


def test_memory_of_another_group_is_refused(rings: Rings) -> None:
    with pytest.raises(ValueError, match="rings of 3 ranks"):
        Rings.attach(rings.fd, 3)
