"""`load_model`: a Hugging Face folder, a run or a checkpoint as an object with logits, generation and export."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from orpo_jax import checkpoint, generate, head, weights
from orpo_jax.attention import causal_attention
from orpo_jax.config import check
from orpo_jax.families import Architecture, architecture
from orpo_jax.preference import encode_closed
from orpo_jax.pretrained import Pretrained, open_pretrained
from orpo_jax.rundir import BASE_MODEL, checkpoint_folder, read_run


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    pretrained: Pretrained
    arch: Architecture
    graph: nnx.GraphDef
    params: weights.Params
    dtypes: dict[str, str]

    def logits(self, input_ids: Any, decoder_input_ids: Any = None, *, input_lengths: Any = None) -> jax.Array:
        """Returns float32 logits [B, T, V] of right-padded or whole sequences from position 0.

        Of an encoder-decoder they are those of decoder_input_ids, and input_ids are the prompts, each with its length
        in input_lengths [B] where some are padded.
        """
        ids = self._checked(input_ids, "input_ids")
        if not self.arch.encodes:
            check(decoder_input_ids is None and input_lengths is None, "decoder_input_ids, input_lengths",
                  "are an encoder-decoder's", self.arch.config["model_type"])
            self._check_length(ids.shape[1], "input_ids")
            return _logits(self.graph, self.params, ids)
        check(decoder_input_ids is not None, "decoder_input_ids", "must be given to an encoder-decoder", None)
        lengths_B = np.full(len(ids), ids.shape[1]) if input_lengths is None else np.asarray(input_lengths)
        check(lengths_B.shape == (len(ids),), "input_lengths", f"must be [{len(ids)}] numbers", lengths_B.shape)
        decoder_ids = self._checked(decoder_input_ids, "decoder_input_ids")
        check(len(decoder_ids) == len(ids), "decoder_input_ids", f"must have {len(ids)} rows", len(decoder_ids))
        return _decoder_logits(self.graph, self.params, ids, jnp.asarray(lengths_B, jnp.int32), decoder_ids)

    def _checked(self, ids: Any, name: str) -> jax.Array:
        ids_BT = np.asarray(ids)
        check(ids_BT.ndim == 2 and ids_BT.size > 0, name, "must be [B, T] ids", ids_BT.shape)
        self._check_ids(ids_BT.max())
        return jnp.asarray(ids_BT, jnp.int32)

    def _check_ids(self, max_id: int) -> None:
        """JAX would clamp ids past the table in silence."""
        check(max_id < self.arch.spec.vocab_size, "input_ids", f"must be below {self.arch.spec.vocab_size}", max_id)

    def _check_length(self, length: int, name: str) -> None:
        """It would clamp positions past a table of them too."""
        if any(weight.path == "positions" for weight in self.arch.table):
            limit = self.arch.spec.max_positions
            check(length <= limit, name, f"must be at most the model's {limit} positions", length)

    def generate(self, prompts: str | Sequence[Any], *, max_new_tokens: int = 128, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        """Returns a continuation of each prompt: a string, or a list of messages for the chat template."""
        tokenizer = self.pretrained.tokenizer
        texts = [prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True) for prompt in
            ([prompts] if isinstance(prompts, str) else prompts)]
        if not texts:
            return []
        if self.arch.encodes:
            ids = encode_closed(tokenizer, texts)
        else:
            bos = tokenizer.bos_token_id
            encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            ids = [row if bos is None or row[:1] == [bos] else [bos, *row] for row in encoded]
            ids = [row or [self.pretrained.stop_ids[0]] for row in ids]
        self._check_ids(max(map(max, ids)))
        self._check_length(max(map(len, ids)) + max_new_tokens, "prompt and max_new_tokens")
        new = generate.generate(self.graph, self.params, ids,
                                stop_ids=self.pretrained.stop_ids, max_new_tokens=max_new_tokens,
                                temperature=temperature, seed=seed, decoder_start=self.pretrained.decoder_start)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in new]

    def save(self, folder: str | pathlib.Path, *, overwrite: bool = False, card: str | None = None) -> None:
        """Writes a Hugging Face folder: weights under their original names and types, config, tokenizer, template.

        Raises ValueError if the folder exists and `overwrite` does not allow it to be replaced.
        """
        folder = pathlib.Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: must be a folder, got a file; choose another")
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            raise ValueError(f"{folder}: must not exist or be empty, got a folder with files; choose another")
        with weights.whole_folder(folder) as temporary:
            if jax.process_index() == 0:
                dataclasses.replace(self.pretrained, config=dict(self.arch.config)).save(temporary)
                if card is not None:
                    (temporary / "README.md").write_text(card)
            weights.save_params(self.params, self.arch, temporary, self.dtypes)


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, params: weights.Params, ids_BT: jax.Array) -> jax.Array:
    module = nnx.merge(graph, params)
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    with head.precision(module.dtype):
        hidden_BTD, _, _ = module(ids_BT, positions_BT, causal_attention(positions_BT, module.spec.attn_softcap))
        return head.logits(hidden_BTD, *module.unembedding(), softcap=module.spec.logit_softcap)


@functools.partial(jax.jit, static_argnames="graph")
def _decoder_logits(graph: nnx.GraphDef, params: weights.Params, input_ids_BS: jax.Array, lengths_B: jax.Array,
                    ids_BT: jax.Array) -> jax.Array:
    module = nnx.merge(graph, params)
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    with head.precision(module.dtype):
        hidden_BTD = module(input_ids_BS, lengths_B, ids_BT, positions_BT, jnp.full_like(ids_BT, ids_BT.shape[1]))
        return head.logits(hidden_BTD, *module.unembedding())


class Step(NamedTuple):
    run: pathlib.Path
    folder: epath.Path  # of the run's checkpoints
    number: int


def find_step(path: pathlib.Path) -> Step | None:
    """Returns the newest step of a run's folder, or that of RUN/checkpoints/STEP; None for anything else.

    The latter also where the run's checkpoint.folder is another.
    """
    is_step = path.name.isdigit() and path.parent.name == "checkpoints"
    run = path.parent.parent if is_step else path
    config = read_run(run)
    if config is None:
        check(not is_step, str(path), "must be RUN/checkpoints/STEP of a run's folder", str(run))
        return None
    folder = checkpoint_folder(run, config.get("checkpoint", {}).get("folder"))
    number = int(path.name) if is_step else checkpoint.latest_step(folder)
    if number is None:
        raise ValueError(f"{path}: the run has no checkpoint yet")
    if not (folder / str(number)).is_dir():
        raise ValueError(f"{folder / str(number)}: no such checkpoint; give the run's folder for the newest one")
    return Step(run, folder, number)


def load_model(path: str | pathlib.Path, dtype: str = "float32", *, max_length: int | None = None) -> LoadedModel:
    """Returns the model of a Hugging Face folder or hub id, of a run's newest checkpoint, or of a step's folder.

    max_length: the longest sequence to come; it matters only to ropes whose frequencies depend on it (rope.py), and
    defaults to the run's own data.max_length, or to the model's original length.
    """
    found = find_step(pathlib.Path(path).expanduser())
    pretrained = open_pretrained(str(path) if found is None else str(found.run / BASE_MODEL))
    meta = None
    if found is not None:
        meta = checkpoint.read_meta(found.folder, found.number)
        max_length = max_length or meta["config"]["data"]["max_length"]
    arch = architecture(pretrained.config, max_length or 1, pretrained.rows_needed)
    if found is None:
        params = weights.load_params(pretrained.folder, arch, dtype=jnp.dtype(dtype))
        dtypes = weights.tensor_dtypes(pretrained.folder, arch)
    else:
        mesh = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh),
                                weights.abstract_params(arch, jnp.dtype(dtype)))
        with checkpoint.Checkpoints(found.folder) as checkpoints:
            params = checkpoints.restore_params(found.number, abstract)
        assert meta is not None
        dtypes = meta["dtypes"]
    return LoadedModel(pretrained, arch, weights.make_graph(arch), params, dtypes)


def with_dtype(model: LoadedModel, dtype: str | None) -> LoadedModel:
    """Returns the model with `dtype` as the type of every exported weight; None leaves each its own."""
    if dtype is None:
        return model
    config = {name: value for name, value in model.arch.config.items() if name not in ("dtype", "torch_dtype")}
    return dataclasses.replace(model, dtypes=dict.fromkeys(model.dtypes, dtype),
                               arch=dataclasses.replace(model.arch, config={**config, "dtype": dtype}))
