"""Train an autoencoder on MNIST with Lightning: 784 pixels to three numbers and back, on one device or several.

    python autoencoder.py                                                       all GPUs, or one process on the CPU
    python autoencoder.py --accelerator cpu --devices 2                         two processes on the CPU
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST ... autoencoder.py     two machines, --node-rank 1 on the other

The losses go to standard output and to Weights & Biases: online if WANDB_API_KEY is set, else to a folder.
With --resume, a run that was killed or stopped goes on after its last whole epoch when it is started again.
"""
import argparse
import contextlib
import functools
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import wandb
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, Sampler

from mnist import DATA, TrainingError, load, write

CHECKPOINT = "last.ckpt"


class Autoencoder(LightningModule):
    """Encoder 784-64-3 and decoder 3-64-784: uint8 images (N, 1, 28, 28) to pixels (N, 784), about 0 to 1."""

    def __init__(self, lr=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 784))

    def encode(self, images):
        """Return the latent numbers (N, 3) of images."""
        return self.encoder(pixels(images))

    def forward(self, images):
        return self.decoder(self.encode(images))

    def training_step(self, images):
        return self.loss("train_loss", images)

    def validation_step(self, images):
        self.loss("val_loss", images)

    def loss(self, name, images):
        """Return the mean squared error of a batch; log it for this step and for the epoch, over all processes."""
        loss = F.mse_loss(self(images), pixels(images))
        size = float(len(images))  # of integers Lightning takes the mean over all processes without the remainder
        self.log(name, loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr, fused=True)


def pixels(images):
    """Return uint8 images (N, 1, 28, 28) as rows of float pixels 0..1 (N, 784)."""
    return images.flatten(1).float() / 255


