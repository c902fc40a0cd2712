"""From a network, wherever it comes from, to a bundle: graphs, checks, engines."""

from __future__ import annotations

from ccn_deploy.exporters.calibration import CalibrationRequest
from ccn_deploy.exporters.export import export_bundle

__all__ = ["CalibrationRequest", "export_bundle"]
