"""TensorRT and TensorRT-RTX: the library, engines, memory and shapes on a GPU."""
