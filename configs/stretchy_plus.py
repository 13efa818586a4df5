"""The recommended recipe: static_tokens with scale self-distillation, on the demo's data and model.

    stretchysnake train --config configs/stretchy_plus.py --workdir runs/plus

It is configs/stick_actions.py (the kernel area-gained, short clips first) with `stretch.distill`:
every clip is loaded at the largest scale, which teaches the one drawn in the same step. A step
therefore costs about three times as much as one of plain static_tokens; a prediction costs the
same. The study, docs/study.md, says what each part is worth.
"""

from stretchysnake_jax.config import Config


def get_config(arg: str = "") -> Config:
    """`arg` is "" or "debug"."""
    from stretchysnake_configs import stick_actions

    if arg not in ("", "debug"):
        raise ValueError(f"unknown argument {arg!r} of configs/stretchy_plus.py: it takes debug")
    config = stick_actions.get_config(arg)
    config.name = "stretchy_plus"
    config.stretch.distill = 1.0
    return config
