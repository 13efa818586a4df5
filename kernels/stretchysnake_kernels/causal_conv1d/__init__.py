"""Depthwise causal convolution over tokens."""

from stretchysnake_kernels.causal_conv1d.api import causal_conv1d

__all__ = ["causal_conv1d"]
