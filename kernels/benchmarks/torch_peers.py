"""What the scan and the bidirectional mixer cost in PyTorch eager, without compiled extensions.

Three ways to run the recurrence, all of the same operation
y = (<h, C> + D x) silu(z), h_t = exp(dt A) h_{t-1} + dt x B, dt = softplus(delta + delta_bias):

* `loop`: one fused multiply-add per token over operands split by `unbind`, whose gradient is one
  stack. Its backward is linear in the length; the fastest eager PyTorch found.
* `mambapy`: the parallel scan of the mambapy package (Blelloch, padded to a power of two).
* `mamba_ssm`: the formulation of mamba-ssm's reference, which indexes token by token. For the
  forward only: the gradient of indexing writes a whole array per token, so it is quadratic.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F

Args = dict[str, torch.Tensor]


def prepare(args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns decay exp(dt A) and inflow dt x B, both (batch, length, channels, state)."""
    dt = F.softplus(args["delta"] + args["delta_bias"])
    decay = torch.exp(dt.unsqueeze(-1) * args["A"])
    return decay, (dt * args["x"]).unsqueeze(-1) * args["B"].unsqueeze(2)


def finish(states: torch.Tensor, args: Args) -> torch.Tensor:
    """Reads y (batch, length, channels) from all states (batch, length, channels, state)."""
    y = (states @ args["C"].unsqueeze(-1)).squeeze(-1)
    return (y + args["D"] * args["x"]) * F.silu(args["z"])


def loop_scan(args: Args) -> torch.Tensor:
    decay, inflow = prepare(args)
    state, states = torch.zeros_like(decay[:, 0]), []
    for decay_t, inflow_t in zip(decay.unbind(1), inflow.unbind(1), strict=True):
        state = torch.addcmul(inflow_t, decay_t, state)
        states.append(state)
    return finish(torch.stack(states, 1), args)


def mambapy_scan(args: Args) -> torch.Tensor:
    from mambapy.pscan import pscan  # an optional package

    return finish(pscan(*prepare(args)), args)


def mamba_ssm_scan(args: Args) -> torch.Tensor:
    """Takes tokens last, as that formulation does: x, delta, z, B, C are (batch, width, length)."""
    x, B, C = args["x"], args["B"], args["C"]
    dt = F.softplus(args["delta"] + args["delta_bias"][:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, args["A"]))
    inflow = torch.einsum("bdl,bnl,bdl->bdln", dt, B, x)
    state, outputs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + inflow[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return (torch.stack(outputs, 2) + args["D"][:, None] * x) * F.silu(args["z"])


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to run the scan in PyTorch.

    Attributes:
      name: its name in the table.
      scan: arguments -> y.
      needs: the package it comes from, beside torch.
      tokens_last: whether its arguments are (batch, width, length).
      backward: whether its gradient is worth measuring.
      longest: tokens per video above which one call takes minutes or gigabytes.
    """

    name: str
    scan: Callable[[Args], torch.Tensor]
    needs: str = "torch"
    tokens_last: bool = False
    backward: bool = True
    longest: int = 1 << 20


PEERS = (
    Peer("torch loop", loop_scan),
    Peer("mambapy", mambapy_scan, needs="mambapy", longest=2048),
    Peer("mamba-ssm ref", mamba_ssm_scan, tokens_last=True, backward=False, longest=2048),
)


def to_torch(args, tokens_last: bool = False) -> Args:
    """Copies numpy arrays to tensors that want gradients."""
    tensors = {name: torch.tensor(value) for name, value in args.items()}
    if tokens_last:
        tensors = {
            k: v.transpose(1, 2).contiguous() if v.ndim == 3 else v for k, v in tensors.items()
        }
    return {name: value.requires_grad_() for name, value in tensors.items()}


def forward(function: Callable, *args) -> torch.Tensor:
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
