"""The generators of the process belong to one thread at a time. `test_draws.py` trains in several threads."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from atoll.base.random import Key, lend_generators, user_scope


def in_turns(first, second):
    """Run the first function up to its call of the function it gets; then the second whole; then the rest."""
    reached, done = threading.Event(), threading.Event()

    def pause():
        with lend_generators():
            reached.set()
            done.wait(10)

    def other():
        reached.wait(10)
        try:
            return second()
        finally:
            done.set()

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.submit(first, pause), pool.submit(other)
        return a.result(10), b.result(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_thread_that_waits_lends_the_generators_and_gets_its_own_back(dtype):
    def draw(pause):
        with user_scope(Key(1)):
            first = torch.rand(2), np.random.rand(), torch.empty(0).dtype
            pause()
            return *first, torch.rand(2), np.random.rand(), torch.empty(0).dtype

    def texts(values):
        return list(map(str, values))

    torch.set_default_dtype(dtype)
    try:
        alone = draw(lambda: None)
        paused, whole = in_turns(draw, lambda: draw(lambda: None))
        assert texts(paused) == texts(whole) == texts(alone)
        assert torch.get_default_dtype() == dtype and alone[2] == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_second_thread_waits_for_the_end_of_the_first_block():
    inside, order, go = threading.Event(), [], threading.Event()

    def first():
        with user_scope(Key(1)), user_scope(Key(2)):
            inside.set()
            go.wait(10)
            order.append("first")

    def second():
        inside.wait(10)
        go.set()
        with user_scope(Key(1)):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(first), pool.submit(second)]:
            ended.result(10)
    assert order == ["first", "second"]


def test_an_error_in_a_block_frees_the_generators():
    def fail():
        with user_scope(Key(1)), lend_generators():
            raise ValueError

    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            assert isinstance(pool.submit(fail).exception(10), ValueError)
    with user_scope(Key(1)):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("owner", ["another thread", "the forking thread", "no thread"])
def test_a_forked_process_can_use_the_generators(owner):
    held, done = threading.Event(), threading.Event()

    def hold():
        with user_scope(Key(1)):
            held.set()
            done.wait(10)

    def child():
        read, write = os.pipe()
        number = os.fork()
        if not number:
            with user_scope(Key(3)):
                os.write(write, torch.rand(1).numpy().tobytes())
            os._exit(0)
        os.close(write)
        os.waitpid(number, 0)
        return os.read(read, 4)

    with user_scope(Key(3)):
        expected = torch.rand(1).numpy().tobytes()
        if owner == "the forking thread":
            assert child() == expected
    if owner == "no thread":
        assert child() == expected
    if owner == "another thread":
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(10)
        try:
            assert child() == expected
        finally:
            done.set()
            thread.join(10)


def test_a_network_of_layers_made_in_two_threads_has_the_weights_of_its_seed():
    def made(seed):
        with user_scope(Key(seed)):
            return [nn.Linear(50, 50).weight.sum().item() for _ in range(30)]

    expected = [made(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made, range(8))) == expected
