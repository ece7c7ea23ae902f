"""Train an autoencoder on MNIST with Lightning: 784 pixels to a few numbers and back, on one device or several.

    python autoencoder.py                                                       all GPUs, or one process on the CPU
    python autoencoder.py --accelerator cpu --devices 2                         two processes on the CPU
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST ... autoencoder.py     two machines, --node-rank 1 on the other

The losses go to standard output and to Weights & Biases: online if WANDB_API_KEY is set, else to a folder.
"""

import contextlib
import logging
import os
import signal
import warnings
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import wandb
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, callbacks, loggers, plugins
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from mnist import DATA, TrainingError, load, load_checkpoint, save_atomically


class Autoencoder(LightningModule):
    """Encoder 784-64-latent and decoder back: uint8 images (N, 1, 28, 28) to pixels (N, 784), about 0 to 1."""

    def __init__(self, lr=1e-3, latent=3):
        super().__init__()
        self.save_hyperparameters()  # the checkpoint gets lr and latent, too
        self.encoder = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 784))

    def encode(self, images):
        """Return the latent numbers (N, latent) of images."""
        return self.encoder(pixels(images))

    def forward(self, images):
        return self.decoder(self.encode(images))

    def training_step(self, images):
        loss = self.loss("train_loss", images)
        self.log("train_loss_step", loss)  # of this process's share: the mean over all would be an exchange every step
        return loss

    def validation_step(self, images):
        self.loss("val_loss", images)

    def loss(self, name, images):
        """Return the mean squared error of a batch; log the mean over the epoch and over all processes."""
        loss = nn.functional.mse_loss(self(images), pixels(images))
        size = float(len(images))  # Lightning takes the mean of the processes' sizes; that of integers is rounded down
        self.log(name, loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr, fused=True)

    def on_train_start(self):
        self.print(f"Training on {self.trainer.world_size} x {self.device.type}", flush=True)

    def on_train_epoch_end(self):
        losses = "train_loss={train_loss:.4f} val_loss={val_loss:.4f}".format(**self.trainer.callback_metrics)
        self.print(f"Epoch: {self.current_epoch + 1} - {losses}", flush=True)


def pixels(images):
    """Return uint8 images (N, 1, 28, 28) as rows of float pixels 0..1 (N, 784)."""
    return images.flatten(1).float() / 255


