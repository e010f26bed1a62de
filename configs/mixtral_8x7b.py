"""Mixtral-8x7B with ORPO on UltraFeedback, on a slice of TPUs.

    python -m orpo_jax.train --config configs/mixtral_8x7b.py

The settings of the paper's Mistral-ORPO-beta (mistral_7b_orpo_beta.py), with 128 pairs to a step: about 60 rows of
2,048 tokens, of which a v5p-64 takes 32 at a time. Not run here: it needs a network and accelerators. GB (10^9 bytes)
on each chip, by the tables that

    python -m orpo_jax.compile --config configs/mixtral_8x7b.py --topology TOPOLOGY

prints (jax 0.10.2; gradients by arithmetic, activations the rest of the compiler's peak):

    slice    topology   chips  parameters  optimiser  gradients  activations  total      of
    v5p-64   v5p:2x4x4     32        5.84      11.68       5.84        10.74  34.10  102.80

Attention is the TPU's kernel, splash (15 calls of kernels in all).
"""

import pathlib

from orpo_jax import config as config_lib

# The base model has no chat template.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "templates" / "zephyr.jinja").read_text()


def get_config():
    config = config_lib.default()
    config.output_dir = "runs/mixtral_8x7b"
    config.model.path = "mistralai/Mixtral-8x7B-v0.1"
    config.model.remat = "full"
    config.mesh.expert = 8
    config.data.train = "argilla/ultrafeedback-binarized-preferences-cleaned"
    config.data.chat_template = CHAT_TEMPLATE
    config.data.row_length = 2048
    config.optim.learning_rate = 5e-6
    config.optim.lr_scheduler_type = "inverse_sqrt"
    config.optim.warmup_steps = 200
    config.train.batch_size = 128
    config.train.rows_per_device = 1
    config.train.num_train_epochs = 5.0
    config.checkpoint.save_total_limit = 2
    return config
