"""A run's folder: what it may hold, when a command may use it, and how it is started. Never deletes unasked."""

import importlib.util
import json
import pathlib
import shutil
from typing import Any

import fsspec.config
import jax
from etils import epath

from orpo_jax import config as config_lib
from orpo_jax.checkpoint import latest_step, read_meta
from orpo_jax.config import Config
from orpo_jax.pretrained import Pretrained

# The copy of the base model's config and tokenizer, which exports and resumed runs read.
BASE_MODEL = "base_model"
# What a run writes. config.json is deleted last: cut short, the folder still says that it holds a run.
OURS = ("hf", "checkpoints", "metrics.jsonl", "tensorboard", "wandb", "wandb_id", BASE_MODEL, "config.json")


def checkpoint_folder(folder: pathlib.Path, elsewhere: str | None) -> epath.Path:
    """Returns where the checkpoints of a run are; elsewhere: its checkpoint.folder.

    Raises ValueError for a bucket that can't be read because a package is missing.
    """
    if elsewhere is not None and elsewhere.startswith("gs://"):
        if importlib.util.find_spec("gcsfs") is None:
            raise ValueError(f"checkpoint.folder: a bucket needs gcsfs, got {elsewhere!r}; pip install gcsfs")
        # It would answer from what it saw first, and other hosts write there too.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(folder / "checkpoints" if elsewhere is None else elsewhere).expanduser()


def read_run(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config of the run that a folder holds; None if it holds none."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        return saved if "output_dir" in saved and "orpo" in saved else None
    except (OSError, ValueError, TypeError):
        return None


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
    saved = {str(folder): read_run(folder)} if files else {}
    if None in saved.values():
        raise ValueError(f"output_dir: must be empty or hold a run, got {str(folder)!r} with {', '.join(files[:3])}; "
                         "choose another")
    steps = checkpoint_folder(folder, config.checkpoint.folder)
    newest = latest_step(steps)
    # Steps of a folder of their own say themselves whose they are: the disk that output_dir was on may be gone.
    if newest is not None and config.checkpoint.folder is not None:
        saved[str(steps)] = read_meta(steps, newest)["config"]
    if not saved:
        return None, False
    holder = next(iter(saved))
    different = [line for run in saved.values() if run is not None for line in config_lib.differences(config, run)]
    if config.checkpoint.overwrite and (different or not config.checkpoint.resume):
        return None, True
    if different:
        raise ValueError(f"output_dir: {holder} holds a run of another config ({'; '.join(dict.fromkeys(different))}); "
                         "choose another, or delete that run with checkpoint.overwrite=True")
    if not config.checkpoint.resume:
        raise ValueError(f"output_dir: {holder} holds a run, and checkpoint.resume is off; choose another, or delete "
                         "that run with checkpoint.overwrite=True")
    return newest, False


def start_run(folder: pathlib.Path, config: Config, pretrained: Pretrained, *, afresh: bool, replace: bool) -> None:
    """Writes what a run's folder holds from its start, each file or folder whole or absent."""
    if jax.process_index() != 0:
        return
    if replace:
        for name in OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        steps = checkpoint_folder(folder, config.checkpoint.folder)
        for step in steps.iterdir() if steps.is_dir() else []:
            if step.name.isdigit():
                step.rmtree()
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
