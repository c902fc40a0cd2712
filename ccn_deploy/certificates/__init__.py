"""Certificates: signed statements of what was shown of a deployed program, checked anywhere.

Needs the base install and, for signatures, ``cryptography``; no torch, no onnx, no GPU.
"""
