"""The study's models on Stick Actions-10, each a few fields away from configs/stick_actions.py.

    stretchysnake train --config configs/study/stick.py:static_tokens,detail --workdir runs/x

The argument is MODEL[,SETTING][,quick]. Steps, clips, batch and learning rate are those of
configs/stick_actions.py for all of them; models of one shape begin with the same weights under
the same seed. The temporal table of a flexible model has as many frames as its longest training
clips. `quick` is for tests: a smaller encoder, a tenth of the clips, six steps.
"""

from stretchysnake_configs import stick_actions, stretchy_plus

from stretchysnake_jax.config import METHODS, VARIANTS, Config, ConfigError, nearest

# What the clips of a setting are like. The levels were fixed before methods were compared on them,
# by models of one scale alone, see docs/data.md.
SETTINGS = {
    "base": {},
    "detail": {"data.stick_actions.detail": 3},
    "timing": {"data.stick_actions.timing": 1},
}
MODELS = {variant: {"stretch.variant": variant} for variant in VARIANTS}
# The transformer of equal size, see `config.attention_twin`.
MODELS |= {f"vit_{variant}": MODELS[variant] for variant in ("vanilla", "static_tokens")}
MODELS |= {
    # Fixed scales with more of what a setting asks for: the same 49 tokens of 112 pixels ...
    "vanilla_large": MODELS["vanilla"] | {"model.size": (112, 112), "model.patch": (16, 16)},
    # ... and as many frames as the longest training clips of the flexible models.
    "vanilla_long": MODELS["vanilla"] | {"model.frames": 8},
    # ... and for small budgets: the 9 tokens a frame that a fixed patch makes of 28 pixels.
    "vanilla_small": MODELS["vanilla"] | {"model.size": (24, 24)},
    # As many clips in all as with 8 in every batch (within 3 %): 11 of 2 frames, 5 of 4, 2 of 8.
    "static_tokens_budget": {"data.tokens_per_batch": 1089},
    # Short clips first, which all flexible models have, learns little of timing in its 45 %.
    "static_tokens_even": {"stretch.short_first": 0.0},
    "stretchy_plus": {},  # with scale self-distillation
}
MODELS |= {
    f"static_tokens_{method}": {"stretch.kernel_method": method}
    for method in METHODS
    if method not in ("area", "lanczos3")  # area is what static_tokens has
}
# The spatial table is interpolated where the grid of tokens changes, the temporal one in both.
TABLES = {
    "spatial_grid": ("spatial", "stretch.spatial_method"),
    "static_tokens_time": ("static_tokens", "stretch.temporal_method"),
}
MODELS |= {
    f"{name}_{method}": MODELS[model] | {field: method}
    for name, (model, field) in TABLES.items()
    for method in METHODS
    if method not in ("paper", "lanczos3")  # paper is what both have
}


def get_config(arg: str = "static_tokens") -> Config:
    """`arg` is MODEL[,SETTING][,quick], such as "vanilla_large,detail"."""
    name, *words = (arg or "static_tokens").split(",")
    quick, words = "quick" in words, [word for word in words if word != "quick"]
    setting = words[0] if words else "base"
    for what, known in ((name, MODELS), (setting, SETTINGS), *((w, ("quick",)) for w in words[1:])):
        if what not in known:
            raise ConfigError(f"configs/study/stick.py has no {what!r}: {nearest(what, known)}")
    sheet = stretchy_plus if name == "stretchy_plus" else stick_actions
    config = sheet.get_config("debug" if quick else "")
    config.name = f"study {name}, {setting}"
    if name.startswith("vit_"):
        config.model = stick_actions.get_config("attention").model
    if quick:
        config.model.dim, config.model.depth = 16, 1
    for field, value in (SETTINGS[setting] | MODELS[name]).items():
        *parts, last = field.split(".")
        part = config
        for step in parts:
            part = getattr(part, step)
        setattr(part, last, value)
    if config.stretch.variant != "vanilla":  # as the paper's, 64 for clips of 8 to 64
        config.model.frames = max(config.stretch.frames)
    return config
