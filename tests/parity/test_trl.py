"""Step by step against TRL's own trainer (1.16, trl.experimental.orpo), on CPU in float32."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from orpo_jax import config as config_lib
from orpo_jax import train

torch = pytest.importorskip("torch", reason="torch is the reference: a CPU build is at hand on Python 3.11 only")
pytest.importorskip("trl", reason="TRL is the reference: it needs torch")

STEPS, PAIRS, BETA, LEARNING_RATE = 12, 4, 0.25, 1e-3
# All that the two share but logits/*: TRL's count prompts and padding.
METRICS = ("loss", "grad_norm", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
           "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def run_trl(folder, rows, output, auto="AutoModelForCausalLM", **changes):
    """Returns TRL's log lines and the trained weights."""
    import datasets
    import transformers
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class InFileOrder(ORPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = ORPOConfig(
        output_dir=str(output), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", beta=BETA, max_grad_norm=1.0, max_length=128, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, **changes)
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = InFileOrder(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows),
                          processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(output / "hf")  # files have other names for experts than the model has in memory
    return ([line for line in trainer.state.log_history if "grad_norm" in line],
            load_file(output / "hf" / "model.safetensors"))


def run_ours(folder, rows, output, **changes):
    """Returns our log lines and the trained weights, by their HF names."""
    config = {
        "output_dir": str(output), "model": {"path": str(folder)},
        "data": {"shuffle": False, "max_length": 128},
        "orpo": {"beta": BETA},
        "optim": {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"},
        "train": {"batch_size": PAIRS, "max_steps": STEPS}, "mesh": {"fsdp": 1, "data": 1},
        "log": {"logging_steps": 1},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    train.run(config_lib.build(config), train_rows=rows)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(output / "hf" / "model.safetensors")


def assert_close_metrics(got, expected, step):
    # The log odds nearly cancel: their difference keeps the rounding of log-probabilities, eight of float32's units.
    rounding = {"log_odds_chosen": 1e-6 * max(abs(expected["logps/chosen"]), abs(expected["logps/rejected"]))}
    for name in METRICS:
        a, b = got[name], expected[name]
        tolerance = max(1e-4 * max(abs(b), 1e-2), rounding.get(name, 0.0))
        assert abs(a - b) <= tolerance, f"step {step}: {name} is {a}, TRL has {b}"


@pytest.mark.parametrize(("kind", "model"), [
    *((kind, {}) for kind in ("standard", "implicit", "conversational", "conversational_implicit")),
    ("standard", {**tiny.EXPERTS, "router_aux_loss_coef": 0.1}),
], ids=["standard", "implicit", "conversational", "conversational_implicit", "experts"])
def test_twelve_steps(tmp_path, one_device, kind, model):
    # Weights of 0.1, near to HF's initial 0.02: with larger ones log odds of about 1 cancel to means of 1e-3, of which
    # float32 leaves too few digits to compare.
    folder = tiny.write_model(tmp_path / "model", scale=0.1, **model)
    rows = tiny.make_rows(STEPS * PAIRS, kind)
    expected, reference = run_trl(folder, rows, tmp_path / "trl")
    assert_same_run(folder, (expected, reference), run_ours(folder, rows, tmp_path / "ours"))


def assert_same_run(folder, theirs, ours):
    (expected, reference), (got, weights) = theirs, ours
    assert len(got) == len(expected) == STEPS
    for step in range(STEPS):
        assert_close_metrics(got[step], expected[step], step + 1)
    assert weights.keys() == reference.keys()
    before = load_file(folder / "model.safetensors")
    for name, b in reference.items():
        assert np.linalg.norm(b - before[name]) > 1e-3 * np.linalg.norm(b), f"{name} did not move"
        error = np.linalg.norm(weights[name] - b) / np.linalg.norm(b)
        assert error <= 5e-5, f"{name} differs by {error}"