class Images(LightningDataModule):
    """MNIST's training images, kept in memory; a seed takes one in twelve of them, 5,000 of 60,000, for validation."""

    def __init__(self, data, batch_size=64, seed=1):
        super().__init__()
        images, _ = load(data, "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        held_out = len(images) // 12
        if not held_out:
            raise TrainingError(f"{data} holds {len(images)} training images, too few to validate with one in twelve")
        self.train, self.validation = images[order[held_out:]], images[order[:held_out]]
        self.done = 0  # epochs; Lightning tells a sampler of each epoch, but not of the first one after --resume
        self.save_hyperparameters(dict(batch_size=batch_size, seed=seed, images=len(images)))

    def loader(self, images, batch_size, seed=None):
        shares = Shares(len(images), batch_size, self.trainer.global_rank, self.trainer.world_size, seed)
        shares.set_epoch(self.done)
        return DataLoader(images, batch_size=None, sampler=shares)  # one indexing for a batch, no work for each image

    def train_dataloader(self):
        return self.loader(self.train, self.hparams.batch_size, self.hparams.seed)

    def val_dataloader(self):
        return self.loader(self.validation, 1000)


class Shares(Sampler):
    """The indices of one process's share of each batch: 1/N of it for each of N processes.

    With a seed, the images are reshuffled every epoch, and those that fill no batch are left out.
    """

    def __init__(self, images, batch_size, rank, world, seed=None):
        self.images, self.rank, self.world, self.seed, self.epoch = images, rank, world, seed, 0
        self.steps = math.ceil(images / batch_size) if seed is None else images // batch_size
        self.used = images if seed is None else self.steps * batch_size

    def set_epoch(self, epoch):  # called by Lightning
        self.epoch = epoch

    def __len__(self):
        return self.steps

    def __iter__(self):
        order = torch.arange(self.images)
        if self.seed is not None:
            order = torch.randperm(self.images, generator=torch.Generator().manual_seed(hash((self.seed, self.epoch))))
        return (batch[self.rank::self.world] for batch in order[:self.used].tensor_split(self.steps))


class Lines(Callback):
    """Prints the losses of every epoch, and at the end how long it took."""

    def on_train_start(self, trainer, module):
        self.started, self.before = time.perf_counter(), trainer.global_step
        self.say(f"Training on {trainer.world_size} x {module.device.type}")

    def on_train_epoch_end(self, trainer, module):
        losses = (f"{name}={trainer.callback_metrics[name]:.4f}" for name in ("train_loss", "val_loss"))
        self.say(f"Epoch: {trainer.current_epoch + 1} -", *losses)

    def on_train_end(self, trainer, module):
        seconds = time.perf_counter() - self.started
        images = (trainer.global_step - self.before) * trainer.datamodule.hparams.batch_size
        self.say(f"Trained in {seconds:.1f} s, {images / seconds:.0f} images/s")

    @staticmethod
    @rank_zero_only
    def say(*words):
        print(*words, flush=True)


class Together(Callback):
    """Ends the processes together: if only some of them find the checkpoint, and when SIGTERM tells them to."""

    def __init__(self, checkpoint, files):
        self.checkpoint, self.found, self.files = checkpoint, checkpoint.exists(), files

    def setup(self, trainer, module, stage):
        decide = trainer.strategy.reduce_boolean_decision
        if decide(self.found, all=False) and not decide(self.found, all=True):
            raise TrainingError(f"only some machines have {CHECKPOINT}: --results must be a folder that they share")

    def on_train_start(self, trainer, module):
        self.listen(trainer)  # instead of Lightning's handler, with which several processes may wait for ever

    def listen(self, trainer):
        def stop(*_):
            if self.files.busy:  # what is being written must not be torn: the same again in a moment
                return threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            if trainer.strategy.launcher:
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise SystemExit(128 + signal.SIGTERM)

        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            return signal.signal(signal.SIGTERM, stop)

    def on_exception(self, trainer, module, exception):
        if isinstance(exception, (SystemExit, KeyboardInterrupt)):
            goes_on = "; --resume goes on from there" if self.checkpoint.exists() else ""
            Lines.say(f"Told to stop after {trainer.current_epoch} epochs{goes_on}")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint so that its path holds the old file or the whole new one, whenever the process is killed."""

    busy = False

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.busy = True
        try:
            write(checkpoint, path)
        finally:
            self.busy = False


def records(folder, config):
    """Return a logger for Weights & Biases, online if there is a key and its server answers, else into a folder."""
    for name in "WANDB_API_KEY", "WANDB_MODE":  # W&B reads them itself, and stumbles over empty ones and newlines
        if value := os.environ.pop(name, "").strip():
            os.environ[name] = value
    key = os.environ.get("WANDB_API_KEY")
    settings = dict(init_timeout=20, finish_timeout=60, silent=True, console="off", disable_git=True, save_code=False)
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    start = functools.partial(wandb.init, project="autoencoder", dir=folder, config=config)
    try:
        run = start(mode=mode, settings=wandb.Settings(api_key=key, **settings))
    except Exception as error:  # training matters more than its records
        Lines.say(f"Without a server for the records: {type(error).__name__}: {str(error).splitlines()[0]}")
        os.environ.pop("WANDB_MODE", None)  # which may be what is wrong
        run = start(mode="offline", settings=wandb.Settings(**settings))
    if not (run.offline or run.disabled):
        Lines.say(f"Records: {run.url}")
    return WandbLogger(experiment=run, log_model=True)


def check(path, config, epochs):
    """Return the epochs done of a checkpoint; raise TrainingError if it is torn, another run's, or of more epochs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = {**state["hyper_parameters"], **state["datamodule_hyper_parameters"]}.items()
        done = state["epoch"] + 1
    except Exception as error:  # torch raises a dozen kinds, by where the file is torn
        raise TrainingError(f"{path} is no whole checkpoint: move it away to train from the start") from error
    if other != config.items():
        raise TrainingError(f"{path} was made with {dict(other - config.items())}, not "
                            f"{dict(config.items() - other)}: use the same values or another --results")
    if done > epochs:
        raise TrainingError(f"{path} holds {done} epochs, more than {epochs}: ask for more, or name another --results")
    return done


@contextlib.contextmanager
def quiet():
    """Leave out what Lightning says about itself, and its warnings that are no news here."""
    for name in "lightning.pytorch", "lightning.fabric":
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (".*does not have many workers", ".*smaller than the logging interval", ".*LeafSpec",
                        "Checkpoint directory .* exists", "The dirpath has changed"):
            warnings.filterwarnings("ignore", message)
        yield


def train(data=DATA, results="results", epochs=10, batch_size=64, lr=1e-3, seed=1, limit_train_batches=1.0,
          accelerator="auto", devices="auto", resume=False):
    """Train an Autoencoder; return it with the mean squared error of the validation images, in pixels from 0 to 1.

    The arguments are the command line's flags. Raises ValueError for one out of range, TrainingError for what else the
    user can mend, and SystemExit(143) after SIGTERM.
    """
    for name, value in dict(epochs=epochs, batch_size=batch_size, devices=devices).items():
        if value != "auto" and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not (0 < lr < math.inf and 0 < limit_train_batches <= 1 and 0 <= seed < 2**63):
        raise ValueError(f"lr {lr} must be above 0, limit_train_batches {limit_train_batches} in (0, 1] "
                         f"and seed {seed} in [0, 2**63)")
    local, nodes = os.environ.get("LOCAL_WORLD_SIZE"), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if local and devices != "auto":
        raise ValueError(f"torchrun has started {local} processes here: leave out --devices")

    torch.manual_seed(seed)
    images, model = Images(data, batch_size, seed), Autoencoder(lr)
    config = {**model.hparams, **images.hparams}
    checkpoint = Path(results, CHECKPOINT)
    if checkpoint.exists():
        if not resume:
            raise TrainingError(f"{checkpoint} is there already: go on by --resume, or name another --results")
        images.done = check(checkpoint, config, epochs)

    with quiet():
        files = WholeFiles()
        together = Together(checkpoint, files)
        try:
            trainer = Trainer(
                accelerator=accelerator, devices=int(local or 0) or devices, num_nodes=nodes, max_epochs=epochs,
                limit_train_batches=float(limit_train_batches), logger=False, plugins=[files],
                callbacks=[Lines(), together, ModelCheckpoint(
                    results, checkpoint.stem, enable_version_counter=False, save_on_train_epoch_end=True)],
                use_distributed_sampler=False, num_sanity_val_steps=0, enable_progress_bar=False,
                enable_model_summary=False)
        except MisconfigurationException as error:
            raise TrainingError(str(error)) from error
        world, steps = trainer.world_size, len(images.train) // batch_size
        if isinstance(trainer.accelerator, CPUAccelerator) and world > nodes * os.cpu_count():
            raise TrainingError(f"{trainer.num_devices} processes are more than the {os.cpu_count()} cores here")
        if batch_size % world or not steps:
            raise ValueError(f"batches of {batch_size} cannot be made of {len(images.train)} images and shared "
                             f"evenly by {world} processes: take another batch_size")
        if len(images.validation) < world:
            raise TrainingError(f"{data} holds too few images for {world} processes to validate with")
        if steps * limit_train_batches < 1:
            raise TrainingError(f"limit_train_batches {limit_train_batches} of {steps} batches is less than one")
        try:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=results):
                pass
        except OSError as error:
            raise TrainingError(f"{results} cannot be written: {error}") from error

        first = rank_zero_only.rank == 0
        previous = together.listen(trainer)
        try:
            if first:
                trainer.logger = records(results, config)
            trainer.fit(model, images, ckpt_path=checkpoint if checkpoint.exists() else None)
            if not trainer.callback_metrics:  # nothing was left to train
                trainer.validate(model, images, verbose=False)
        except MisconfigurationException as error:
            raise TrainingError(str(error)) from error
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, dist.DistError):
                raise
            raise TrainingError(f"rank {rank_zero_only.rank} lost the others; see their logs: {error}") from error
        finally:
            if trainer.logger:
                trainer.logger.experiment.finish(exit_code=int(sys.exc_info()[0] is not None))
                wandb.teardown()  # finish alone does not wait for the last bytes
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            if dist.is_initialized():
                dist.destroy_process_group()  # not as late as Lightning: see launched in mnist.py
    loss = trainer.callback_metrics["val_loss"].item()
    Lines.say(f"val_loss={loss:.4f}")
    return model, loss


def number_or_auto(text):
    return text if text == "auto" else int(text)


def main(argv=None):
    """Run the command line; exit with 2 after wrong usage, 1 after what else the user can mend, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA, metavar="DIR", help="folder of the four MNIST files, gzipped or not")
    parser.add_argument("--results", default="results", metavar="DIR", help="gets the checkpoint and the records")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step of all devices together")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-train-batches", type=float, default=1.0, metavar="SHARE", help="of them in each epoch")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--devices", type=number_or_auto, default="auto", metavar="N",
                        help="GPUs of this machine, or processes on its CPU; auto: all GPUs, else one process")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --results, if there is one")
    args = parser.parse_args(argv)
    try:
        train(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    except TrainingError as error:
        parser.exit(1, f"autoencoder.py: {error}\n")


if __name__ == "__main__":
    main()
