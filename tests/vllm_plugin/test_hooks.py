"""Functions put around others: only where these are as they were."""

import asyncio
import inspect

import pytest

from cna_kernels.vllm.hooks import Changed, around


def thing():
    class Thing:
        def work(self, x, y=1):
            return x + y

        async def wait(self, x):
            return x

    return Thing


def test_around_a_method_once():
    Thing = thing()
    for _ in range(2):  # a plug-in may be registered twice
        around(Thing, "work", ["x"], lambda inner, self, x, *rest, **named: 10 * inner(self, x, *rest, **named))
    assert Thing().work(1) == 20 and Thing().work(1, y=4) == 50
    assert list(inspect.signature(Thing.work).parameters) == ["self", "x", "y"]


def test_around_a_coroutine_and_an_object():
    Thing = thing()

    async def twice(inner, self, x):
        return 2 * await inner(self, x)

    around(Thing, "wait", ["x"], twice)
    assert asyncio.run(Thing().wait(3)) == 6
    one, other = Thing(), Thing()
    around(one, "work", ["x", "y"], lambda inner, x, y: -inner(x, y))
    assert one.work(1, 2) == -3 and other.work(1, 2) == 3


@pytest.mark.parametrize(("name", "parameters"), [("absent", []), ("work", ["z"]), ("work", ["x", "y", "z"])])
def test_what_changed_is_an_error_that_names_it(name, parameters):
    Thing = thing()
    before = Thing.__dict__.get(name)
    with pytest.raises(Changed, match=rf"Thing\.{name}"):
        around(Thing, name, parameters, lambda inner, *args: None)
    assert Thing.__dict__.get(name) is before
