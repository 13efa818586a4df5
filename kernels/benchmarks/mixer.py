"""One block of the model, bare: norm, bidirectional Mamba mixer, residual, as functions of a dict.

It holds what the benchmark's "block" rows time beside the same block in PyTorch. The model's own
mixer is in stretchysnake_jax.models.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from stretchysnake_kernels import bidirectional_causal_conv1d, bidirectional_selective_scan


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


def mixer(params: dict[str, jax.Array], u: jax.Array, implementation=None) -> jax.Array:
    """(batch, length, width) -> (batch, length, width); `implementation`: of the scan."""
    normed = u * lax.rsqrt(jnp.mean(jnp.square(u), -1, keepdims=True) + 1e-5) * params["norm"]
    x, z = jnp.split(normed @ params["in_proj"], 2, -1)
    rank, state = params["dt_proj_f"].shape[0], params["A_log_f"].shape[1]

    def both(name):
        return jnp.stack([params[name + "_f"], params[name + "_b"]])

    x = bidirectional_causal_conv1d(x, both("conv"), both("conv_bias"), activation="silu")
    low, B, C = jnp.split(
        jnp.einsum("gblc,gcr->gblr", x, both("x_proj")), (rank, rank + state), axis=-1
    )
    y = bidirectional_selective_scan(
        x,
        jnp.einsum("gblr,grc->gblc", low, both("dt_proj")),
        -jnp.exp(both("A_log")),
        B,
        C,
        both("D"),
        z,
        both("dt_bias"),
        delta_softplus=True,
        implementation=implementation,
    )
    return u + y @ params["out_proj"]
