"""Selective scan (Mamba-1, S6)."""

from stretchysnake_kernels.selective_scan.api import (
    bidirectional_selective_scan,
    export_checks,
    selective_scan,
)

__all__ = ["bidirectional_selective_scan", "export_checks", "selective_scan"]
