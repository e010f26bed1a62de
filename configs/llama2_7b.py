"""Llama-2 7B with ORPO on UltraFeedback (arXiv:2403.07691, appendix C).

    python -m orpo_jax.train --config configs/llama2_7b.py

The paper's settings: at most 8e-6 with a linear warm-up and cosine decay, beta 0.2, 10 epochs (the authors keep the
epoch of the lowest held-out loss). It does not state the batch size or the warm-up: 32 pairs and 200 steps are those of
the authors' Mistral script. Float32 weights, Adam and gradients take 108 GB over all devices, before activations. The
paper's model scores 81.26 % on AlpacaEval 1 and 9.44 % on AlpacaEval 2. Not run here: it needs a network, the model's
licence and accelerators.
"""

import pathlib

from orpo_jax import config as config_lib

# The base model has no chat template. This is the one of the authors' script.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "templates" / "zephyr.jinja").read_text()


def get_config():
    config = config_lib.default()
    config.output_dir = "runs/llama2_7b"
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.model.remat = "full"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.train_split = "train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.eval_split = "test_prefs"
    config.data.chat_template = CHAT_TEMPLATE
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.orpo.beta = 0.2
    config.optim.learning_rate = 8e-6
    config.optim.lr_scheduler_type = "cosine"
    config.optim.warmup_steps = 200
    config.train.batch_size = 32
    config.train.num_train_epochs = 10.0
    config.eval.eval_strategy = "epoch"
    config.eval.batch_size = 32
    config.checkpoint.save_total_limit = 2
    return config
