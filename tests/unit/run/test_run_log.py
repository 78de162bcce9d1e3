"""What a run tells the console as it goes, and what it adds up."""

import logging
from contextlib import suppress

import pytest
from comfyui_paro.paro_runtime.run.run_log import RunLog


@pytest.mark.parametrize(("verbose", "times"), [(False, 1), (True, 3)])
@pytest.mark.parametrize(("kind", "level"), [("fallbacks", logging.WARNING), ("passed", logging.DEBUG)])
def test_a_reason_goes_to_the_console_once_or_always(caplog, kind, level, verbose, times):
    caplog.set_level(logging.DEBUG, "paro")
    log = RunLog("auto", verbose)
    for _ in range(3):
        log.count(kind, "too short")
    assert [(r.levelno, r.message) for r in caplog.records] == times * [(level, "too short")]
    assert getattr(log.counts, kind) == {"too short": 3}


def test_an_error_nobody_foresaw_has_its_traceback_once(caplog):
    caplog.set_level(logging.DEBUG, "paro")
    log = RunLog("auto")
    for error in (ValueError("a"), ValueError("b"), KeyError("c")):
        log.log_once("attention", error)
    assert [str(r.exc_info[1]) for r in caplog.records] == ["a", "'c'"]


def test_seconds_count_whether_or_not_the_work_succeeds():
    log = RunLog("auto")
    with suppress(ValueError), log.timed("tail"):
        raise ValueError
    assert log.seconds.tail > 0 and log.seconds.calibration == 0
