"""Llama-3.1-8B with ORPO on UltraFeedback, on a slice of TPUs or eight GPUs.

    python -m orpo_jax.train --config configs/llama31_8b.py

The settings of the paper's Mistral-ORPO-beta (mistral_7b_orpo_beta.py), with 128 pairs to a step: about 60 rows of
2,048 tokens, one for each chip of a v5e-64, while fewer chips take them in turns. Not run here: it needs a network,
the model's licence and accelerators. GB (10^9 bytes) on each chip, by the tables that

    python -m orpo_jax.compile --config configs/llama31_8b.py --topology TOPOLOGY

prints (jax 0.10.2; gradients by arithmetic, activations the rest of the compiler's peak):

    slice                    topology   chips  parameters  optimiser  gradients  activations  total      of
    v5e-64                   v5e:8x8       64        0.50       1.00       0.50         5.08   7.09   16.91
    v5p-16                   v5p:2x2x2      8        4.02       8.03       4.02         6.99  23.05  102.80
    v6e-16                   v6e:4x4       16        2.01       4.02       2.01         6.21  14.24   33.55
    8 x H100, by arithmetic                 8        4.02       8.03       4.02         9.54  25.60   80.00

Attention is the TPU's kernel in each of the programs (4 calls). On GPUs set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, since
JAX takes 75 % of a GPU by itself.
"""

import pathlib

from orpo_jax import config as config_lib

# The base model has no chat template.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "templates" / "zephyr.jinja").read_text()


def get_config():
    config = config_lib.default()
    config.output_dir = "runs/llama31_8b"
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.model.remat = "full"
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
