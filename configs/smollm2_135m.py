"""SmolLM2-135M-Instruct on preference rows of your own: a real model that a laptop's CPU can train.

    python -m orpo_jax.train --config configs/smollm2_135m.py --config.data.train=A.jsonl --config.data.eval=B.jsonl
"""

from orpo_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.output_dir = "runs/smollm2_135m"
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.train = "trl-lib/ultrafeedback_binarized"
    config.data.eval = "trl-lib/ultrafeedback_binarized"
    config.data.max_length = 512
    config.orpo.beta = 0.25
    config.optim.learning_rate = 2e-5
    config.optim.lr_scheduler_type = "cosine"
    config.optim.warmup_steps = 3
    config.train.batch_size = 8
    config.train.max_steps = 24
    config.eval.eval_strategy = "steps"
    config.eval.eval_steps = 24
    config.eval.eval_on_start = True
    config.log.logging_steps = 4
    return config
