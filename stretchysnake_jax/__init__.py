"""StretchySnake in JAX: video state-space models for any frame count and resolution.

import stretchysnake_jax
model = stretchysnake_jax.load("runs/demo/static_tokens")  # a workdir, a .pth or a .npz file
video = model.read("holiday.mov")     # or any (batch, frames, height, width, 3), uint8
probabilities = model.predict(video)  # (batch, classes)
"""

import typing

if typing.TYPE_CHECKING:
    from stretchysnake_kernels import configure_cpu

    from stretchysnake_jax.model import Model, load

__all__ = ["Model", "configure_cpu", "load"]
__version__ = "0.1.0"


def __getattr__(name):
    # The names below import JAX; `import stretchysnake_jax.config` alone must not.
    if name in ("load", "Model"):
        from stretchysnake_jax import model

        return getattr(model, name)
    if name == "configure_cpu":
        from stretchysnake_kernels import configure_cpu

        return configure_cpu
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
