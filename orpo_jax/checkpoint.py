"""Checkpoints of a run: whole or absent. Orbax writes each to a temporary name in the background, then renames it."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from orpo_jax.config import CheckpointConfig


class Checkpoints:
    """The steps of `RUN/checkpoints`. Each holds the train state, and `meta`: plain values such as the config."""

    def __init__(self, folder: pathlib.Path, config: CheckpointConfig | None = None):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.save_total_limit if config else None, create=config is not None,
            cleanup_tmp_directories=config is not None)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to save; returns once the arrays may be given away."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(step, args=args, force=True)

    def read_meta(self, step: int) -> dict[str, Any]:
        return self._restore(step, meta=ocp.args.JsonRestore()).meta

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Returns the state of a step, laid out like `abstract_state`; ValueError where the step is broken."""
        return self._restore(step, state=ocp.args.StandardRestore(abstract_state)).state

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Returns the parameters alone."""
        args = ocp.args.PyTreeRestore(
            item={"params": abstract_params}, partial_restore=True,
            restore_args={"params": jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), abstract_params)})
        try:
            path = self.folder / str(step) / "state"
            return ocp.PyTreeCheckpointer().restore(path, args=args)["params"]
        except (MemoryError, PermissionError):
            raise
        except Exception as error:
            raise self._broken(step, error) from error

    def _restore(self, step: int, **args: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # a broken file surfaces as any of orbax's, tensorstore's or json's errors
            raise self._broken(step, error) from error

    def _broken(self, step: int, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())[:160]
        return ValueError(f"{self.folder / str(step)}: the checkpoint can't be read ({reason}); if its files are "
                          "damaged, move this folder away to go on from the one before")

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def latest_step(folder: pathlib.Path) -> int | None:
    """Returns the newest whole checkpoint of a `checkpoints` folder; None if there is none, or no such folder."""
    if not folder.is_dir():
        return None
    with Checkpoints(folder) as checkpoints:
        return checkpoints.manager.latest_step()


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns what was saved beside a step's arrays."""
    with Checkpoints(folder) as checkpoints:
        return checkpoints.read_meta(step)
