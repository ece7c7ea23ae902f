"""Train the network of the PyTorch examples' MNIST recipe the way most tutorials do: what benchmark.py compares with.

Two 3x3 convolutions, dropout, Adadelta with a step schedule, batches of 64 in float32 from a DataLoader that turns
every image into a tensor one by one. Architecture and settings: https://github.com/pytorch/examples, folder mnist.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets, transforms


def network():
    """Return the network: images (N, 1, 28, 28) to logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with torchvision's MNIST/raw")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--until", type=float, default=1.0, help="test accuracy at which it stops")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-cuda", action="store_true", help="train on the CPU even if there is a GPU")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train = torch.utils.data.DataLoader(datasets.MNIST(args.data, True, scale), batch_size=64, shuffle=True)
    test = torch.utils.data.DataLoader(datasets.MNIST(args.data, False, scale), batch_size=1000)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    model = network().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    for _ in range(args.epochs):
        started = time.perf_counter()
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        seconds = time.perf_counter() - started
        model.eval()
        with torch.no_grad():
            right = sum((model(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in test)
        schedule.step()
        print(f"seconds={seconds:.2f}\naccuracy={right / len(test.dataset):.4f}", flush=True)
        if right >= args.until * len(test.dataset):
            break


if __name__ == "__main__":
    main()
