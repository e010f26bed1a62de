"""Held-out metrics: exact means over every pair, whatever the batch size."""

import time
from collections.abc import Callable
from typing import Any

import jax

from orpo_jax import loss
from orpo_jax.batching import Batches, to_devices
from orpo_jax.metrics import Progress, add_sums


def evaluate(eval_step: Any, params: Any, batches: Batches, mesh: jax.sharding.Mesh, *, beta: float,
             name: str | None, stopped: Callable[[], bool]) -> dict[str, float] | None:
    """Returns `eval_METRIC`, or `eval_NAME_METRIC`, of one held-out set, with the time it took in seconds.

    None where `stopped`, asked before each batch, said so.
    """
    began, parts, prefix = time.monotonic(), [], "eval_" if name is None else f"eval_{name}_"
    with Progress(f"evaluating {name or ''}".strip(), batches.steps_per_epoch) as progress:
        for step in range(batches.steps_per_epoch):
            if stopped():
                return None
            parts.append(eval_step(params, to_devices(batches.batch(step)[0], mesh)))
            progress.advance()
    values = loss.metrics(add_sums(jax.device_get(parts)), beta=beta)
    return {f"{prefix}{key}": value for key, value in values.items()} | {
        f"{prefix}runtime": time.monotonic() - began}
