"""What the counter of compilations sees, and says."""

import jax
import numpy as np
import pytest

from orpo_jax import metrics


def test_the_counter_counts_what_is_compiled_inside_and_warns_from_the_second_block_on(monkeypatch):
    lines = []
    monkeypatch.setattr(metrics.log, "warning", lambda text, *args: lines.append(text % args))
    step, counter = jax.jit(lambda x: 3 * x + 1), metrics.CompileCounter()

    def run(size, dtype=np.float32):
        step(np.zeros(size, dtype))

    with counter:
        run(3)
    assert counter.compiled == 1
    with counter:
        run(3)
    run(4)  # outside
    assert counter.compiled == 1 and lines == []
    with counter:
        run(4)
    assert counter.compiled == 1 and lines == []  # known by now
    for i, again in enumerate(((5, np.float32), (5, np.int32))):
        with counter:
            run(*again)
        assert counter.compiled == 2 + i
        assert lines[i:] == [f"step compiled again, {2 + i} programs so far: the shapes or types of its arrays have "
                             "changed"]
    with counter:
        run(5)
    assert len(lines) == 2


def test_the_counter_is_closed_by_an_error():
    step, counter = jax.jit(lambda x: 3 * x + 1), metrics.CompileCounter()
    with pytest.raises(KeyError), counter:
        raise KeyError
    step(np.zeros(7, np.float32))
    assert counter.compiled == 0
