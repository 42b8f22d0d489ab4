"""A training of one weight, for hooks that need no detector."""

import torch
from detectron2.engine import SimpleTrainer
from torch import nn


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, data):
        return {"loss": (self.weight - data) ** 2}


def make_trainer(*registered):
    model = Quadratic()
    data = [torch.tensor(float(value)) for value in range(100)]
    trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), 0.01))
    trainer.seed = 5
    trainer.register_hooks(list(registered))
    return trainer
