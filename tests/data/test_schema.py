"""A schema describes rows without containing them, and two schemas are compared by name."""

from dataclasses import replace

import pytest
import torch

import atoll
from atoll.base.errors import UsageError
from atoll.data.schema import Schema
from atoll.engine.spec import InProcess


@pytest.fixture(scope="module")
def data():
    return atoll.data.load("digits").split(clients=6)


def test_the_text_reads_back_to_an_equal_schema(data):
    schema = Schema.of(data)
    assert Schema.read(schema.text()).values() == schema.values()
    assert Schema.of(schema.without_clients()).digest == schema.digest
    with pytest.raises(UsageError, match="no schema"):
        Schema.read('{"kind": "x"}')


def test_a_difference_is_named(data):
    schema = Schema.of(data)
    other = replace(schema, classes=("0", "1", "two", *schema.classes[3:]))
    assert schema.differs(schema) is None
    assert schema.differs(other) == ("classes[2]", "2", "two")


def test_a_seated_client_keeps_its_id_and_its_rows(data):
    seat = data.seated(3)
    assert seat.sizes.tolist() == [0, 0, 0, int(data.sizes[3])]
    assert torch.equal(seat.client_rows(3), data.client_rows(3))


def test_a_training_without_rows_is_refused_by_an_engine_that_reads_them(data):
    with pytest.raises(UsageError, match="clients of a network") as refused:
        atoll.rounds("softmax", Schema.of(data), atoll.recipes.fedavg(0.1), engine=InProcess())
    assert "split(10)" in refused.value.line


def test_synthetic_rows_have_the_shapes_of_the_schema(data):
    schema = Schema.of(data)
    x, y = schema.synthetic().take(torch.arange(4))
    assert x.shape == (4, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64 and int(y.max()) < 10
