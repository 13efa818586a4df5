"""The two operations of a Mamba block that are not matrix products, and the CPU set-up for them."""

from stretchysnake_kernels.causal_conv1d import bidirectional_causal_conv1d, causal_conv1d
from stretchysnake_kernels.process import configure_cpu
from stretchysnake_kernels.selective_scan import (
    bidirectional_selective_scan,
    export_checks,
    selective_scan,
)

__all__ = [
    "bidirectional_causal_conv1d",
    "bidirectional_selective_scan",
    "causal_conv1d",
    "configure_cpu",
    "export_checks",
    "selective_scan",
]
