"""Lowering a trained network to ONNX, checking the graph, and writing the bundle."""

from __future__ import annotations

from ccn_deploy.exporters.calibration import CalibrationRequest
from ccn_deploy.exporters.export import export_bundle

__all__ = ["CalibrationRequest", "export_bundle"]
