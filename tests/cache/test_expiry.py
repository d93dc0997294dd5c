from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from encoder_svc.cache.expiry import ExpiryQueue

TIMES = st.integers(0, 20)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.sampled_from("abcde"), TIMES),
        st.tuples(st.just("discard"), st.sampled_from("abcde"), st.none()),
        st.tuples(st.just("pop"), st.none(), TIMES),
    ),
    max_size=60,
)


def test_an_empty_queue_has_nothing_due() -> None:
    queue = ExpiryQueue()
    assert (len(queue), queue.next_s, queue.pop_due(1e9)) == (0, None, [])


@given(STEPS)
def test_it_is_a_dict_that_is_searched_for_its_least(steps) -> None:
    queue = ExpiryQueue()
    model: dict[str, int] = {}
    for what, key, time_s in steps:
        if what == "extend":
            model[key] = max(model.get(key, 0), time_s)
            assert queue.extend(key, time_s) == model[key]
        elif what == "discard":
            model.pop(key, None)
            queue.discard(key)
        else:
            due = [key for _, key in sorted((at_s, key) for key, at_s in model.items() if at_s <= time_s)]
            assert queue.pop_due(time_s) == due
            for key in due:
                del model[key]
        assert len(queue) == len(model)
        assert queue.next_s == min(model.values(), default=None)


def test_memory_stays_in_proportion_to_the_keys() -> None:
    queue = ExpiryQueue()
    queue.extend("first", 0.5)  # stays at the top, so that nothing stale surfaces
    for time_s in range(1, 10_000):
        queue.extend("hot", time_s)
        queue.extend(f"released {time_s}", time_s)
        queue.discard(f"released {time_s}")
    assert len(queue) == 2
    assert len(queue._heap) < 50
    assert queue.pop_due(9_999) == ["first", "hot"]
