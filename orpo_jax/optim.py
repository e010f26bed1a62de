"""The learning-rate schedules and the optimisers, as functions of `OptimConfig`.

Schedules are those of Hugging Face transformers, optimisers those that its Trainer runs under the same name.
This module does not know which weights decay (the caller's mask says so, from the weight table) nor how
anything is sharded.

Parameters are a nested dict: "layers" (of an encoder-decoder, "encoder_layers" and "decoder_layers") holds
arrays stacked over the layers, [L, ...], every other key a tensor or a dict of them. Shape letters: L
layers, D model, N query heads, H head size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from orpo_jax.adam8bit import scale_by_adam_8bit
from orpo_jax.config import OptimConfig, check


def learning_rate_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns the function from the number of finished steps to the next step's learning rate, a float32 [].

    Source: transformers.optimization.get_scheduler; same names, formulas and keyword arguments.
    """
    peak, name = config.learning_rate, config.lr_scheduler_type
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if name == "constant":  # in HF too this one ignores the warm-up
        warmup = 0
    length = max(1, total_steps - warmup)

    # Below, `step` counts from the end of the warm-up, and results are shares of the peak.

    def linear(step):
        return jnp.maximum(0.0, 1 - step / length)

    def cosine(step, num_cycles=0.5):
        return 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * step / length))

    def cosine_with_restarts(step, num_cycles=1):
        # The remainder before the quotient: whole float32 numbers are exact, so no restart comes a step late.
        progress = num_cycles * step % length / length
        return jnp.where(step < length, 0.5 * (1 + jnp.cos(jnp.pi * progress)), 0.0)

    def polynomial(step, power=1.0, lr_end=1e-7):
        check(lr_end < peak, "optim.lr_scheduler_kwargs", f"lr_end must be below the peak {peak}", lr_end)
        return (peak - lr_end) / peak * linear(step) ** power + lr_end / peak

    def inverse_sqrt(step, timescale=warmup or 10_000):
        return jax.lax.rsqrt(1 + step / timescale)

    def constant(step):
        return jnp.ones_like(step)

    share = {
        "linear": linear,
        "cosine": cosine,
        "cosine_with_restarts": cosine_with_restarts,
        "polynomial": polynomial,
        "inverse_sqrt": inverse_sqrt,
        "constant": constant,
        "constant_with_warmup": constant,
    }[name]

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        after_warmup = share(jnp.maximum(count - warmup, 0), **config.lr_scheduler_kwargs)
        return peak * jnp.where(count < warmup, count / max(1, warmup), after_warmup)

    jax.eval_shape(schedule, 0)  # a wrong argument is an error here, before any weight is read
    return schedule


def per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `transform` with each stack of layers taken as L separate trees, and the rest as it is.

    For statistics of a whole tensor, which would mix the layers of a stacked one. Arrays of the state keep
    the paths of their parameters; those of a stack, the counter too, have a leading axis [L].
    """
    stacked = optax.GradientTransformation(jax.vmap(transform.init), jax.vmap(transform.update))

    def parts(params: Any) -> Any:
        """Each stack is a part of its own: an encoder and a decoder may differ in L."""
        labels = {key: key.removesuffix("layers") + "stacked" if key.endswith("layers") else "single" for key in params}
        transforms: dict[Any, Any] = {label: transform if label == "single" else stacked for label in labels.values()}
        return optax.partition(transforms, labels)

    return optax.GradientTransformation(
        lambda params: parts(params).init(params),
        lambda updates, state, params=None: parts(updates).update(updates, state, params))


def keep_state_dtypes(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `transform` with each new state cast to the types of the old one.

    optax makes moments in the parameters' type but lets float32 gradients widen them, and a step whose state
    changes type compiles twice and can't donate it.
    """

    def update(updates, state, params=None):
        updates, new_state = transform.update(updates, state, params)
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)

    return optax.GradientTransformation(transform.init, update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Returns what scales gradients down to a norm of `limit`, all of them by one factor.

    Source: torch.nn.utils.clip_grad_norm_. One factor for all is a product that fuses into what follows; optax divides
    each gradient, which XLA for CPUs lays down as an array of its own (0.54 GB for SmolLM2-135M).
    """
    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, limit / (optax.global_norm(updates) + 1e-6))
        return jax.tree.map(lambda grad: grad * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def adafactor() -> optax.GradientTransformation:
    """Returns Adafactor's direction, without momentum, for tensors that are not stacked.

    Source: Shazeer and Stern 2018 (arXiv:1804.04235), Algorithms 4 and 5 with beta2_t = 1 - t**-0.8, d = 1,
    eps1 = 1e-30; transformers.optimization.Adafactor as HF's Trainer sets it (neither scale_parameter nor
    relative_step). HF factors the last two axes, optax the two largest: on matrices that is the same.
    """
    return optax.chain(
        # optax's 128 would keep whole second moments of attention weights [D, N, H] with heads of 64.
        # Below 32, as in a narrow adapter, whole moments are small.
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
    )


def make_optimizer(config: OptimConfig, total_steps: int, decay_mask: Any) -> optax.GradientTransformation:
    """Returns the optimiser: `update(grads, state, params)` clips, scales, decays and applies the schedule.

    decay_mask: a tree of bools with the structure of the parameters; True decays. Decay is decoupled:
    w -= learning_rate * (direction + weight_decay * w); for sgd, without momentum, that is torch's too.
    Moments have the structure, shapes and types of the parameters, but for the first one's type (mu_dtype);
    adafactor's factors lack an axis each; adamw_8bit's are codes of 8 bits and a scale for each block of them.
    Sources: adamw, torch.optim.AdamW (arXiv:1711.05101); adamw_8bit, adam8bit.py; lion, arXiv:2302.06675; sgd,
    torch.optim.SGD.
    """
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    mu_dtype = None if config.mu_dtype == "auto" else config.mu_dtype
    direction = {
        "adamw": optax.scale_by_adam(*betas, eps, mu_dtype=mu_dtype),
        "adamw_8bit": per_layer(scale_by_adam_8bit(*betas, eps)),  # of one layer is also what counts as small
        "adafactor": per_layer(adafactor()),
        "lion": optax.scale_by_lion(*betas, mu_dtype=mu_dtype),
        "sgd": optax.identity(),
    }[config.name]
    limit = config.max_grad_norm
    return keep_state_dtypes(
        optax.chain(
            optax.identity() if limit is None else clip_by_global_norm(limit),
            direction,
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
        )
    )
