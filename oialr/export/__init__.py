"""A trained network out of the library: files that others read."""

SUFFIXES = {
    "dense": ".pt",
    "factors": ".safetensors",
    "onnx": ".onnx",
    "torch-export": ".pt2",
}
"""Formats by name, and the suffixes of their files by custom. Known without torch."""
