"""Where a forward graph comes from: a training run, a torch module, or somebody's ONNX file."""