class Images(LightningDataModule):
    """MNIST's training images, in memory; one in twelve, chosen by the seed, is for validation: 5,000 of 60,000."""

    def __init__(self, data, batch_size=64, seed=1):
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        images, _ = load(data, "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        self.validation, self.train = images[order].tensor_split([len(images) // 12])

    def train_dataloader(self):
        # Each of N processes takes every Nth image of one order: 1/N of every batch, which is the same for any N.
        world = self.trainer.world_size
        order = DistributedSampler(self.train, world, self.trainer.global_rank, seed=self.seed, drop_last=True)
        order.set_epoch(self.trainer.current_epoch)
        batches = BatchSampler(order, self.batch_size // world, drop_last=True)
        return DataLoader(self.train, batch_size=None, sampler=batches)  # indexes once for a batch, not for each image

    def val_dataloader(self):
        return DataLoader([self.validation[self.trainer.global_rank :: self.trainer.world_size]], batch_size=None)


class AtomicCheckpointIO(plugins.TorchCheckpointIO):
    """Replaces the checkpoint at once; Lightning copies it from a temporary folder, and may be killed meanwhile."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        save_atomically(checkpoint, path)


def wandb_logger(folder, config):
    """Start a run of Weights & Biases: online if there is a key and its server answers, else in a folder."""
    os.environ["WANDB_DATA_DIR"] = os.path.abspath(f"{folder}/wandb")  # `wandb sync` needs what is staged there
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    settings = wandb.Settings(init_timeout=20, finish_timeout=60, silent=True, console="off", disable_git=True)
    try:
        run = wandb.init(project="autoencoder", dir=folder, config=config, settings=settings, mode=mode)
    except wandb.Error as error:
        print("Weights & Biases is offline:", str(error).splitlines()[0], flush=True)
        run = wandb.init(project="autoencoder", dir=folder, config=config, settings=settings, mode="offline")
    if run.settings.mode == "online":
        print("Weights & Biases:", run.url, flush=True)
    return loggers.WandbLogger(experiment=run, log_model=not run.disabled)


def train(data=DATA, results="results", epochs=10, batch_size=64, lr=1e-3, seed=1, limit_train_batches=1.0,
          latent=3, accelerator="auto", devices="auto", resume=False):  # fmt: skip
    """Train an Autoencoder; return it with the mean squared error of the validation images, in pixels from 0 to 1.

    The arguments are the flags. Raises TrainingError, OSError, MisconfigurationException, and SystemExit at SIGTERM.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(seed)
    images, model = Images(data, batch_size, seed), Autoencoder(lr, latent)
    config = dict(batch_size=batch_size, lr=lr, seed=seed, limit_train_batches=limit_train_batches, latent=latent,
                  data=zlib.crc32(images.train.numpy()), network=zlib.crc32(repr(model).encode()))  # fmt: skip
    checkpoint = Path(results, "last.ckpt")
    found = checkpoint.exists()
    if found and not resume:
        raise TrainingError(f"{checkpoint} is there already: continue it with --resume, or name another --results")
    load_checkpoint(checkpoint, config)  # Lightning loads it again, but does not ask whose it is

    def check_shared(trainer, module, stage):
        if not trainer.strategy.reduce_boolean_decision(found == trainer.strategy.broadcast(found)):
            raise TrainingError(f"only some machines have {checkpoint}: --results must be a folder that they share")

    def stop(*_):  # instead of Lightning's handler, which can wait for ever (its issue 20806)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if trainer.strategy.launcher:
            trainer.strategy.launcher.kill(signal.SIGTERM)  # the processes that it started
        raise SystemExit(128 + signal.SIGTERM)

    timer = callbacks.Timer()
    trainer = Trainer(
        accelerator=accelerator, devices=os.environ.get("LOCAL_WORLD_SIZE", devices),  # torchrun sets it
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)), max_epochs=epochs, num_sanity_val_steps=0, logger=False,
        limit_train_batches=limit_train_batches, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1, plugins=[AtomicCheckpointIO()], callbacks=[
            callbacks.ModelCheckpoint(results, "last", enable_version_counter=False, save_on_train_epoch_end=True),
            callbacks.LambdaCallback(setup=check_shared, on_train_start=lambda *_: signal.signal(signal.SIGTERM, stop),
                on_save_checkpoint=lambda trainer, module, state: state.update(config=config)), timer])  # fmt: skip
    if batch_size % trainer.world_size or len(images.train) < batch_size or len(images.validation) < trainer.world_size:
        raise TrainingError(f"{trainer.world_size} processes cannot share batches of {batch_size} images of {data}")
    os.makedirs(f"{results}/wandb", exist_ok=True)  # fails now if nothing can be written there
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(lambda: distributed.is_initialized() and distributed.destroy_process_group())  # see mnist
        at_the_end.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop))
        if trainer.is_global_zero:
            trainer.logger = wandb_logger(results, config)
            at_the_end.callback(wandb.teardown)  # finish alone does not wait for the last bytes
            at_the_end.push(lambda kind, *_: wandb.finish(exit_code=0 if kind is None else 1))
        trainer.fit(model, images, ckpt_path=checkpoint if found else None)
        if not trainer.callback_metrics:  # nothing was left to train
            trainer.validate(model, images, verbose=False)
    loss, seconds = trainer.callback_metrics["val_loss"].item(), timer.time_elapsed("train")  # of all attempts
    model.print(f"Trained in {seconds:.1f} s, {trainer.global_step * batch_size / seconds:.0f} images/s", flush=True)
    model.print(f"val_loss={loss:.4f}", flush=True)
    return model, loss


def main(argv=None):
    """Run the command line; exit with 2 after wrong usage, 1 after what else the user can fix, 143 after SIGTERM."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA, metavar="DIR", help="folder of the four MNIST files, gzipped or not")
    parser.add_argument("--results", default="results", metavar="DIR", help="gets the checkpoint and W&B's run")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step of all devices together")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--latent", type=int, default=3, help="numbers that an image is reduced to")
    parser.add_argument("--limit-train-batches", type=float, default=1.0, metavar="SHARE", help="of them in each epoch")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--devices", default="auto", metavar="N", help="GPUs, or processes on the CPU")
    parser.add_argument("--resume", action="store_true", help="continue after the last epoch in --results")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.latent) < 1 or min(args.lr, args.limit_train_batches) <= 0:
        parser.error("--epochs, --batch-size and --latent must be at least 1, --lr and --limit-train-batches above 0")
    try:
        train(**vars(args))
    except (TrainingError, MisconfigurationException, OSError) as error:
        parser.exit(1, f"autoencoder.py: {error}\n")


if __name__ == "__main__":
    main()
