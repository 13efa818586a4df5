"""The block of a plain ViT, for the transformer beside which the Mamba blocks are measured.

Every token attends to every other one, over space and time at once. Names and the two branches of
drop path are those of timm's ViT (Dosovitskiy et al., arXiv 2010.11929), and so is the beginning,
weights N(0, 0.02) and bias 0, unless `linear_init_std` is set.
"""

import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx
from stretchysnake_kernels.dispatch import platform

from stretchysnake_jax.config import ModelConfig
from stretchysnake_jax.models.mamba import linear

NORM_EPS = 1e-6


def choose_implementation(dtype, width: int, mesh) -> str:
    """What `jax.nn.dot_product_attention` is to run; left to itself JAX takes "xla" everywhere.

    Args:
      dtype: of queries, keys and values.
      width: channels of a head.
      mesh: as of the encoder.

    Returns:
      "cudnn" for half precision on a GPU since Ampere, in whose shapes it never holds the (L, L)
      matrix; it can't share out the tokens of a clip. Otherwise "xla".
    """
    # Both: programs are traced here for GPUs that are elsewhere, too, which cuDNN can't be.
    if platform() != "gpu" or jax.default_backend() != "gpu":
        return "xla"
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 8:
        return "xla"  # the second: another maker's, or an older GPU
    spread = mesh is not None and mesh.shape["sequence"] > 1
    fits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
    return "cudnn" if fits and not spread else "xla"


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens; the softmax is float32 whatever the dtype."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        self.heads, std = config.num_heads, config.linear_init_std
        self.qkv = linear(config.dim, 3 * config.dim, std, dtype, rngs, bias=True)
        self.proj = linear(config.dim, config.dim, std, dtype, rngs, bias=True)

    def __call__(self, x, mesh=None, length: int | None = None):
        """Mixes tokens; arguments and result as of `BidirectionalMixer`.

        Where a mesh spreads the tokens, XLA gathers keys and values.
        """
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        mask = None
        if length is not None and length < tokens:  # nobody attends to padding
            mask = (jnp.arange(tokens) < length)[None, None, None]
        implementation = choose_implementation(query.dtype, query.shape[-1], mesh)
        y = jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation=implementation
        )
        return self.proj(y.reshape(batch, tokens, dim))


class Mlp(nnx.Module):
    """fc1 -> GELU -> fc2, each token for itself."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        std = config.linear_init_std
        self.fc1 = linear(config.dim, config.hidden, std, dtype, rngs, bias=True)
        self.fc2 = linear(config.hidden, config.dim, std, dtype, rngs, bias=True)

    def __call__(self, x):
        """(batch, length, dim) -> (batch, length, dim)."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class AttentionBlock(nnx.Module):
    """norm -> attention and norm -> MLP; the residual stream around them belongs to the caller."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        def norm():
            return nnx.LayerNorm(
                config.dim, epsilon=NORM_EPS, dtype=dtype, use_fast_variance=False, rngs=rngs
            )

        self.norm1, self.attn = norm(), Attention(config, dtype, rngs)
        self.norm2, self.mlp = norm(), Mlp(config, dtype, rngs)

    def branches(self, mesh=None, length: int | None = None) -> list:
        """What is added to the residual stream (B, L, dim), in turn; see `videomamba.Block`."""
        attend = functools.partial(self.attn, mesh=mesh, length=length)
        return [lambda x: attend(self.norm1(x)), lambda x: self.mlp(self.norm2(x))]
