"""Our attacks beside those of other libraries: same weights, images and options, one process."""

from __future__ import annotations

from benchmarks.peers.section import bounded, cw, deepfool

__all__ = ["bounded", "cw", "deepfool"]
