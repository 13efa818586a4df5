"""The two operations of a Mamba block that are not matrix products, and the CPU set-up for them."""

from stretchysnake_kernels.causal_conv1d import causal_conv1d
from stretchysnake_kernels.process import configure_cpu
from stretchysnake_kernels.selective_scan import bidirectional_selective_scan, selective_scan

__all__ = ["bidirectional_selective_scan", "causal_conv1d", "configure_cpu", "selective_scan"]
