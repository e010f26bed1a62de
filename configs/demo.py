"""A small Llama learns to be courteous, on any computer and with no download.

    python -m orpo_jax.train --config configs/demo.py

Two CPU cores, about two minutes. The model is random at first, and its tokenizer is made from the rows of
configs/demo_data: 480 pairs to train on and 120 held out, about other subjects, in which the chosen answer is courteous
and the rejected one curt. Held-out rewards/accuracies goes from about 0.5 to above 0.9; runs/demo/hf is the model.
"""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orpo_jax import config as config_lib
from orpo_jax import hosts, weights
from orpo_jax.families import architecture

DATA = pathlib.Path(__file__).parent / "demo_data"
MODEL = pathlib.Path("runs/demo_model")

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1536, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
    "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of the training rows' text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=LLAMA["vocab_size"], special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def texts():
    for line in (DATA / "train.jsonl").read_text().splitlines():
        for value in json.loads(line).values():
            yield from [value] if isinstance(value, str) else (message["content"] for message in value)


def make_model(folder: pathlib.Path) -> None:
    """Writes the random model in Hugging Face format, whole or not at all."""
    arch = architecture(LLAMA, 1)
    with weights.whole_folder(folder) as temporary:
        make_tokenizer().save_pretrained(temporary)
        (temporary / "config.json").write_text(json.dumps(LLAMA, indent=2))
        weights.save_params(weights.random_params(arch, seed=0), arch, temporary, {})


def get_config():
    hosts.told_by_first(lambda: MODEL.is_dir() or make_model(MODEL))
    config = config_lib.default()
    config.output_dir = "runs/demo"
    config.model.path = str(MODEL)
    config.data.train = str(DATA / "train.jsonl")
    config.data.eval = str(DATA / "heldout.jsonl")
    config.data.max_length = 256
    config.orpo.beta = 0.5
    config.optim.learning_rate = 2e-3
    config.optim.lr_scheduler_type = "cosine"
    config.optim.warmup_steps = 10
    config.train.batch_size = 8
    config.train.num_train_epochs = 7.0
    config.eval.eval_strategy = "steps"
    config.eval.eval_steps = 210
    config.eval.eval_on_start = True
    config.eval.batch_size = 16
    config.eval.generate.num_samples = 2
    config.eval.generate.max_new_tokens = 40
    config.checkpoint.save_steps = 100
    config.log.logging_steps = 20
    config.checkpoint.save_total_limit = 2
    return config
