"""Llama-3.1-70B with ORPO on UltraFeedback, on a slice of TPUs.

    python -m orpo_jax.train --config configs/llama31_70b.py

The settings of the paper's Mistral-ORPO-beta (mistral_7b_orpo_beta.py), with 128 pairs to a step: about 60 rows of
2,048 tokens, of which the 16 groups of four chips of a v5p-128 take one each at a time. Not run here: it needs a
network, the model's licence and accelerators. GB (10^9 bytes) on each chip, by the tables that

    python -m orpo_jax.compile --config configs/llama31_70b.py --topology TOPOLOGY

prints (jax 0.10.2; gradients by arithmetic, activations the rest of the compiler's peak):

    slice     topology   chips  parameters  optimiser  gradients  activations  total      of
    v5p-128   v5p:4x4x4     64        4.41       8.82       4.41         8.68  26.32  102.80

Attention is the TPU's kernel (4 calls).
"""

import pathlib

from orpo_jax import config as config_lib

# The base model has no chat template.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "templates" / "zephyr.jinja").read_text()


def get_config():
    config = config_lib.default()
    config.output_dir = "runs/llama31_70b"
    config.model.path = "meta-llama/Llama-3.1-70B"
    config.model.remat = "full"
    config.mesh.tensor = 4
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
