"""Seeded synthetic preference pairs with the lengths of real sets, for benchmarks and where no data is at hand.

Numpy only.
"""

import dataclasses

import numpy as np

from orpo_jax.packing import Pair


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """Log-normal lengths in tokens: (mean, sigma) of each part, and how the logs of the two responses correlate."""

    prompt: tuple[float, float]
    chosen: tuple[float, float]
    rejected: tuple[float, float]
    correlation: float

    def __call__(self, rng: np.random.Generator, count: int) -> np.ndarray:
        prompt_z, common, *own = rng.standard_normal((4, count))
        mix = lambda z: self.correlation**0.5 * common + (1 - self.correlation)**0.5 * z
        parts = ((self.prompt, prompt_z), (self.chosen, mix(own[0])), (self.rejected, mix(own[1])))
        return np.stack([mean * np.exp(sigma * z - sigma**2 / 2) for (mean, sigma), z in parts], axis=1)


def long_prompt(rng: np.random.Generator, count: int) -> np.ndarray:
    """Prompts of 1000 and responses of 200 tokens, each within 20 %."""
    return np.array([1000, 200, 200]) * rng.uniform(0.8, 1.2, (count, 3))


SETS = {
    # Like UltraFeedback (binarized), before it is cut.
    "ultrafeedback": LogNormal((180, 1.1), (330, 0.75), (280, 0.85), 0.6),
    # As measured on the harmless-base test split of HH-RLHF with SmolLM2's tokenizer: means, 90th percentiles.
    "hh": LogNormal((149, 0.8), (42, 0.85), (52, 0.85), 0.3),
    "long_prompt": long_prompt,
}
# What TRL cuts pairs to: max_length and max_prompt_length. long_prompt fits the context of any model.
CUTS = {"ultrafeedback": (1024, 512), "hh": (1024, 512), "long_prompt": (2048, 1536)}


def cut(lengths: np.ndarray, max_length: int, max_prompt: int) -> np.ndarray:
    """Returns lengths cut as TRL cuts a pair that is too long: its prompt first, then its responses."""
    prompt, *responses = lengths.T
    over = prompt + np.maximum(*responses) > max_length
    prompt = np.where(over, np.minimum(prompt, max_prompt), prompt)
    over = prompt + np.maximum(*responses) > max_length
    responses = [np.where(over, np.minimum(response, max_length - max_prompt), response) for response in responses]
    return np.stack([prompt, *responses], axis=1)


def draw(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Returns tokens of prompt, chosen and rejected, [count, 3], as long as they come; at least 2 each."""
    return np.maximum(2, np.round(SETS[name](np.random.default_rng(seed), count))).astype(np.int64)


def lengths(name: str, count: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Returns tokens of prompt, chosen and rejected, [count, 3], cut, then scaled; at least 2 each."""
    drawn = cut(SETS[name](np.random.default_rng(seed), count), *CUTS[name])
    return np.maximum(2, np.round(scale * drawn)).astype(np.int64)


def make_pairs(sizes: np.ndarray, vocab_size: int, seed: int = 0) -> list[Pair]:
    """Returns pairs of random ids with these lengths; the responses differ from their first token on."""
    rng = np.random.default_rng([seed, 1])
    made = []
    for prompt, chosen, rejected in sizes:
        ids = rng.integers(0, vocab_size, prompt + chosen + rejected, dtype=np.int32)
        start, end = prompt, prompt + chosen
        if ids[start] == ids[end]:
            ids[end] = (ids[end] + 1) % vocab_size
        made.append(Pair(ids[:end], np.concatenate([ids[:start], ids[end:]]), int(prompt), int(prompt), int(prompt)))
    return made
