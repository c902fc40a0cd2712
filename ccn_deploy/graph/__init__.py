"""ONNX graphs: read safely, looked at, evaluated in torch, built.

The network of a bundle *is* its float32 forward graph; everything else in the bundle is derived
from it. This package needs the packages onnx and torch, which the extra ``train`` brings; only
:mod:`ccn_deploy.graph.signature` can be imported without them.
"""
