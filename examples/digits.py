"""Classify handwritten digits with a small convolutional network: `python -m examples.digits`."""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from examples.training import SEED, Task, main

CLASSES = 10
CHANNELS = 32


def make_task(loss_class: Callable[..., nn.Module], quick: bool) -> Task:
    """The digits that come with scikit-learn: 1797 images of 8 by 8 pixels, a quarter held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / digits.images.max()
    labels = torch.tensor(digits.target)
    training, held_out = train_test_split(range(len(labels)), test_size=0.25, random_state=SEED)

    model = nn.Sequential(
        nn.Conv2d(1, CHANNELS, kernel_size=3),
        nn.Tanh(),
        nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(CHANNELS * 4 * 4, CLASSES),
    )
    return Task(
        model=model,
        loss=loss_class(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        training=(images[training], labels[training]),
        held_out=(images[held_out], labels[held_out]),
        batch_size=64,
        steps=20 if quick else 400,
    )


if __name__ == "__main__":
    main(make_task)
