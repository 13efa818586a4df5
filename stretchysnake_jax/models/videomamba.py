"""The VideoMamba encoder, read top to bottom: tokens, blocks, pooling, head.

With `model.blocks = "attention"` its blocks are those of a plain ViT; all else stays as it is.

The encoder knows nothing about scales: grid, patch and frame count follow from the shapes of the
parameters it is given (`interpolation.interpolate` fits them) and of the video.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from stretchysnake_kernels.dispatch import platform

from stretchysnake_jax.config import ModelConfig, check_blocks
from stretchysnake_jax.models.attention import AttentionBlock
from stretchysnake_jax.models.mamba import BidirectionalMixer, linear, uniform
from stretchysnake_jax.sharding import TOKENS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORM_EPS = 1e-5
# Of `train.remat`: "block" keeps a block's input alone; "matmuls" what its projections gave, too.
POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def normalise(video, how: str, valid=None):
    """Turns pixels into the encoder's input.

    Args:
      video: uint8 (batch, frames, height, width, 3), RGB.
      how: "imagenet": scaled to [0, 1], minus ImageNet's mean, over its standard deviation.
        "clip": minus the clip's own mean of each channel, over its own deviation (plus 3 grey
        levels, so that a flat clip stays flat).
      valid: bool (height, width), which pixels are the clip's; None: all.

    Returns:
      float32, the same shape.
    """
    video = video.astype(jnp.float32)
    if how == "imagenet":
        return (video / 255 - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
    if valid is not None:
        valid = valid[..., None]
    video = video - video.mean((1, 2, 3), keepdims=True, where=valid)
    return video / (jnp.sqrt((video**2).mean((1, 2, 3), keepdims=True, where=valid)) + 3.0)


def drop_path(x, rate, key):
    """Stochastic depth: zeroes samples of x (B, ...) with chance `rate`, scales the others."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), jnp.zeros((), x.dtype))


