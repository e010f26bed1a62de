"""The systems that are compared, what a run of one is told, and the clock that is the same for all."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the table. `side` says which file runs it; the other fields are that side's own."""

    side: str  # "jax" or "torch"
    only_gpu: bool = False
    # jax: the layout, "trl" is TRL's own; and whether activations are computed again.
    packing: bool = True
    share_prompt: bool = True
    trl_layout: bool = False
    attention: str = "auto"  # a back end of kernels.py
    # Both sides: whether the backward pass computes activations again (TRL's default on any device).
    recompute: bool = False
    # torch
    liger: bool = False
    grouped: bool = False  # a step's pairs sorted by length before they are cut into micro-batches
    cudnn: bool = False
    compiled: bool = False
    kernels: bool = False  # Liger's norms, rope and gated mlp in the model, beside its loss

    @property
    def needs_gpu(self) -> bool:
        """Whether it runs nowhere else; `only_gpu` leaves out of a CPU's table what would run there too."""
        return self.cudnn or self.kernels or self.attention.startswith("cudnn")


SYSTEMS = {
    "orpo_jax packed+shared": System("jax"),
    "orpo_jax packed": System("jax", share_prompt=False),
    "orpo_jax concatenated": System("jax", packing=False, share_prompt=False),
    "orpo_jax packed+shared, recompute": System("jax", recompute=True, only_gpu=True),
    "orpo_jax packed+shared, cudnn": System("jax", attention="cudnn", only_gpu=True),
    "orpo_jax packed+shared, cudnn_mask": System("jax", attention="cudnn_mask", only_gpu=True),
    "JAX, TRL's layout": System("jax", trl_layout=True),
    "torch TRL": System("torch"),
    "torch TRL, recompute": System("torch", recompute=True, only_gpu=True),
    "torch TRL, grouped": System("torch", grouped=True, only_gpu=True),
    "torch TRL, cuDNN": System("torch", cudnn=True, only_gpu=True),
    "torch TRL, compiled": System("torch", compiled=True, only_gpu=True),
    "torch Liger": System("torch", liger=True),
    "torch Liger, recompute": System("torch", liger=True, recompute=True, only_gpu=True),
    "torch Liger, grouped": System("torch", liger=True, grouped=True, only_gpu=True),
    "torch Liger, grouped, kernels": System("torch", liger=True, grouped=True, kernels=True, only_gpu=True),
    "torch Liger, grouped, compiled": System("torch", liger=True, grouped=True, compiled=True, only_gpu=True),
}
# The first of these that ran says what the loss must be.
REFERENCES = ("torch TRL", "torch TRL, recompute", "orpo_jax concatenated")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every system of a run is told."""

    model: str  # folder in Hugging Face format
    pairs_file: str
    device: str  # "cpu" or "gpu"
    dtype: str  # "float32", or "bfloat16": float32 weights, and matmuls and activations in bfloat16
    pairs: int = 64  # per optimiser step
    micro: int = 8  # pairs of a micro-batch, where the system lays them out as TRL does
    rows: int | str = "auto"  # rows of a micro-batch of orpo_jax
    warmup: int = 1
    steps: int = 3
    count_flops: bool = True
    alive: bool = False  # one process for all rounds, beside those of other systems
    beta: float = 0.1
    learning_rate: float = 1e-6

    @property
    def pairs_taken(self) -> int:
        """How many of the file's pairs the steps take."""
        return (self.warmup + self.steps) * self.pairs


Result = dict[str, Any]


def clock(settings: Settings, first: Callable[[], tuple[float, float]], step: Callable[[int], int],
          peak_memory: Callable[[], int]) -> Iterator[Result]:
    """Yields what happens once, then the times, computed tokens and memory of a round, as often as it is asked.

    first() takes an optimiser step over the first micro-batch and returns its loss and gradient norm; step(i) takes
    the step over all pairs of step i, waits for it, and returns how many positions it computed.
    """
    start = time.perf_counter()
    loss, grad_norm = first()
    compiled = time.perf_counter()
    first()
    compile_seconds = 2 * compiled - start - time.perf_counter()
    yield {"loss": loss, "grad_norm": grad_norm, "compile_seconds": max(0.0, compile_seconds)}
    while True:
        seconds, computed = [], []
        for i in range(settings.warmup + settings.steps):
            start = time.perf_counter()
            computed.append(step(i))
            seconds.append(time.perf_counter() - start)
        yield {"seconds": seconds[settings.warmup:], "computed_tokens": computed[settings.warmup:],
               "peak_bytes": peak_memory()}


def peak_rss() -> int:
    """Returns the most bytes of memory that this process has held (Linux)."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
