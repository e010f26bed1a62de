"""ORPO preference optimisation in JAX: Hugging Face models in, Hugging Face models out.

Shape suffixes, everywhere: B rows, T query tokens, S key tokens (pair slots in loss and packing), D model, N query
heads, K key/value heads, H head size, F mlp, V vocabulary, L layers, P pairs, M micro-batches. The same letters in
lower case are the axes of the weight tables (tables.py) and of the sharding rules (sharding.py).
"""

from orpo_jax.api import load_model
from orpo_jax.loss import orpo_loss

__all__ = ["load_model", "orpo_loss"]
__version__ = "0.1.0"