class PatchEmbed(nnx.Module):
    """Cuts a video into patches and projects each: a 3-D convolution with stride = kernel."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        shape = (config.tubelet, *config.patch, 3)
        bound = (config.tubelet * config.patch[0] * config.patch[1] * 3) ** -0.5
        self.dtype = dtype
        self.kernel = nnx.Param(uniform(bound)(rngs.params(), (*shape, config.dim)))
        self.bias = nnx.Param(uniform(bound)(rngs.params(), (config.dim,)))

    def __call__(self, video):
        """(B, T, H, W, 3) -> (B, T', rows, columns, dim); pixels that fill no patch are dropped."""
        kernel = self.kernel[...]
        tubelet, ph, pw, _, dim = kernel.shape
        b, t, h, w, _ = video.shape
        t, h, w = t // tubelet, h // ph, w // pw
        video = video[:, : t * tubelet, : h * ph, : w * pw].astype(self.dtype)
        # Reshape and matmul: on CPU several times faster than a convolution, elsewhere the same.
        patches = video.reshape(b, t, tubelet, h, ph, w, pw, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        tokens = patches.reshape(b * t * h * w, -1) @ kernel.reshape(-1, dim).astype(self.dtype)
        return tokens.reshape(b, t, h, w, dim) + self.bias[...].astype(self.dtype)


class PosEmbed(nnx.Module):
    """The spatial table: grid (rows, columns, dim), and the class token's own row (dim,)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        draw = jax.nn.initializers.normal(config.pos_init_std)
        self.cls = nnx.Param(draw(rngs.params(), (config.dim,)))
        self.grid = nnx.Param(draw(rngs.params(), (*config.grid, config.dim)))


class Block(nnx.Module):
    """norm -> mixer; the residual stream around it belongs to the caller."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(config.dim, epsilon=NORM_EPS, dtype=dtype, rngs=rngs)
        self.mixer = BidirectionalMixer(config, dtype, rngs)

    def __call__(self, residual, mesh=None, length=None):
        """(B, L, dim) float32 -> (B, L, dim), what is added to it; `mesh` as of the mixer."""
        return self.mixer(self.norm(residual), mesh, length)

    def branches(self, mesh=None, length=None) -> list:
        """What is added to the residual stream, in turn: functions (B, L, dim) -> (B, L, dim)."""
        return [functools.partial(self, mesh=mesh, length=length)]


BLOCKS = {"mamba": Block, "attention": AttentionBlock}  # by `model.blocks`


class VideoMamba(nnx.Module):
    """The encoder; `models.init` is the way to make one.

    Args:
      config: its shape.
      dtype: of the computation; parameters, the residual stream and scan states stay float32.
      rngs: for the initial weights.
      mesh: the devices that batch and tokens are spread over; None: one device.
      remat: what the gradient computes again instead of keeping it, one of `config.REMAT`.
      layers: how the compiled program runs the blocks, one of `config.LAYERS`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype,
        rngs: nnx.Rngs,
        mesh=None,
        remat="none",
        layers="auto",
    ):
        check_blocks(config)
        self.config = config
        self.mesh, self.remat = mesh, remat
        # Unrolled layers run 20 to 60 % faster on CPU; elsewhere compile time decides. And XLA for
        # CPUs undoes recomputation that is not in a loop.
        faster = platform() == "cpu" and remat == "none"
        self.unrolled = faster if layers == "auto" else layers == "unrolled"
        self.patch_embed = PatchEmbed(config, dtype, rngs)
        self.cls_token = nnx.Param(jnp.zeros((config.dim,)))
        self.pos_embed = PosEmbed(config, rngs)
        if config.frames is not None:
            draw = jax.nn.initializers.normal(config.temporal_init_std)
            shape = (config.frames // config.tubelet, config.dim)
            self.temporal_pos_embed = nnx.Param(draw(rngs.params(), shape))

        # All blocks as one, parameters stacked along a leading axis: a handful of leaves.
        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap
        def stack(rngs):
            return BLOCKS[config.blocks](config, dtype, rngs)

        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(config.dim, epsilon=NORM_EPS, dtype=dtype, rngs=rngs)
        self.head = linear(config.dim, config.num_classes, 0.02, dtype, rngs, bias=True)

    def embed(self, video):
        """Tokens (B, 1 + T' rows columns, dim) float32: the class token, then frame by frame.

        tokens[0] = cls + P_cls; tokens[1 + t N + i] = patch(t, i) + P[i] + Q[t].
        """
        x = self.patch_embed(video).astype(jnp.float32)  # (B, T', rows, columns, dim)
        grid = self.pos_embed.grid[...]
        if x.shape[2:4] != grid.shape[:2]:
            raise ValueError(
                f"the video gives a grid of {x.shape[2]}x{x.shape[3]} patches but the spatial "
                f"table has {grid.shape[0]}x{grid.shape[1]}: interpolate the weights to its size"
            )
        x = x + grid
        if self.config.frames is not None:
            temporal = self.temporal_pos_embed[...]
            if x.shape[1] != temporal.shape[0]:
                raise ValueError(
                    f"the video gives {x.shape[1]} time steps but the temporal table has "
                    f"{temporal.shape[0]}: interpolate the weights to the video's frame count"
                )
            x = x + temporal[:, None, None]
        first = jnp.broadcast_to(
            self.cls_token[...] + self.pos_embed.cls[...], (x.shape[0], 1, x.shape[-1])
        )
        return jnp.concatenate([first, x.reshape(x.shape[0], -1, x.shape[-1])], axis=1)

    def encode(self, tokens, key=None):
        """Runs the blocks on tokens (B, L, dim) float32; returns the residual stream.

        Args:
          key: for drop path; None switches it off.
        """
        depth, rate = self.config.depth, self.config.drop_path
        graph, stacked = nnx.split(self.layers)
        rates = jnp.linspace(0.0, rate, depth)
        dropping = key is not None and rate > 0
        keys = jax.random.split(key, depth) if dropping else jnp.zeros((depth, 0))
        length = tokens.shape[1]

        def step(residual, layer):
            params, rate, key = layer
            if self.mesh is not None:
                spread = NamedSharding(self.mesh, TOKENS)
                residual = lax.with_sharding_constraint(residual, spread)
            branches = nnx.merge(graph, params).branches(self.mesh, length)
            keys = [key] * len(branches)
            if dropping and len(branches) > 1:
                keys = jax.random.split(key, len(branches))
            for branch, key in zip(branches, keys, strict=True):
                hidden = branch(residual)
                if dropping:
                    hidden = drop_path(hidden, rate, key)
                residual = residual + hidden.astype(jnp.float32)
            return residual, None

        if self.mesh is not None:  # every device gets as many tokens
            spare = -length % self.mesh.shape["sequence"]
            tokens = jnp.pad(tokens, ((0, 0), (0, spare), (0, 0)))
        if self.remat != "none":
            policy, prevent = POLICIES[self.remat], self.unrolled
            step = jax.checkpoint(step, policy=policy, prevent_cse=prevent)
        if self.unrolled:
            leaves, tree = jax.tree.flatten(stacked)
            split = [lax.split(leaf, (1,) * depth) for leaf in leaves]
            for i in range(depth):
                params = jax.tree.unflatten(tree, [parts[i][0] for parts in split])
                tokens, _ = step(tokens, (params, rates[i], keys[i]))
        else:
            tokens, _ = lax.scan(step, tokens, (stacked, rates, keys))
        return tokens[:, :length]

    def __call__(self, video, key=None, output: str = "logits"):
        """Encodes a normalised video.

        Args:
          video: float (B, T, H, W, 3), of the scale that the parameters are fitted to.
          key: for drop path in training; None at test.
          output: "logits" (B, num_classes), "features" (B, dim) or "tokens" (B, L, dim), both after
            the final norm. Features are the class token, or with mean pooling the mean token.

        Returns:
          float32.
        """
        x = self.encode(self.embed(video), key)
        if output == "tokens":
            return self.norm(x).astype(jnp.float32)
        x = x[:, 0] if self.config.pooling == "cls" else x.mean(1)
        x = self.norm(x)
        if output == "features":
            return x.astype(jnp.float32)
        if output != "logits":
            raise ValueError(f"output is {output!r}: it takes 'logits', 'features' or 'tokens'")
        return self.head(x).astype(jnp.float32)
