"""From a training checkpoint to what a robot runs: ONNX parts in a bundle, and TensorRT engines."""
