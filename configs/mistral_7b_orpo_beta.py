"""Mistral-ORPO-beta 7B (arXiv:2403.07691, section 5): a base model, without a supervised stage before.

    python -m orpo_jax.train --config configs/mistral_7b_orpo_beta.py

Settings of the authors' script (github.com/xfactlab/orpo): 5e-6 with inverse_sqrt and 200 warm-up steps, beta 0.1,
5 epochs, 32 pairs a step on 4 A100. Float32 weights, Adam and gradients take 116 GB over all devices, before
activations. The paper's model scores 7.32 on MT-Bench and 12.20 % on AlpacaEval 2. Not run here: it needs a network and
accelerators.
"""

import pathlib

from orpo_jax import config as config_lib

# The base model has no chat template. This is the one of the authors' script.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "templates" / "zephyr.jinja").read_text()


def get_config():
    config = config_lib.default()
    config.output_dir = "runs/mistral_7b_orpo_beta"
    config.model.path = "mistralai/Mistral-7B-v0.1"
    config.model.remat = "full"
    config.data.train = "argilla/ultrafeedback-binarized-preferences-cleaned"
    config.data.chat_template = CHAT_TEMPLATE
    config.data.max_length = 2048
    config.data.max_prompt_length = 1792
    config.orpo.beta = 0.1
    config.optim.learning_rate = 5e-6
    config.optim.lr_scheduler_type = "inverse_sqrt"
    config.optim.warmup_steps = 200
    config.train.batch_size = 32
    config.train.num_train_epochs = 5.0
    config.checkpoint.save_total_limit = 2
    return config
