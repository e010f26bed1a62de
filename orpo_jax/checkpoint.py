"""Checkpoints of a run: whole or absent. Orbax writes each to a temporary name in the background, then renames it."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from orpo_jax.config import CheckpointConfig


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False: JAX's preemption service wants to be asked in one order, and hosts.Stop asks it."""
        return False


class Checkpoints:
    """The steps of a run's folder of checkpoints, on a disk or in a bucket.

    Each holds the train state, and `meta`: plain values such as the config.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig | None = None):
        folder = epath.Path(folder)
        # `absolute` would make the local path "CWD/gs:/bucket" of gs://bucket, which is absolute already.
        self.folder = folder if folder.is_absolute() else folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.save_total_limit if config else None, create=config is not None,
            cleanup_tmp_directories=config is not None)
        self.manager = _Manager(self.folder, options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to save; returns once the arrays may be given away."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Returns the state of a step, laid out like `abstract_state`; ValueError where the step is broken."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        with _whole(self.folder / str(step)):
            return self.manager.restore(step, args=args)["state"]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Returns the parameters alone."""
        args = ocp.args.PyTreeRestore(
            item={"params": abstract_params}, partial_restore=True,
            restore_args={"params": jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), abstract_params)})
        path = self.folder / str(step)
        with _whole(path):
            return ocp.PyTreeCheckpointer().restore(path / "state", args=args)["params"]

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextlib.contextmanager
def _whole(path: epath.Path) -> Iterator[None]:
    """Turns what a damaged step raises, any of orbax's, tensorstore's or json's errors, into a ValueError."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path}: the checkpoint can't be read ({reason}); if its files are damaged, move this folder "
                         "away to go on from the one before") from error


# These two do not ask other processes, as orbax's manager would.


def latest_step(folder: epath.PathLike) -> int | None:
    """Returns the newest whole checkpoint of a folder; None if there is none, or no such folder."""
    folder = epath.Path(folder)
    steps = ocp.utils.checkpoint_steps_paths(folder) if folder.is_dir() else []
    return max((int(path.name) for path in steps if path.name.isdigit()), default=None)


def read_meta(folder: epath.PathLike, step: int) -> dict[str, Any]:
    """Returns what was saved beside a step's arrays; ValueError where it is broken."""
    path = epath.Path(folder) / str(step)
    with _whole(path):
        return json.loads((path / "meta" / "metadata").read_text())
