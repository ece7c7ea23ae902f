"""Train a small convolutional network on MNIST, with one process or many, on CPUs or GPUs.

The same file goes unchanged through every launcher, which says by environment variables who else takes part:

    python mnist.py --epochs 5                                       one process, on the GPU if there is one
    torchrun --nproc-per-node 4 mnist.py                             four processes on this machine
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST mnist.py    two machines; --node-rank 1 on the other
    kubectl create -f pytorchjob-mnist.yaml                          a PyTorchJob runs python mnist.py in every pod
    from mnist import train; model, accuracies = train(epochs=1)     from Python

With --checkpoint FILE, a run that was killed or stopped goes on when the same command is started again.
"""
import argparse
import contextlib
import functools
import gzip
import math
import os
import signal
import struct
import threading
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # see launched
import torch.nn.functional as F
from torch import nn

MEAN, STD = 0.1307, 0.3081  # of the training images scaled to 0..1; fixed, so that serving scales as training did
DATA = Path(__file__).resolve().parent / "data"
TIMEOUT = timedelta(minutes=10)  # for the other processes to start, and for each of them to answer afterwards


class TrainingError(Exception):
    """Something that the user can mend; the message says what is wrong and what to do."""


class Net(nn.Sequential):
    """Two convolutions and two fully connected layers: float images (N, 1, 28, 28) to logits (N, 10)."""

    def __init__(self, dropout=(0.1, 0.25)):
        super().__init__(OrderedDict(
            conv1=nn.Conv2d(1, 32, 5), pool1=nn.MaxPool2d(2), relu1=nn.ReLU(),  # ReLU after pooling: a quarter to do
            conv2=nn.Conv2d(32, 64, 5), pool2=nn.MaxPool2d(2), relu2=nn.ReLU(), flatten=nn.Flatten(),
            dropout1=nn.Dropout(dropout[0]), fc1=nn.Linear(64 * 4 * 4, 128), relu3=nn.ReLU(),
            dropout2=nn.Dropout(dropout[1]), fc2=nn.Linear(128, 10)))


