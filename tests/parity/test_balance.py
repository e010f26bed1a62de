"""The balance of experts against PyTorch, at a coefficient of 1: with TRL's usual 0.001 no error would be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from trial import Trial

from orpo_jax import weights
from orpo_jax.families import nest

torch = pytest.importorskip("torch", reason="torch is the reference: a CPU build is at hand on Python 3.11 only")
transformers = pytest.importorskip("transformers")

BETA = 0.3


def torch_step(folder, pairs):
    """Returns aux_loss, the loss and its gradients by the names of files, of TRL's concatenated batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    sequences = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    prompts = torch.tensor([pair.chosen_prompt for pair in pairs] + [pair.rejected_prompt for pair in pairs])
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(np.array(ids)).long() for ids in sequences], batch_first=True)
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    out = model(ids, attention_mask=mask.long(), output_router_logits=True)
    logps = torch.log_softmax(out.logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    target = torch.arange(1, ids.shape[1])[None]
    response = (target >= prompts[:, None]) & mask[:, 1:]
    mean = (logps * response).sum(1) / response.sum(1)
    odds = mean - torch.log1p(-torch.exp(mean))
    chosen, rejected = odds.chunk(2)
    nll = -(logps * mask[:, 1:])[:len(pairs)].sum() / mask[:len(pairs), 1:].sum()
    loss = nll - BETA * torch.nn.functional.logsigmoid(chosen - rejected).mean() + out.aux_loss
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(folder / "gradients")
    return float(out.aux_loss), float(loss), load_file(folder / "gradients" / "model.safetensors")


def test_aux_loss_and_every_gradient(tmp_path):
    folder = tiny.skew_routers(tiny.write_model(tmp_path, scale=0.1, **tiny.EXPERTS))
    trial = Trial(folder, coef=1.0, beta=BETA)
    aux, loss, expected = torch_step(folder, list(Trial(folder).pairs))
    assert aux > 2.2  # balanced experts would make it 2
    for layout in (dict(packing=True), dict(packing=False, share_prompt=False, row_length=128, rows_per_device=8)):
        metrics, gradients, _, _ = trial.step(**layout)
        assert abs(metrics["aux_loss"] - aux) <= 1e-5 * aux
        assert abs(metrics["loss"] - loss) <= 1e-5 * loss
        got = dict(weights.hf_tensors(jax.tree.map(jnp.asarray, nest(gradients)), trial.arch))
        for name, grad in expected.items():
            tolerance = 1e-5 if "block_sparse_moe.gate" in name else 1e-4
            assert np.linalg.norm(got[name] - grad) <= tolerance * np.linalg.norm(grad), name
