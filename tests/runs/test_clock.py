"""The parts of a run's time add up to it, and results, log and report say so."""

import time

import pytest

from distillkit.runs.clock import EVALUATION, FIRST_STEPS, REST, STARTING, STEPS, Clock, clock_record, clock_text


def test_each_second_counts_for_the_innermost_part_alone():
    start = time.perf_counter()
    clock = Clock()
    with clock.span(FIRST_STEPS):
        time.sleep(0.02)
        with clock.span(EVALUATION):
            time.sleep(0.05)
        clock.turn_to(STEPS)
        time.sleep(0.03)
    with pytest.raises(KeyboardInterrupt), clock.span(EVALUATION):
        raise KeyboardInterrupt
    time.sleep(0.01)
    seconds, whole = clock.seconds(), time.perf_counter() - start
    assert list(seconds) == [FIRST_STEPS, EVALUATION, STEPS, REST]
    assert [seconds[part] >= least for part, least in zip(seconds, (0.02, 0.05, 0.03, 0.01), strict=True)] == [True] * 4
    assert sum(seconds.values()) == pytest.approx(whole, abs=1e-3)


def test_laps_add_up_to_the_whole():
    clock = Clock(time.time() - 5)
    with clock.span(STEPS):
        time.sleep(0.01)
    first = clock.lap()
    with clock.span(STEPS):
        time.sleep(0.01)
    second = clock.lap()
    assert first[STARTING] == pytest.approx(5, abs=0.1)
    assert STARTING not in second
    assert sum(first.values()) + sum(second.values()) == pytest.approx(sum(clock.seconds().values()), abs=1e-3)


def test_a_line_names_the_parts_that_took_time():
    record = clock_record({STARTING: 9.123, EVALUATION: 0.012, STEPS: 1234.5, REST: 0.6})
    assert record["total"] == pytest.approx(1244.23, abs=0.01)
    assert clock_text(record) == "1,244 s: starting 9.1, steps 1,234, rest 0.6"
