"""What the scan and the bidirectional mixer cost in PyTorch eager.

Three ways without compiled extensions to run the recurrence, all of the same operation
y = (<h, C> + D x) silu(z), h_t = exp(dt A) h_{t-1} + dt x B, dt = softplus(delta + delta_bias):

* `loop`: one fused multiply-add per token over operands split by `unbind`, whose gradient is one
  stack. Its backward is linear in the length; the fastest eager PyTorch found.
* `mambapy`: the parallel scan of the mambapy package (Blelloch, padded to a power of two).
* `mamba_ssm`: the formulation of mamba-ssm's reference, which indexes token by token. For the
  forward only: the gradient of indexing writes a whole array per token, so it is quadratic.

They compute in float32 whatever the dtype of the activations, as mamba-ssm's reference does. On a
GPU there is also `mamba_ssm_cuda`, mamba-ssm's own kernel.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

Args = dict[str, torch.Tensor]
TOKENS = ("x", "delta", "B", "C", "z")  # arguments with an axis of tokens


def prepare(args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns decay exp(dt A) and inflow dt x B, both (batch, length, channels, state) float32."""
    args = wide(args)
    dt = F.softplus(args["delta"] + args["delta_bias"])
    decay = torch.exp(dt.unsqueeze(-1) * args["A"])
    return decay, (dt * args["x"]).unsqueeze(-1) * args["B"].unsqueeze(2)


def wide(args: Args) -> Args:
    """Returns the arguments in float32."""
    return {name: value.float() for name, value in args.items()}


def finish(states: torch.Tensor, args: Args) -> torch.Tensor:
    """Reads y (batch, length, channels) from all states (batch, length, channels, state)."""
    dtype, args = args["x"].dtype, wide(args)
    y = (states @ args["C"].unsqueeze(-1)).squeeze(-1)
    return ((y + args["D"] * args["x"]) * F.silu(args["z"])).to(dtype)


def loop_scan(args: Args) -> torch.Tensor:
    """(batch, length, channels); one step per token."""
    decay, inflow = prepare(args)
    state, states = torch.zeros_like(decay[:, 0]), []
    for decay_t, inflow_t in zip(decay.unbind(1), inflow.unbind(1), strict=True):
        state = torch.addcmul(inflow_t, decay_t, state)
        states.append(state)
    return finish(torch.stack(states, 1), args)


def mambapy_scan(args: Args) -> torch.Tensor:
    """(batch, length, channels); mambapy's parallel scan."""
    from mambapy.pscan import pscan  # an optional package

    return finish(pscan(*prepare(args)), args)


