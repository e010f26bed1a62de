"""A run or a checkpoint to a Hugging Face folder:

    python -m orpo_jax.convert --checkpoint RUN_OR_STEP_DIR --output DIR [--dtype bfloat16]
"""

import argparse
import pathlib

from orpo_jax import api, checkpoint
from orpo_jax.card import model_card
from orpo_jax.config import main_errors
from orpo_jax.metrics import log, set_up_logging


def convert(source: str, output: str, dtype: str | None = None) -> None:
    """Writes `output`; raises ValueError if it exists with files in it, or if `source` holds no checkpoint."""
    found = api.find_step(pathlib.Path(source))
    if found is None:
        raise ValueError(f"--checkpoint: must be a run's folder or one of its checkpoints/STEP, got {source!r}")
    meta = checkpoint.read_meta(found.folder, found.number)
    model = api.load_model(source, meta["config"]["model"]["param_dtype"])
    model = api.with_dtype(model, dtype)
    model.save(output, card=model_card(meta["config"], meta["data"], meta["optimizer"], found.number, meta["metrics"],
                                        meta["counts"]))
    log.info("step %d of %s is in %s", found.number, found.run, output)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m orpo_jax.convert", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or its checkpoints/STEP")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="type of every weight; the base model's own types if left out")
    parsed = parser.parse_args(args)
    set_up_logging()
    convert(parsed.checkpoint, parsed.output, parsed.dtype)


if __name__ == "__main__":
    main_errors(main)
