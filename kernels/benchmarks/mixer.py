"""One block of the model, bare: norm, bidirectional Mamba mixer, residual, as functions of a dict.

It holds what the benchmark's "block" rows time beside the same block in PyTorch. The model's own
mixer is in stretchysnake_jax.models.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from stretchysnake_kernels import causal_conv1d, selective_scan


def make_params(width: int, channels: int, state: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws parameters of both directions ("_f", "_b"), float32; matrices are (in, out)."""
    rng, rank = np.random.default_rng(seed), -(-width // 16)

    def matrix(fan_in, fan_out):
        return rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)

    params = {
        "norm": np.ones(width),
        "in_proj": matrix(width, 2 * channels),
        "out_proj": matrix(channels, width),
    }
    for way in "fb":
        params |= {
            f"conv_{way}": matrix(4, channels),
            f"conv_bias_{way}": np.zeros(channels),
            f"x_proj_{way}": matrix(channels, rank + 2 * state),
            f"dt_proj_{way}": matrix(rank, channels),
            f"dt_bias_{way}": rng.uniform(-5, -1, size=channels),
            f"A_log_{way}": np.log(np.tile(np.arange(1.0, state + 1), (channels, 1))),
            f"D_{way}": np.ones(channels),
        }
    return {name: value.astype(np.float32) for name, value in params.items()}


def mixer(params: dict[str, jax.Array], u: jax.Array) -> jax.Array:
    """(batch, length, width) -> (batch, length, width)."""
    normed = u * lax.rsqrt(jnp.mean(jnp.square(u), -1, keepdims=True) + 1e-5) * params["norm"]
    x, z = jnp.split(normed @ params["in_proj"], 2, -1)
    rank, state = params["dt_proj_f"].shape[0], params["A_log_f"].shape[1]
    total = 0
    for way in "fb":
        v = causal_conv1d(
            x,
            params["conv_" + way],
            params["conv_bias_" + way],
            activation="silu",
            reverse=way == "b",
        )
        low, B, C = jnp.split(v @ params["x_proj_" + way], (rank, rank + state), -1)
        total += selective_scan(
            v,
            low @ params["dt_proj_" + way],
            -jnp.exp(params["A_log_" + way]),
            B,
            C,
            params["D_" + way],
            z,
            params["dt_bias_" + way],
            delta_softplus=True,
            reverse=way == "b",
        )
    return u + total @ params["out_proj"]