def find(folder, name):
    """Return the path of one of MNIST's files, gzipped or not, in a folder or where torchvision puts it below that."""
    for path in (Path(folder, layout, name + ending) for layout in ("", "MNIST/raw") for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise TrainingError(f"{name}[.gz] is not in {folder}: give --data the folder of the four MNIST files")


def read_idx(folder, name, shape):
    """Return an IDX file (big endian: 0x801 + dimensions, N, shape, then the bytes) as a uint8 tensor (N, *shape)."""
    path = find(folder, name)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, count, *sizes = struct.unpack_from(f">{2 + len(shape)}i", raw)
        values = bytearray(raw[8 + 4 * len(shape):])
        if (magic, *sizes) != (0x801 + len(shape), *shape) or not len(values) == count * math.prod(shape) > 0:
            raise ValueError(f"magic number {magic:#x}, {count} items of {sizes}, {len(values)} bytes")
    except Exception as error:  # gzip alone raises four kinds
        raise TrainingError(f"{path} is no whole MNIST file ({error}): delete it and fetch it again") from error
    return torch.frombuffer(values, dtype=torch.uint8).view(-1, *shape)


def load(folder, split, device="cpu"):
    """Return the images, uint8 (N, 1, 28, 28), and labels, int64 (N,), of a split, "train" or "t10k", of a folder."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte", (28, 28))
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte", ())
    if len(images) != len(labels) or labels.max() > 9:
        raise TrainingError(f"{folder} holds {len(images)} images and {len(labels)} labels from 0 to {labels.max()} "
                            f"in {split}, which do not belong together: fetch both files again")
    return images.unsqueeze(1).to(device), labels.long().to(device)


def precision(device):
    """Return bfloat16 where the device computes it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # torch before 2.11 cannot tell
        native = any(map(getattr(torch.cpu, "get_capabilities", dict)().get, ("avx512_bf16", "amx_bf16", "bf16")))
    return torch.bfloat16 if native else torch.float32


def predict(model, images):
    """Return the float32 logits (N, 10) of uint8 images."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision(images.device) == torch.bfloat16):
        return model((images.float() / 255 - MEAN) / STD).float()


@contextlib.contextmanager
def launched(no_cuda=False, backend=None):
    """Join the processes that the launcher started; yield this one's (rank, world size, device)."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if 0 < len(missing) < len(names):
        raise TrainingError(f"{', '.join(missing)} not set, but {', '.join(names)} go together: set all or none")
    rank, world, local = (os.environ.get(*it) for it in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    if not (rank + world + local).isdecimal() or int(rank) >= int(world):
        raise TrainingError(f"RANK={rank}, WORLD_SIZE={world}, LOCAL_RANK={local}: no rank below a world size")
    cuda = torch.cuda.is_available() and not no_cuda
    if backend == "nccl" and not cuda:
        raise TrainingError("--backend nccl needs CUDA, which is missing or switched off: use --backend gloo")
    if cuda and int(local) >= torch.cuda.device_count():
        raise TrainingError(f"LOCAL_RANK={local} finds no GPU, {torch.cuda.device_count()} here: use --no-cuda")
    device = torch.device(f"cuda:{local}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not missing:
        try:
            dist.init_process_group(backend or ("nccl" if cuda else "gloo"), timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(f"rank {rank} of {world} could not join at {os.environ['MASTER_ADDR']}:"
                                f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}") from error
    try:
        yield int(rank), int(world), device
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise TrainingError(f"rank {rank} of {world} lost the others; see their logs: {error}") from error
    finally:
        if not missing:
            # Gloo's threads have to end here: one that is late aborts the process at its exit (pytorch/pytorch#190489).
            # They would not if torch.distributed.nn, imported later, had taken the group for a default argument.
            dist.destroy_process_group()


@contextlib.contextmanager
def sigterm():
    """Yield an event that SIGTERM sets, instead of ending the process on the spot."""
    told = threading.Event()
    main_thread = threading.current_thread() is threading.main_thread()  # no other may handle signals
    previous = signal.signal(signal.SIGTERM, lambda *_: told.set()) if main_thread else None
    try:
        yield told
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, previous)


def total(tensor):
    """Return the sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def write(value, path):
    """Save a value so that path holds the old file or the whole new one, whenever the process is killed."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
        raise TrainingError(f"{path} cannot be written: {error}") from error


def read_checkpoint(path, config):
    """Return the checkpoint at path, or an empty one if there is none yet; refuse a torn one and another run's."""
    if not path or not os.path.exists(path):
        return dict(config=config, epoch=0, step=0, accuracies=[])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = state["config"].items()
    except Exception as error:  # torch raises a dozen kinds, by where the file is torn
        raise TrainingError(f"{path} is no whole checkpoint: move it away to train from the start") from error
    if other != config.items():
        raise TrainingError(f"{path} was made with {dict(other - config.items())}, not "
                            f"{dict(config.items() - other)}: use the same values or another --checkpoint")
    return state


@torch.inference_mode()
def test(model, images, labels, batch_size, rank=0, world=1):
    """Return the mean loss and the number of right answers on all images; each process tests its share."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=images.device)
    for start in range(0, len(images), batch_size):
        share = slice(start + rank, start + batch_size, world)
        logits = predict(model, images[share])
        sums[0] += F.cross_entropy(logits, labels[share], reduction="sum")
        sums[1] += (logits.argmax(1) == labels[share]).sum()
    return total(sums)[0].item() / len(images), int(sums[1])


def train(data=DATA, epochs=5, batch_size=64, test_batch_size=1000, lr=0.1, momentum=0.9, seed=1, log_interval=128,
          no_cuda=False, backend=None, checkpoint=None, save_model=None, dry_run=False, report=None):
    """Train a Net; return it with the list of its test accuracies (0..1), one per epoch.

    The arguments are the command line's flags, and report, which rank 0 calls with what it logs, dicts of "epoch" (how
    many are done) and "loss", or of "epoch", "test_loss" and "accuracy" once the checkpoint is written.
    Raises ValueError for one out of range, TrainingError for what else the user can mend, and SystemExit(143) after
    SIGTERM, once the checkpoint is written.
    """
    for name, value in dict(epochs=epochs, batch_size=batch_size, test_batch_size=test_batch_size,
                            log_interval=log_interval).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not (0 < lr < math.inf and 0 <= momentum < 1 and 0 <= seed < 2**63):
        raise ValueError(f"lr {lr} must be above 0, momentum {momentum} in [0, 1) and seed {seed} in [0, 2**63)")
    if checkpoint and save_model and os.path.realpath(checkpoint) == os.path.realpath(save_model):
        raise ValueError("checkpoint and save_model must be two files")

    with launched(no_cuda, backend) as (rank, world, device), sigterm() as told_to_stop:
        say = functools.partial(print, flush=True) if rank == 0 else str  # str: say nothing
        report = report if report and rank == 0 else str
        for path in filter(None, (checkpoint, save_model) if rank == 0 else ()):  # before an hour of training
            if Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK):
                raise TrainingError(f"{path} cannot be written: give a file in a folder that is there and writable")
        images, labels = load(data, "train", device)
        test_set = load(data, "t10k", device)
        if dry_run:  # one batch of each, and nothing is written
            images, labels = images[:batch_size], labels[:batch_size]
            test_set = [values[:test_batch_size] for values in test_set]
            epochs, checkpoint, save_model = 1, None, None
        torch.manual_seed(seed)
        model = Net().to(device, memory_format=torch.channels_last)
        parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=5e-4, nesterov=momentum > 0,
                                    fused=True)
        steps = math.ceil(len(images) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(  # at least 5 steps: with 4 it divides by zero
            optimizer, lr, max(epochs * steps, 5), pct_start=0.25, anneal_strategy="linear", cycle_momentum=False,
            final_div_factor=1e3)

        parts = dict(model=model, optimizer=optimizer, schedule=schedule)
        config = dict(seed=seed, batch_size=batch_size, epochs=epochs, lr=lr, momentum=momentum,
                      images=len(images))
        found = [read_checkpoint(checkpoint, config) if rank == 0 else None]  # only rank 0 needs to see the file
        if world > 1:
            dist.broadcast_object_list(found)
        state = found[0]
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])

        def save(epoch, step):
            # Random numbers follow from seed, epoch, step and rank, so that they need no state of their own.
            state.update({name: part.state_dict() for name, part in parts.items()}, epoch=epoch, step=step)
            if checkpoint and rank == 0:
                write(state, checkpoint)

        if state["epoch"] or state["step"]:
            say(f"Going on from {checkpoint}: {state['epoch']} epochs and {state['step']} steps are done")
        kind = str(precision(device)).removeprefix("torch.")
        say(f"Training on {len(images)} images with {world} x {device.type} in {kind}")
        generator = torch.cuda if device.type == "cuda" else torch.default_generator
        seconds, done = 0.0, 0
        for epoch in range(state["epoch"], epochs):
            started, losses = time.perf_counter(), []
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(hash((seed, epoch))))
            parallel.train()
            for step in range(state["step"], steps):
                if step % 10 == 0 and total(torch.tensor(int(told_to_stop.is_set()), device=device)):  # all or none
                    save(epoch, step)
                    say(f"Told to stop after {epoch} epochs and {step} steps; checkpoint: {checkpoint}")
                    raise SystemExit(128 + signal.SIGTERM)
                batch = order[step * batch_size:(step + 1) * batch_size]
                share = batch[rank::world].to(device)  # 1/N of every batch for each of N processes
                generator.manual_seed(hash((seed, epoch, step, rank)))  # dropout differs by process
                loss = F.cross_entropy(predict(parallel, images[share]), labels[share], reduction="sum") / len(batch)
                optimizer.zero_grad()
                (loss * world).backward()  # DistributedDataParallel divides by the number of processes
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                done += len(batch)
                if (step + 1) % log_interval == 0 or step + 1 == steps:
                    loss = total(sum(losses)) / len(losses)
                    say(f"Epoch: {epoch + 1} ({(step + 1) / steps:6.1%}) - Loss: {loss:.4f}")
                    report({"epoch": epoch + (step + 1) / steps, "loss": loss.item()})
                    losses = []
            seconds += time.perf_counter() - started
            loss, right = test(model, *test_set, test_batch_size, rank, world)
            state["accuracies"].append(right / len(test_set[0]))
            say(f"Test accuracy: {right}/{len(test_set[0])} ({state['accuracies'][-1]:6.1%})\nloss={loss:.4f}")
            say(f"accuracy={state['accuracies'][-1]:.4f}")
            save(epoch + 1, 0)
            report({"epoch": epoch + 1, "test_loss": loss, "accuracy": state["accuracies"][-1]})
        if not done:
            say(f"accuracy={state['accuracies'][-1]:.4f}")
        say(f"Trained in {seconds:.1f} s, {done / max(seconds, 1e-9):.0f} images/s")
        if save_model and rank == 0:
            write({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, save_model)
        return model.eval(), state["accuracies"]


def main(argv=None):
    """Run the command line; exit with 2 after wrong usage, 1 after what else the user can mend, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step of all processes together")
    parser.add_argument("--test-batch-size", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of the OneCycle schedule")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-interval", type=int, default=128, help="steps from one line of the log to the next")
    parser.add_argument("--no-cuda", action="store_true", help="train on the CPU even if there is a GPU")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl with CUDA, gloo without")
    parser.add_argument("--data", default=DATA, metavar="DIR", help="folder of the four MNIST files, gzipped or not")
    parser.add_argument("--checkpoint", metavar="FILE", help="written after every epoch; gone on from if it is there")
    parser.add_argument("--save-model", metavar="FILE", help="gets the weights at the end (a state_dict)")
    parser.add_argument("--dry-run", action="store_true", help="one step and one test batch; write nothing")
    args = parser.parse_args(argv)
    try:
        train(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    except TrainingError as error:
        parser.exit(1, f"mnist.py: {error}\n")


if __name__ == "__main__":
    main()
