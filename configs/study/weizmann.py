"""The study's fine-tuning on Weizmann, from a model of study/stick.py, one subject left out.

    stretchysnake train --config configs/study/weizmann.py:static_tokens --config.data.root=PATH \
        --config.train.init_from=RUN --workdir runs/x

The argument is MODEL[,quick]: encoder and scales are that model's, the rest is
configs/weizmann.py's, with fewer steps. `--config.data.fold=1` to 9 is the subject.
"static_tokens_wide" starts from static_tokens and is fine-tuned, and seen, at the videos' 5:4.
"""

from stretchysnake_configs import weizmann
from stretchysnake_configs.study import stick

from stretchysnake_jax.config import Config

# Models that are made here, and the one of configs/study/stick.py that each starts from.
STARTS = {"static_tokens_wide": "static_tokens"}


def get_config(arg: str = "static_tokens") -> Config:
    """`arg` is MODEL[,quick]."""
    name, *quick = arg.split(",")
    base = stick.get_config(",".join([STARTS.get(name, name), *quick]))
    config = weizmann.get_config("debug" if quick else "")
    config.name = f"study {name}, Weizmann"
    config.model, config.stretch = base.model, base.stretch
    if name == "static_tokens_wide":
        config.stretch.ratios = (1.25,)
    config.stretch.short_first = 0.0  # it is not from scratch
    config.data.dataset = "weizmann_loso"
    config.data.tokens_per_batch = base.data.tokens_per_batch
    config.train.steps = min(config.train.steps, 300)
    return config