def mamba_ssm_scan(args: Args) -> torch.Tensor:
    """Takes tokens last, as that formulation does: x, delta, z, B, C are (batch, width, length)."""
    dtype, args = args["x"].dtype, wide(args)
    x, B, C = args["x"], args["B"], args["C"]
    dt = F.softplus(args["delta"] + args["delta_bias"][:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, args["A"]))
    inflow = torch.einsum("bdl,bnl,bdl->bdln", dt, B, x)
    state, outputs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + inflow[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    y = (torch.stack(outputs, 2) + args["D"][:, None] * x) * F.silu(args["z"])
    return y.to(dtype)


def mamba_ssm_cuda_scan(args: Args) -> torch.Tensor:
    """Takes tokens last, too."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # an optional package

    values = [args[name] for name in ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    return selective_scan_fn(*values, delta_softplus=True)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to run the scan in PyTorch.

    Attributes:
      name: its name in the table.
      scan: arguments -> y.
      needs: the module it comes from.
      tokens_last: whether its arguments are (batch, width, length).
      backward: whether its gradient is worth measuring.
      longest: tokens per video above which one call takes minutes or gigabytes.
      only: "cuda" for what does not run on the CPU, else None.
    """

    name: str
    scan: Callable[[Args], torch.Tensor]
    needs: str = "torch"
    tokens_last: bool = False
    backward: bool = True
    longest: int = 1 << 20
    only: str | None = None


PEERS = (
    Peer("torch loop", loop_scan),
    Peer("mambapy", mambapy_scan, needs="mambapy", longest=2048),
    Peer("mamba-ssm ref", mamba_ssm_scan, tokens_last=True, backward=False, longest=2048),
    Peer(
        "mamba-ssm CUDA",
        mamba_ssm_cuda_scan,
        needs="mamba_ssm.ops.selective_scan_interface",
        tokens_last=True,
        only="cuda",
    ),
)


def to_tensor(value: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """Copies a numpy array; PyTorch does not read those of bfloat16."""
    dtype = getattr(torch, str(value.dtype))
    return torch.tensor(np.asarray(value, np.float32)).to(device, dtype)


def to_numpy(y: torch.Tensor) -> np.ndarray:
    """Copies a tensor to a numpy array of float32."""
    return y.detach().float().cpu().numpy()


def to_torch(args, tokens_last: bool = False, device: str = "cpu") -> Args:
    """Copies numpy arrays to tensors that want gradients.

    With `tokens_last`, (..., length, width) becomes (..., width, length).
    """
    tensors = {name: to_tensor(value, device) for name, value in args.items()}
    if tokens_last:
        tensors = {
            k: v.transpose(-1, -2).contiguous() if k in TOKENS else v for k, v in tensors.items()
        }
    return {name: value.requires_grad_() for name, value in tensors.items()}


def scan(peer_scan: Callable, args: Args) -> torch.Tensor:
    """The scan of one direction."""
    return peer_scan(args)


def both_directions(peer_scan: Callable, args: Args, axis: int = 1) -> torch.Tensor:
    """The sum of two scans, the second one from the last token to the first, with flipped copies.

    Args:
      peer_scan: of one direction.
      args: all but z with a leading axis of two.
      axis: that of the tokens, in one direction's arguments.
    """
    ways = [{name: v if name == "z" else v[i] for name, v in args.items()} for i in range(2)]
    ways[1] |= {name: ways[1][name].flip(axis) for name in TOKENS}
    return peer_scan(ways[0]) + peer_scan(ways[1]).flip(axis)


def block(peer_scan: Callable, args: Args) -> torch.Tensor:
    """A block of the model, its input `u` among the arguments."""
    return mixer(args, args["u"], peer_scan)


def on_gpu(compute: Callable[[], torch.Tensor], sample_seconds: float, name: str, say):
    """Makes a sample of calls on the GPU that Python does not hold up: a CUDA graph, replayed.

    Args:
      compute: the call.
      sample_seconds: how long a sample should take.
      name: for the message.
      say: is told where the call cannot be captured; it is then launched from Python.

    Returns:
      (calls, run): `run` makes so many calls, waits, and returns the last one's tensor.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a graph is captured on a stream of its own, after warm-ups
        for _ in range(3):
            result = compute()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    replay = compute
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = compute()

        def replay():
            graph.replay()
            return result

    except RuntimeError as error:
        torch.cuda.synchronize()
        say(f"{name}: launched from Python, no CUDA graph ({str(error).splitlines()[0]}).")
    start = time.perf_counter()
    replay()
    torch.cuda.synchronize()
    calls = max(1, min(1000, round(sample_seconds / (time.perf_counter() - start))))

    def run():
        for _ in range(calls):
            y = replay()
        torch.cuda.synchronize()
        return y

    return calls, run


def forward(function: Callable, *args) -> torch.Tensor:
    """Returns function(*args) without what a gradient would need."""
    with torch.no_grad():
        return function(*args)


def forward_and_back(function: Callable, args: Args, d_y: torch.Tensor, *more):
    """Returns y and the gradients of all `args`."""
    y = function(args, *more)
    return y, dict(zip(args, torch.autograd.grad(y, list(args.values()), d_y), strict=True))


def saved_bytes(function: Callable, *args) -> int:
    """Returns the bytes that autograd keeps between forward and backward: a lower bound of its use.

    The arguments themselves do not count, and arrays that share memory count once.
    """
    own = {t.untyped_storage().data_ptr() for a in args if isinstance(a, dict) for t in a.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(*args)
    total = sum(storage.nbytes() for storage in kept.values())
    del y
    return total


def mixer(params: Args, u: torch.Tensor, scan: Callable[[Args], torch.Tensor]) -> torch.Tensor:
    """The block of `mixer.py` in PyTorch: norm, bidirectional mixer, residual."""
    normed = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-5) * params["norm"]
    x, z = (normed @ params["in_proj"]).chunk(2, -1)
    rank, state = params["dt_proj_f"].shape[0], params["A_log_f"].shape[1]
    total = 0
    for way in "fb":
        x_way, z_way = (x, z) if way == "f" else (x.flip(1), z.flip(1))
        weight = params["conv_" + way].T.unsqueeze(1)  # (channels, 1, width)
        taps = F.pad(x_way.transpose(1, 2), (weight.shape[-1] - 1, 0))
        v = F.silu(F.conv1d(taps, weight, params["conv_bias_" + way], groups=weight.shape[0]))
        v = v.transpose(1, 2)
        low, B, C = (v @ params["x_proj_" + way]).split([rank, state, state], -1)
        y = scan(
            {
                "x": v,
                "delta": low @ params["dt_proj_" + way],
                "A": -torch.exp(params["A_log_" + way]),
                "B": B,
                "C": C,
                "D": params["D_" + way],
                "z": z_way,
                "delta_bias": params["dt_bias_" + way],
            }
        )
        total = total + (y if way == "f" else y.flip(1))
    return u + total @ params["out_proj"]
