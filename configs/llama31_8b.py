"""Llama-3.1-8B with ORPO on UltraFeedback, on a slice of TPUs or eight GPUs.

    python -m orpo_jax.train --config configs/llama31_8b.py

The settings of the paper's Mistral-ORPO-beta (mistral_7b_orpo_beta.py), with 128 pairs to a step: about 60 rows of
2,048 tokens, one for each chip of a v5e-64. Fewer chips take them in micro-batches. Not run here: it needs a network,
the model's licence and accelerators.
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
