"""Work in several threads: torch's own, or ours where those are out of reach."""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from moefold.ops.cpu import team
from moefold.ops.cpu.team import run_together

TORCH = Path(torch.__file__).parent / "lib"


@pytest.fixture(params=["torch's threads", "our threads"])
def threads(request, monkeypatch):
    if request.param == "our threads":
        monkeypatch.setattr(team, "_parallel", lambda: None)
    elif team._parallel() is None:
        pytest.skip("torch's threads are out of reach here")
    return request.param


def test_torchs_threads_are_within_reach_under_linux():
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch has no OpenMP that we know how to reach")
    assert team._parallel() is not None


def test_every_thread_comes_once_and_at_the_same_time(threads):
    met, came = threading.Barrier(2, timeout=20), []

    def work():
        met.wait()  # one thread after the other would never get past this
        came.append(threading.get_ident())

    for _ in range(3):
        run_together(work, 2)
    assert len(came) == 6
    assert len(set(came)) == 2
    assert (threading.get_ident() in came) == (threads == "torch's threads")


def test_torch_does_not_divide_an_operation_within(threads):
    # As OpenMP says within its own region; a pool's threads are told how many they are.
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        if threads == "our threads":
            run_together(lambda: found.append(torch.get_num_threads() == 1), 2)
        else:
            within = ctypes.CDLL(str(next(TORCH.glob("libtorch_cpu.*")))).omp_in_parallel
            run_together(lambda: found.append(within() == 1), 2)
            assert within() == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == [True, True]


def test_a_failure_is_raised_when_all_have_returned(threads):
    met, done = threading.Barrier(2, timeout=20), []

    def work():
        if met.wait() == 0:
            raise KeyError("which")
        done.append(True)

    with pytest.raises(KeyError, match="which"):
        run_together(work, 2)
    assert done == [True]
    run_together(lambda: done.append(True), 2)  # and they can be called again
    assert len(done) == 3


def test_what_it_ran_is_not_kept(threads):
    # Gradients that somebody else still holds would be copied, instead of taken, by autograd.
    class Held:
        pass

    gc.disable()
    try:
        held = Held()
        alive = weakref.ref(held)

        def work(own=held):
            assert own

        run_together(work, 2)
        del held, work
        assert alive() is None
    finally:
        gc.enable()


def test_one_thread_is_the_calling_one(threads):
    came = []
    run_together(lambda: came.append(threading.get_ident()), 1)
    assert came == [threading.get_ident()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_it_works_in_a_child(threads):
    done = []
    run_together(lambda: done.append(True), 2)
    child = os.fork()
    if child == 0:  # as a worker of a data loader; it would wait for ever for threads it has not
        signal.alarm(20)
        try:
            run_together(lambda: done.append(True), 2)
            run_together(lambda: done.append(True), 2)
        finally:
            os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6


def test_several_threads_of_the_caller_do_not_disturb_each_other(threads):
    done = []

    def ask():
        for _ in range(20):
            run_together(lambda: done.append(True), 2)

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(done) == 120


def test_where_no_thread_can_be_started_the_caller_does_it(monkeypatch):
    def at_the_end(threads):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(team, "_parallel", lambda: None)
    monkeypatch.setattr(team, "_pool", at_the_end)
    came = []
    run_together(lambda: came.append(threading.get_ident()), 2)
    assert came == [threading.get_ident()]


def test_an_interruption_waits_for_all(monkeypatch):
    monkeypatch.setattr(team, "_parallel", lambda: None)
    really, asked, done = team.wait, [], []

    def interrupted(futures):
        asked.append(True)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return really(futures)

    def work():
        time.sleep(0.2)
        done.append(True)

    monkeypatch.setattr(team, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_together(work, 2)
    assert done == [True, True]
