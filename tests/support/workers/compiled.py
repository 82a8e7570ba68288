"""Run under mpirun: a network with buffers, which one process alone cannot compile."""

import sys
import warnings

import torch
from torch import nn

from app.runtime.processes import start_runtime
from app.training import compilation
from app.training.replicas import Replicas


class Network(nn.Module):
    """With a forward of its own: of nn.Sequential torch compiled nothing inside of a wrapper."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(144, 2)

    def forward(self, x):
        return self.head(self.norm(self.convolution(x)).flatten(1))


def broken(graph, inputs):
    raise RuntimeError("no C++ compiler")


def main():
    compile_alone = compilation.compile_alone
    with start_runtime(device="cpu", timeout=60) as runtime:
        fails = runtime.process_index == 1
        compilation.compile_alone = lambda module, *, backend: compile_alone(
            module, backend=broken if fails else "eager"
        )
        torch.manual_seed(0)
        model = Network()

        def loss(module):
            inputs = torch.ones(2, 3, 8, 8) * (runtime.process_index + 1)
            return module(inputs).square().sum()

        replicas = Replicas(model, runtime.processes, runtime.device, loss, compiled=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                loss(replicas.module).backward()
            told = any("is trained without compilation" in str(w.message) for w in caught)
            assert told == (fails and step == 0), [str(w.message) for w in caught]
            optimizer.step()
        # With the next call buffers become those of process 0.
        with torch.no_grad():
            loss(replicas.module)
        assert model.norm.num_batches_tracked == 4
        weights = [p.tolist() for p in model.parameters()]
        assert all(other == weights for other in runtime.processes.gather(weights))
        if runtime.is_first:
            print("same on all processes")


if __name__ == "__main__":
    sys.exit(main())
