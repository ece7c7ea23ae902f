"""Train autoencoder.py's network the way most Lightning tutorials do: what benchmark_autoencoder.py compares with.

The same layers, optimiser, loss and validation images, but a DataLoader whose workers turn every image into a tensor
one by one, and batches of 32. The seconds of an epoch contain its training and the validation after it.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms


class Autoencoder(LightningModule):
    """Encoder 784-64-3 and decoder 3-64-784."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 784))

    def loss(self, batch):
        images, _ = batch
        pixels = images.flatten(1)
        return F.mse_loss(self.decoder(self.encoder(pixels)), pixels)

    def training_step(self, batch, number):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, number):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def on_train_epoch_start(self):
        self.started = time.perf_counter()

    def on_train_epoch_end(self):  # Lightning validates before it
        seconds, loss = time.perf_counter() - self.started, self.trainer.callback_metrics["val_loss"]
        print(f"seconds={seconds:.2f}\nval_loss={loss:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with torchvision's MNIST/raw")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images = datasets.MNIST(args.data, True, transforms.ToTensor())
    held_out = len(images) // 12
    validation, train = random_split(
        images,
        [held_out, len(images) - held_out],  # as autoencoder.py splits them
        torch.Generator().manual_seed(args.seed),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        Autoencoder(),
        DataLoader(train, args.batch_size, shuffle=True, num_workers=2),
        DataLoader(validation, args.batch_size, num_workers=2),
    )


if __name__ == "__main__":
    main()
