"""A run's folder: what it may hold, when a command may use it, and how it is started. Never deletes unasked."""

import json
import pathlib
import shutil

import jax

from orpo_jax import config as config_lib
from orpo_jax.checkpoint import latest_step
from orpo_jax.config import Config
from orpo_jax.pretrained import Pretrained

# The copy of the base model's config and tokenizer, which exports and resumed runs read.
BASE_MODEL = "base_model"
# What a run writes. config.json is deleted last: cut short, the folder still says that it holds a run.
OURS = ("hf", "checkpoints", "metrics.jsonl", "tensorboard", "wandb", "wandb_id", BASE_MODEL, "config.json")


def open_run(folder: pathlib.Path, config: Config) -> tuple[int | None, bool]:
    """Returns the step of the newest checkpoint to go on from, or None to start afresh, and whether `start_run` is to
    delete what the folder holds.

    Raises ValueError for a folder that holds anything but a run of this config, unless `checkpoint.overwrite` says
    that another run may be deleted.
    """
    # A process that was killed while it wrote a file may have left its temporary name.
    files = [file.name for file in folder.iterdir() if file.suffix != ".tmp"] if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: must be a folder, got the file {str(folder)!r}; choose another")
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"output_dir: must not lie below a file, got {str(folder)!r}; choose another")
    if not files:
        return None, False
    file = folder / "config.json"
    try:
        saved = json.loads(file.read_text())
        assert "output_dir" in saved and "orpo" in saved
    except (OSError, ValueError, AssertionError, TypeError):
        raise ValueError(f"output_dir: must be empty or hold a run, got {str(folder)!r} with {', '.join(files[:3])}; "
                         "choose another") from None
    different = config_lib.differences(config, saved)
    if config.checkpoint.overwrite and (different or not config.checkpoint.resume):
        return None, True
    if different:
        raise ValueError(f"output_dir: {folder} holds a run of another config ({'; '.join(different)}); choose "
                         "another, or delete that run with checkpoint.overwrite=True")
    if not config.checkpoint.resume:
        raise ValueError(f"output_dir: {folder} holds a run, and checkpoint.resume is off; choose another, or delete "
                         "that run with checkpoint.overwrite=True")
    return latest_step(folder / "checkpoints"), False


def start_run(folder: pathlib.Path, config: Config, pretrained: Pretrained, *, afresh: bool, replace: bool) -> None:
    """Writes what a run's folder holds from its start, each file or folder whole or absent."""
    if jax.process_index() != 0:
        return
    if replace:
        for name in OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(config_lib.to_dict(config), indent=2) + "\n")
    temporary.rename(folder / "config.json")
    if afresh and (folder / BASE_MODEL).is_dir():  # of a run that was killed before its first checkpoint
        shutil.rmtree(folder / BASE_MODEL)
    if not (folder / BASE_MODEL).is_dir():
        copy = folder / f"{BASE_MODEL}.tmp"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        pretrained.save(copy)
        copy.rename(folder / BASE_MODEL)
