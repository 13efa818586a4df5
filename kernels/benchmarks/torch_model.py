"""VideoMamba and its training step in plain PyTorch eager, for `stretchysnake bench step`.

The same architecture and parameters as the library's, under the names of the released PyTorch code,
so `load_state_dict` takes what `stretchysnake convert` writes. Every part is the fastest that eager
PyTorch has on a CPU: the scan is `torch_peers.loop_scan`, linear in the length; the short
convolution is a grouped `conv1d`, the patch embedding a `Conv3d`, AdamW the fused one.
"""

import torch
from stretchysnake_bench.torch_peers import loop_scan
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# Parameters without weight decay beside those that end in ".bias", as in the library.
NOT_DECAYED = ("D", "D_b", "cls_token", "pos_embed", "temporal_pos_embedding")


def normalise(video: torch.Tensor, how: str) -> torch.Tensor:
    """Turns uint8 (B, T, H, W, 3) into float32; `how`: "imagenet" or "clip" (by its own)."""
    video = video.float()
    if how == "imagenet":
        return (video / 255 - video.new_tensor(MEAN)) / video.new_tensor(STD)
    video = video - video.mean((1, 2, 3), keepdim=True)
    return video / (video.square().mean((1, 2, 3), keepdim=True).sqrt() + 3.0)


class Mixer(nn.Module):
    """The bidirectional Mamba mixer, (B, L, dim) -> (B, L, dim)."""

    def __init__(self, config):
        super().__init__()
        inner, state, rank = config.inner, config.state, config.rank
        self.sizes = [rank, state, state]
        self.in_proj = nn.Linear(config.dim, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, config.dim, bias=False)
        for way, A in (("", "A_log"), ("_b", "A_b_log")):
            taps = config.conv_width
            conv = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
            self.add_module("conv1d" + way, conv)
            self.add_module("x_proj" + way, nn.Linear(inner, sum(self.sizes), bias=False))
            self.add_module("dt_proj" + way, nn.Linear(rank, inner))
            self.register_parameter(A, nn.Parameter(torch.zeros(inner, state)))
            self.register_parameter("D" + way, nn.Parameter(torch.ones(inner)))

    def direction(self, x, z, way: str, A_log):
        """One direction of x and z (B, L, inner), from the first token to the last."""
        conv, x_proj, dt_proj = (
            getattr(self, name + way) for name in ("conv1d", "x_proj", "dt_proj")
        )
        x = F.silu(conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        low, B, C = x_proj(x).split(self.sizes, -1)
        return loop_scan(
            {
                "x": x,
                "delta": F.linear(low, dt_proj.weight),
                "A": -torch.exp(A_log),
                "B": B,
                "C": C,
                "D": getattr(self, "D" + way),
                "z": z,
                "delta_bias": dt_proj.bias,
            }
        )

    def forward(self, u):
        x, z = self.in_proj(u).chunk(2, -1)
        y = self.direction(x, z, "", self.A_log)
        back = self.direction(x.flip(1), z.flip(1), "_b", self.A_b_log)
        return self.out_proj(y + back.flip(1))


class Block(nn.Module):
    """norm -> mixer, and the residual stream around them."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.mixer = Mixer(config)

    def forward(self, residual):
        return residual + self.mixer(self.norm(residual))


class PatchEmbed(nn.Module):
    """A 3-D convolution with stride = kernel."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.tubelet, *config.patch)
        self.proj = nn.Conv3d(3, config.dim, kernel, kernel)

    def forward(self, video):
        """(B, T, H, W, 3) -> (B, T', rows columns, dim)."""
        return self.proj(video.permute(0, 4, 1, 2, 3)).flatten(3).permute(0, 2, 3, 1)


class VideoMamba(nn.Module):
    """The encoder with its head.

    Args:
      config: its shape, with the attributes of the library's ModelConfig; size, patch and frames
        are those of the videos that it takes. Drop path is not part of it.
    """

    def __init__(self, config):
        super().__init__()
        rows, columns = config.grid
        self.pooling, self.normalise = config.pooling, config.normalise
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.dim))
        if config.frames is not None:
            times = config.frames // config.tubelet
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, times, config.dim))
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_f = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, video):
        """uint8 (B, T, H, W, 3) -> logits (B, classes)."""
        x = self.patch_embed(normalise(video, self.normalise)) + self.pos_embed[:, 1:]
        if hasattr(self, "temporal_pos_embedding"):
            x = x + self.temporal_pos_embedding[:, :, None]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x.flatten(1, 2)], 1)
        for layer in self.layers:
            x = layer(x)
        x = x[:, 0] if self.pooling == "cls" else x.mean(1)
        return self.head(self.norm_f(x))


def load(config, state) -> VideoMamba:
    """The encoder with given weights.

    Args:
      config: see `VideoMamba`.
      state: name -> numpy array, all of them: of an image model the patch kernel has no time axis.
    """
    model = VideoMamba(config)
    weights = {name: torch.tensor(array) for name, array in state.items()}
    kernel = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = kernel if kernel.ndim == 5 else kernel.unsqueeze(2)
    model.load_state_dict(weights)
    return model


def kept_bytes(config, batch: int, tokens: int) -> int:
    """Bytes that autograd keeps of the blocks between forward and backward.

    Per block and direction three arrays of (batch, tokens, channels, state), the decay and the
    states one by one and stacked; and 23 of (batch, tokens, channels) in all.
    """
    return 4 * config.depth * (6 * config.state + 23) * batch * tokens * config.inner


def loss_of(model: VideoMamba, video, label, smoothing: float) -> torch.Tensor:
    """The mean cross entropy of clips uint8 (B, T, H, W, 3) with labels int64 (B,)."""
    return F.cross_entropy(model(video), label, label_smoothing=smoothing)


class TrainStep:
    """step(video, label) -> loss: forward, backward and an AdamW update.

    Args:
      model: is updated.
      optim: with the attributes of the library's OptimConfig; the learning rate stays at its peak.
    """

    def __init__(self, model: VideoMamba, optim):
        names = dict(model.named_parameters())
        still = [k for k in names if k.endswith(("bias", "norm.weight", "norm_f.weight"))]
        still += [k for k in names if k.split(".")[-1] in NOT_DECAYED]
        groups = [
            {"params": [v for k, v in names.items() if k not in still]},
            {"params": [names[k] for k in still], "weight_decay": 0.0},
        ]
        self.model, self.smoothing, self.clip_norm = model, optim.label_smoothing, optim.clip_norm
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optim.learning_rate,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def __call__(self, video, label) -> float:
        loss = loss_of(self.model, video, label, self.smoothing)
        loss.backward()
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()
