"""A buffer of the pool is lent to one tensor at a time, and stays lent while a view of it exists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.compute import buffer_pool
from atoll.compute.buffer_pool import BufferPool, use_pool

sizes = st.integers(1, 64).map(lambda n: n << 10)


@given(st.lists(st.tuples(sizes, st.booleans(), st.booleans()), max_size=60))
def test_no_two_tensors_share_memory(asked):
    own, held = BufferPool(), []
    for size, keep, by_view in asked:
        piece = own.empty(size)
        assert piece.numel() == size
        piece.fill_(len(held))
        if keep:
            held.append(piece[size // 2 :].view(-1) if by_view else piece)
    assert all((piece == number).all() for number, piece in enumerate(held))


def test_a_released_buffer_is_reused():
    own = BufferPool()
    first = own.empty(1 << 20)
    where, view = first.data_ptr(), first.view(torch.float32)[7:]
    del first
    assert own.empty(1 << 20).data_ptr() != where
    del view
    assert own.empty(1 << 20).data_ptr() == where
    assert own.empty(1 << 10).data_ptr() != where  # a much smaller request does not use this buffer


def test_large_tensors_come_from_the_shelf_that_is_there():
    like, own = torch.zeros(1, dtype=torch.float32), BufferPool()
    with use_pool(own):
        large = buffer_pool.empty(like, (3, 1 << 18), torch.float64)
        assert large.shape == (3, 1 << 18) and large.dtype == torch.float64
        where = large.data_ptr()
        del large
        assert buffer_pool.empty(like, (1 << 20,)).data_ptr() == where
        assert buffer_pool.empty(like.to("meta"), (1 << 20,)).is_meta
    assert buffer_pool.empty(like, (1 << 20,)).data_ptr() != where
