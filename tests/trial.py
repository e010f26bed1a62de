"""One model and one set of pairs, stepped under any layout: what tests of the whole step compare."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from orpo_jax import batching, data, loss, pretrained, sharding, weights
from orpo_jax import config as config_lib
from orpo_jax import step as step_lib
from orpo_jax.families import architecture, flatten

PAIRS = 24

# Its state is the last gradient. Weights after a step of Adam would say less: the step divides each gradient by its own
# size, so that one entry which is zero but for rounding moves a whole tensor by more than 1e-5.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads))


class Trial:
    """One model and one set of pairs, stepped under any layout."""

    def __init__(self, folder, rows=None, coef=0.0, **orpo):
        base = pretrained.open_pretrained(str(folder))
        self.folder, self.orpo = folder, config_lib.OrpoConfig(**{"beta": 0.3, **orpo})
        self.data_config = config_lib.DataConfig(train="rows", max_length=64, shuffle=False)
        rows = rows or [row for kind in ("standard", "conversational") for row in tiny.make_rows(PAIRS // 2, kind)]
        self.pairs, _ = data.load_pairs(data.from_rows(rows, "rows"), base, self.data_config)
        self.pairs.tail = int(coef > 0)
        self.arch, self.coef = architecture(base.config, 64), coef

    def step(self, mesh_sizes=(1,), *, rows_per_device=1, steps=1, remat="none", unroll=False, optimizer=None,
             chunks=None, dtype=jnp.float32, **data_changes):
        """Returns the metrics of the last step, its gradients, the jitted step and its number of micro-batches.

        With another optimizer than KEEP_GRADIENTS it returns the weights after the last step, not the gradients.
        """
        count = int(np.prod(mesh_sizes))
        mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh_sizes, strict=False)), jax.devices()[:count])
        config = dataclasses.replace(self.data_config, **data_changes)
        layout = batching.make_layout(self.pairs, config, PAIRS, rows_per_device, sharding.num_shards(mesh), "cpu",
                                  nll_scope=self.orpo.nll_scope)
        batches = batching.Batches(self.pairs, layout, PAIRS, self.orpo, None)
        keep = optimizer is None
        optimizer = optimizer or KEEP_GRADIENTS
        with jax.set_mesh(mesh):
            abstract = weights.abstract_params(self.arch, jnp.float32, mesh)
            shardings = step_lib.state_shardings(abstract, optimizer, mesh)
            params = weights.load_params(self.folder, self.arch, mesh=mesh)
            state = step_lib.initial_state(params, optimizer, shardings)
            model = dataclasses.replace(step_lib.make_model(
                self.arch, layout, dtype, self.orpo.beta, router_aux_loss_coef=self.coef, unroll=unroll), remat=remat)
            if chunks:
                model = dataclasses.replace(model, head_settings=model.head_settings._replace(chunks=chunks))
            train_step = step_lib.make_train_step(
                model, optimizer, lambda step: 0.0, shardings)
            for step in range(steps):
                batch, _ = batches.batch(step)
                state, sums, grad_norm, _ = train_step(state, batching.to_devices(batch, mesh))
        sums = {name: float(value) for name, value in sums.items()}
        metrics = {**loss.metrics(sums, beta=self.orpo.beta), "grad_norm": float(grad_norm)}
        num_micro = sum(int(group.num_micro) for group in batch.groups)
        return metrics, flatten(jax.device_get(state.opt_state if keep else state.params)), train_step, num_micro


def assert_same(got, expected):
    """Metrics within 1e-5, and each tensor's gradient within 1e-5 of its norm, but for tensors with next to none."""
    for name, value in expected[0].items():
        assert abs(got[0][name] - value) <= 1e-5 * max(abs(value), 1e-1), name
    norm = optax.global_norm(expected[1])
    for name, value in expected[1].items():
        if np.linalg.norm(value) > 1e-6 * norm:
            error = np.linalg.norm(got[1][name] - value) / np.linalg.norm(value)
            assert error <= 1e-5, f"{name} differs by {error}"
