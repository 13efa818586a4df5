"""What the doors of all ops share: argument checks and the choice of a backend."""

import contextlib
import contextvars
import difflib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

FLOATS = ("float32", "bfloat16", "float16", "float64")


class Unsupported(NotImplementedError):
    """Raised by a backend before it computes anything: the reason why it cannot take a call."""


_platform = contextvars.ContextVar("platform", default=None)
_preferred = contextvars.ContextVar("preferred", default=())


def platform() -> str:
    """Returns what calls are traced for: "cpu", "gpu" or "tpu"."""
    return _platform.get() or jax.default_backend()


def trace_for(platform: str):
    """While it lasts, calls are traced for a platform other than that of the default device."""
    return setting(_platform, platform)


def prefer(*names: str):
    """While it lasts, calls that name no implementation are traced with the first of `names`.

    An op that has none of them keeps its own order, and what is jitted already its own code.
    """
    return setting(_preferred, names)


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar, value):
    """While it lasts, `variable` has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def check_array(op: str, name: str, value, axes: str, sizes: dict[str, int], dtypes: Sequence[str]):
    """Returns `value` as a JAX array, or raises one sentence that names the argument.

    Args:
      op: name of the operation, for the message.
      name: name of the argument, for the message.
      value: anything with a shape and a dtype.
      axes: what each axis means, such as "batch length channels".
      sizes: the size of each axis known so far; axes met for the first time are added.
      dtypes: names of the dtypes that this argument may have.

    Raises:
      TypeError: `value` is not an array, or has another dtype.
      ValueError: the number of axes, the size of one, or an empty axis.
    """
    takes = f"({', '.join(axes.split())})"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            f"{op}: {name} must be an array of shape {takes}, got {type(value).__name__}"
        )
    value = jnp.asarray(value)
    if value.dtype.name not in dtypes:
        raise TypeError(
            f"{op}: {name} has dtype {value.dtype.name}, takes {' or '.join(dict.fromkeys(dtypes))}"
        )
    known = f"({', '.join(str(sizes.get(axis, axis)) for axis in axes.split())})"
    wanted = takes if known == takes else f"{takes} = {known}"
    if value.ndim != len(axes.split()):
        raise ValueError(f"{op}: {name} has shape {value.shape}, takes {wanted}")
    for axis, size in zip(axes.split(), value.shape, strict=True):
        if size != sizes.setdefault(axis, size):
            raise ValueError(f"{op}: {name} has shape {value.shape}, takes {wanted}")
        if size == 0:
            raise ValueError(
                f"{op}: {name} has shape {value.shape} with an empty {axis} axis, takes {axis} >= 1"
            )
    return value


def call(
    op: str,
    registry: Mapping[str, Callable],
    default_order: Mapping[str, Sequence[str]],
    implementation: str | Sequence[str] | None,
    *args,
    **kwargs,
):
    """Calls the first backend that takes these arguments.

    Args:
      op: name of the operation, for messages.
      registry: backend name -> function. A backend that cannot take a call raises `Unsupported`.
      default_order: platform ("cpu", "gpu", "tpu") -> names tried in order; "cpu" serves unknown
        platforms.
      implementation: None for the platform's default order, one name, or names tried in order.
      *args: passed on.
      **kwargs: passed on.

    Raises:
      TypeError: `implementation` is neither None, a string nor a sequence of strings.
      ValueError: an unknown or empty `implementation`.
      Unsupported: no backend takes the call; the message holds every tried backend's reason.
    """
    if implementation is None:
        names = tuple(name for name in _preferred.get() if name in registry)
        names = names or default_order.get(platform(), default_order["cpu"])
    elif isinstance(implementation, str):
        names = (implementation,)
    elif isinstance(implementation, Sequence) and all(isinstance(n, str) for n in implementation):
        names = tuple(implementation)
    else:
        raise TypeError(
            f"{op}: implementation must be None, a name or a list of names, got {implementation!r}"
        )
    if not names:
        raise ValueError(f"{op}: implementation is an empty list, takes one of {sorted(registry)}")
    for name in names:  # a typo late in the list must not hide behind an earlier success
        if name not in registry:
            near = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)
            raise ValueError(
                f"{op}: unknown implementation {name!r}, takes one of {sorted(registry)}; "
                f"did you mean {near[0]!r}?"
            )
    args = vary_alike(*args)
    reasons = []
    for name in names:
        try:
            return registry[name](*args, **kwargs)
        except Unsupported as reason:
            reasons.append(f"{name}: {reason}")
    raise Unsupported(f"{op}: no implementation takes this call ({'; '.join(reasons)})")


def vary_alike(*values):
    """Returns the values, each varying over every manual mesh axis that one of them varies over.

    `jax.shard_map` with check_vma=True keeps a type for this and wants one type from a loop's carry
    (so that a carry that starts as a constant needs this cast) and from the two sides of a gradient
    rule. The cast moves no data; its transpose sums a gradient over the axes that were added.
    Elsewhere nothing varies, and the values come back as they are. None stays None.
    """
    leaves, tree = jax.tree.flatten(values)
    varying = [jax.typeof(leaf).mat.varying for leaf in leaves]
    axes = frozenset().union(*varying)
    return jax.tree.unflatten(
        tree,
        [
            lax.pcast(leaf, tuple(sorted(axes - own)), to="varying")
            for leaf, own in zip(leaves, varying, strict=True)
        ],
    )


def axis_size(op: str, axis_name: str) -> int:
    """Returns how many shards a mesh axis has, inside `jax.shard_map`.

    Raises:
      ValueError: `axis_name` is no axis of a `jax.shard_map` around the call.
    """
    try:
        return lax.axis_size(axis_name)
    except (NameError, ValueError) as error:
        raise ValueError(
            f"{op}: axis_name is {axis_name!r}, takes an axis of a jax.shard_map around the call"
        ) from error
