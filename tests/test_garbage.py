"""Nothing is collected within the scope, what was made there is old behind it, and the collector is as it was."""

import gc
import weakref

import pytest

from bnext.garbage import without_collection


@pytest.fixture
def collecting():
    yield
    gc.unfreeze()
    gc.enable()


def is_young(thing):
    return any(each is thing for each in gc.get_objects(generation=0))


@pytest.mark.usefixtures("collecting")
@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_rests_within_and_is_as_it_was_behind_it(is_enabled):
    (gc.enable if is_enabled else gc.disable)()

    seen = []

    def fail():
        with without_collection():
            kept = [[]]
            seen.extend([kept, gc.isenabled(), is_young(kept)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    kept, was_enabled, was_young = seen
    assert not was_enabled
    assert was_young
    assert not is_young(kept)
    assert gc.isenabled() is is_enabled


@pytest.mark.usefixtures("collecting")
def test_objects_that_somebody_has_frozen_stay_so():
    gc.freeze()
    number = gc.get_freeze_count()

    with without_collection():
        pass

    assert gc.get_freeze_count() >= number - 5  # but those that nobody refers to any more


@pytest.mark.usefixtures("collecting")
def test_cycles_of_many_blocks_are_collected():
    class Cycle:
        pass

    alive = weakref.WeakSet()
    for _ in range(40):
        with without_collection():
            thing = Cycle()
            thing.itself = thing
            alive.add(thing)
            del thing
    assert len(alive) <= 16
