"""Qwen2-0.5B-Instruct on UltraFeedback: the example of TRL's ORPO documentation.

    python -m orpo_jax.train --config configs/qwen2_0p5b_ultrafeedback.py

About 62,000 pairs, 3 epochs, 64 pairs a step (TRL: 8 a device on 8 devices). TRL's page says about 30 minutes on 8 GPUs
and rising rewards/margins. Not run here: it needs a network and an accelerator.
"""

from orpo_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.output_dir = "runs/qwen2_0p5b_ultrafeedback"
    config.model.path = "Qwen/Qwen2-0.5B-Instruct"
    config.data.train = "trl-lib/ultrafeedback_binarized"
    config.data.eval = "trl-lib/ultrafeedback_binarized"
    config.train.batch_size = 64
    config.eval.eval_strategy = "epoch"
    config.eval.batch_size = 64
    config.checkpoint.save_total_limit = 2
    return config
