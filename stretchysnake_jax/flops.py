"""Operations of a forward pass, counted from the shapes.

One multiply-add is one operation, as in the tables of VideoMamba and most of the field. Two counts:
  published: patch embedding, in_proj, out_proj and head: what a counter that can't see inside the
    fused scan finds, and so the "GFLOPs" of the VideoMamba and StretchySnake papers.
  full: these, and both directions' convolutions, x_proj and dt_proj, and 9 operations per scan
    element (batch, length, channel, state) and direction.
Attention hides nothing: both counts hold its projections, its MLP and the two products QK^T and PV.
"""

from stretchysnake_jax.buckets import Bucket
from stretchysnake_jax.config import ModelConfig


def count(model: ModelConfig, bucket: Bucket) -> dict[str, float]:
    """Operations for one clip.

    Args:
      model: the encoder.
      bucket: the scale.

    Returns:
      {"published": operations, "full": operations}.
    """
    length = bucket.tokens(model.tubelet)
    patch = (length - 1) * 3 * model.tubelet * bucket.patch[0] * bucket.patch[1] * model.dim
    head = model.dim * model.num_classes
    if model.blocks == "attention":
        linear = length * model.dim * (4 * model.dim + 2 * model.hidden)  # qkv, proj; fc1, fc2
        products = 2 * length**2 * model.dim
        total = float(patch + head + model.depth * (linear + products))
        return {"published": total, "full": total}
    projections = (
        length * 3 * model.dim * model.inner
    )  # in_proj dim -> 2 inner, out_proj inner -> dim
    conv = length * model.inner * model.conv_width
    x_proj = length * model.inner * (model.rank + 2 * model.state)
    dt_proj = length * model.rank * model.inner
    scan = 9 * length * model.inner * model.state
    published = patch + head + model.depth * projections
    full = published + model.depth * 2 * (conv + x_proj + dt_proj + scan)
    return {"published": float(published), "full": float(full)}
