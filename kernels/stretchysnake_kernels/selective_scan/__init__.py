"""Selective scan (Mamba-1, S6)."""

from stretchysnake_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
