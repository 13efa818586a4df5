"""Depthwise causal convolution over tokens."""

from stretchysnake_kernels.causal_conv1d.api import bidirectional_causal_conv1d, causal_conv1d

__all__ = ["bidirectional_causal_conv1d", "causal_conv1d"]
