"""Checkpoints of a run: parameters, optimiser state, and the progress that belongs to them.

Orbax writes each into a folder of its own that appears whole or not at all. All of Orbax that the
project uses is in this file.
"""

import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from stretchysnake_jax.config import ConfigError

FOLDER = "checkpoints"
BEST_BY = "val_top1"


def _abstract(tree):
    # Where to put what is read: like the array at hand, or on the first device for a bare shape.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def describe(x):
        sharding = getattr(x, "sharding", None) or here
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
      workdir: of the run; they lie in its folder `checkpoints`.
      keep: newest ones kept; the best by validation top-1 is kept beside them.
      write: for the run itself. A reader must not clean up what a run is just writing.

    Raises:
      ConfigError: a reader finds no folder of checkpoints.
    """

    def __init__(self, workdir, keep: int = 3, write: bool = True):
        folder = pathlib.Path(workdir).absolute() / FOLDER
        if not write and not folder.is_dir():
            raise ConfigError(f"{workdir} holds no checkpoint: train first")
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda m: m[BEST_BY], n=1, keep_checkpoints_without_metrics=False
        )
        self._orbax = ocp.training.Checkpointer(
            folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=write,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(c.step for c in self._orbax.checkpoints)

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint by validation top-1, if any was validated."""
        rated = [c for c in self._orbax.checkpoints if c.metrics and BEST_BY in c.metrics]
        return max(rated, key=lambda c: (c.metrics[BEST_BY], c.step)).step if rated else None

    def save(self, state: dict, progress: dict, metrics: dict | None = None) -> None:
        """Saves, in the background, a training state.

        Args:
          state: params, opt_state, step.
          progress: plain JSON: elapsed seconds, unreadable clips.
          metrics: of a validation at this step.
        """
        step = int(state["step"])
        if step in self.steps:
            return
        self._orbax.save_checkpointables_async(
            step,
            {"params": state["params"], "rest": {k: state[k] for k in ("opt_state", "step")}},
            force=True,  # the training loop alone decides when
            metrics=metrics,
            custom_metadata=progress,
        )

    def restore(self, state: dict, step: int | None = None) -> tuple[dict, dict]:
        """Reads a training state.

        Args:
          state: one of the same shapes.
          step: which; the newest if None.

        Returns:
          (state, progress) as saved.
        """
        step = self.steps[-1] if step is None else step
        rest = {k: state[k] for k in ("opt_state", "step")}
        wanted = {"params": _abstract(state["params"]), "rest": _abstract(rest)}
        found = self._orbax.load_checkpointables(step, wanted)
        progress = self._orbax.checkpointables_metadata(step).custom_metadata
        return {"params": found["params"], **found["rest"]}, progress

    def restore_params(self, params, which: str = "latest") -> tuple[dict, int]:
        """Reads the parameters alone.

        Args:
          params: a pytree of the same shapes (abstract will do).
          which: "latest", "best" or a step.

        Returns:
          (params, step).

        Raises:
          ConfigError: there is no such checkpoint.
        """
        steps = self.steps
        if not steps:
            raise ConfigError(f"{self._orbax.directory} holds no checkpoint: train first")
        step = {"latest": steps[-1], "best": self.best}.get(which, which)
        if step is None:
            raise ConfigError(
                f"no checkpoint of {self._orbax.directory} was validated: take 'latest'"
            )
        if not str(step).isdigit() or int(step) not in steps:
            raise ConfigError(
                f"checkpoint {which!r} doesn't exist: it takes latest, best, "
                + ", ".join(map(str, steps))
            )
        found = self._orbax.load_checkpointables(int(step), {"params": _abstract(params)})
        return found["params"], int(step)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._orbax.wait()

    def close(self) -> None:
        """Waits, and gives back the resources."""
        self._orbax.close()
