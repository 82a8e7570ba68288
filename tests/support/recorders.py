"""A recorder without a training."""

from support.metrics_rows import LAYERS

from app.training.recorder import Recorder
from oialr.layers.reading import MatrixReading

SCHEMA = {"configuration": "run: {}\n", "layers": [], "figures": ["accuracy"]}


class Layer:
    """What a recorder asks of a layer."""

    def __init__(self, name):
        self.name, self.shape, self.is_linear_map = name, LAYERS[name], True
        self.reading = MatrixReading(LAYERS[name])
        self.full_rank = min(self.reading.matrix_shape)


def resume(path, counts, kept=None, **changes):
    schema = {**SCHEMA, "layers": [Layer(name) for name in LAYERS], **changes}
    return Recorder.resume(path, counts, kept or {}, **schema)
