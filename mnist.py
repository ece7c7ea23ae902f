"""Train a small convolutional network on MNIST, with one process or many, on CPUs or GPUs.

The same file goes unchanged through every launcher, which says by environment variables who else takes part:

    python mnist.py --epochs 5                                       one process, on the GPU if there is one
    torchrun --nproc-per-node 4 mnist.py                             four processes on this machine
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST mnist.py    two machines; --node-rank 1 on the other
    kubectl create -f pytorchjob-mnist.yaml                          a PyTorchJob runs python mnist.py in every pod
    from mnist import train; model, accuracies = train(epochs=1)     from Python

With --checkpoint FILE, a run that was interrupted resumes when the same command is started again.
"""

import contextlib
import gzip
import io
import math
import os
import signal
import threading
import time
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # here, and not by DistributedDataParallel later: see process_group
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.lr_scheduler import OneCycleLR

MEAN, STD = 0.1307, 0.3081  # of the pixels of the training images, scaled to 0..1
DATA = Path(__file__).resolve().parent / "data"
cross_entropy = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)  # of training and test alike


class TrainingError(Exception):
    """A problem that the user can fix; the message says what is wrong and what to do."""


class Net(nn.Sequential):
    """Two convolutions and two fully connected layers: uint8 images (N, 1, 28, 28) to logits (N, 10)."""

    _ddp_params_and_buffers_to_ignore = ("mean", "std")  # constants, which no step needs to broadcast

    def __init__(self, dropout=(0.05, 0.05), mean=MEAN, std=STD):
        super().__init__(OrderedDict(
            conv1=nn.Conv2d(1, 16, 5), pool1=nn.MaxPool2d(2), relu1=nn.ReLU(),  # ReLU after pooling: a quarter to do
            conv2=nn.Conv2d(16, 32, 5), pool2=nn.MaxPool2d(2), relu2=nn.ReLU(),
            dropout1=nn.Dropout2d(dropout[0]), flatten=nn.Flatten(), fc1=nn.Linear(32 * 4 * 4, 128), relu3=nn.ReLU(),
            dropout2=nn.Dropout(dropout[1]), fc2=nn.Linear(128, 10)))  # fmt: skip
        # Buffers are saved with the weights, so that whoever loads the model scales images as the training did.
        self.mean, self.std = nn.Buffer(torch.tensor(mean)), nn.Buffer(torch.tensor(std))

    def forward(self, images):
        return super().forward((images.float() / 255 - self.mean) / self.std)


def find_file(folder, name):
    """Return the path of a file of MNIST, gzipped or not, in a folder or where torchvision puts it below that."""
    names = name, name.replace("-idx", ".idx")  # some sites ship it as train-images.idx3-ubyte
    paths = [Path(folder, layout, n + ending) for layout in ("", "MNIST/raw") for n in names for ending in ("", ".gz")]
    for path in filter(os.path.isfile, paths):
        return path
    raise TrainingError(f"{name}[.gz] is not in {folder}, or may not be read: give --data the folder of MNIST's files")


def read_idx(folder, name, shape):
    """Return an IDX file (big endian: 4 bytes magic number, 4 bytes for each size, the values) as uint8 (N, *shape)."""
    path = find_file(folder, name)
    try:
        raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        values = torch.frombuffer(raw, dtype=torch.uint8, offset=8 + 4 * len(shape))
        return values.view(int.from_bytes(raw[4:8], "big"), *shape)
    except Exception as error:  # gzip alone raises four kinds
        raise TrainingError(f"{path} is not a readable MNIST file ({error}): download it again") from error


def load(folder, split, device="cpu"):
    """Return the images, uint8 (N, 1, 28, 28), and labels, int64 (N,), of a split, "train" or "t10k", of a folder."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte", (28, 28)).unsqueeze(1)
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte", ()).long()
    if len(images) != len(labels) or labels.max() > 9:
        raise TrainingError(f"the images and labels of {split} in {folder} do not belong together: download both again")
    return images.to(device), labels.to(device)


def precision(device):
    """Return bfloat16 where the device computes it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.11 and newer
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & {n for n in known if known[n]} else torch.float32


def predict(model, images):
    """Return the float32 logits (N, 10) of uint8 images (N, 1, 28, 28)."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision(images.device) == torch.bfloat16):
        return model(images).float()


def as_matrix(tensor):
    """Return weights or their gradient as Muon takes them, a view (outputs, inputs); biases are a single row."""
    return tensor.movedim(1, -1).view(len(tensor), -1) if tensor.dim() > 1 else tensor[None]


@contextlib.contextmanager
def process_group(no_cuda=False, backend=None, timeout=600):
    """Join the processes that a launcher started, if one did; yield this one's rank, the world size and its device.

    Raises RuntimeError, of torch, if they cannot be joined, or if one of them is lost later.
    """
    cuda = torch.cuda.is_available() and not no_cuda
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield 0, 1, device
        return
    dist.init_process_group(backend or ("nccl" if cuda else "gloo"), timeout=timedelta(seconds=timeout))
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        # This ends Gloo's threads; one that is left aborts the process at its exit (pytorch/pytorch#190489). Some would
        # be left if torch.distributed.nn were imported while there is a group, to which its functions keep a reference.
        dist.destroy_process_group()


def all_reduce_sum(tensor):
    """Return the sum of a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def save_atomically(value, path):
    """Save a value so that path holds the old file or the whole new one, whenever the process is killed."""
    target = os.path.realpath(path)  # a symbolic link stays, and what it leads to is replaced
    try:
        # Not straight to the file: torch.save hides why that fails, and aborts where a signal's handler raises.
        torch.save(value, buffer := io.BytesIO())
        Path(f"{target}.tmp").write_bytes(buffer.getbuffer())
        with open(f"{target}.tmp", "rb") as file:
            os.fsync(file.fileno())
        os.replace(f"{target}.tmp", target)
    except OSError as error:
        Path(f"{target}.tmp").unlink(missing_ok=True)
        raise TrainingError(f"{path} cannot be written: {error}") from error


def load_checkpoint(path, config):
    """Return the checkpoint at path, or an empty one if there is none yet; refuse a damaged one and another run's."""
    if not path or not os.path.exists(path):
        return dict(config=config, epoch=0, step=0, accuracies=[])
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] == config:
            return state
    except Exception as error:  # torch raises a dozen kinds, by where the file is damaged
        raise TrainingError(f"{path} is not a valid checkpoint ({type(error).__name__}): move it away") from error
    raise TrainingError(f"{path} was made with {state['config']}, not {config}: use the same, or move it away")


@torch.inference_mode()
def test(model, images, labels, batch_size, rank=0, world=1):
    """Return the mean loss and the accuracy (0..1) on all images; each process tests its share."""
    model.eval()
    logits = torch.cat([predict(model, batch) for batch in images[rank::world].split(batch_size)])
    sums = torch.stack([cross_entropy(logits, labels[rank::world]), (logits.argmax(1) == labels[rank::world]).sum()])
    return (all_reduce_sum(sums.double()) / len(images)).tolist()


# fmt: off
def train(data=DATA, epochs=5, batch_size=512, lr=0.1, momentum=0.7, seed=1, log_interval=0, timeout=600, no_cuda=False,
        backend=None, test_batch_size=1000, checkpoint=None, save_model=None, validation=0, dry_run=False, report=None):
    # fmt: on
    """Train a Net; return it with the list of its accuracies (0..1), one per epoch.

    The arguments are the command line's flags, and report, which rank 0 calls with what it logs: dicts of "epoch" (how
    many are done) and "train_loss", and at the end of an epoch also "test_loss" ("val_loss") and "accuracy".
    Raises TrainingError for what the user can fix, RuntimeError (of torch) for a lost process, and SystemExit(143)
    after SIGTERM, once the checkpoint is written.
    """
    with process_group(no_cuda, backend, timeout) as (rank, world, device), contextlib.ExitStack() as at_the_end:
        stop = threading.Event()
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            # signal.signal returns the handler that there was, which is put back at the end.
            at_the_end.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: stop.set()))

        def log(line, epoch=0, **values):
            if rank == 0:
                print(" ".join([line, *(f"{name}={value:.4f}" for name, value in values.items())]), flush=True)
                if report and values:
                    report(dict(epoch=epoch, **values))

        for path in filter(None, (checkpoint, save_model)) if rank == 0 else ():
            # Not a file: a folder, or a device like /dev/null.
            if os.path.exists(path) != os.path.isfile(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise TrainingError(f"{path} cannot be written: give a file in a folder that is there and writable")
        images, labels = load(data, "train", device)
        if validation >= len(images):
            raise TrainingError(f"--validation {validation} leaves nothing to train on of {len(images)} images")
        torch.manual_seed(seed)
        held_out, rest = torch.randperm(len(images)).to(device).tensor_split([validation])
        test_set = (images[held_out], labels[held_out]) if validation else load(data, "t10k", device)
        images, labels, loss_name = images[rest], labels[rest], "val_loss" if validation else "test_loss"
        if dry_run:  # one step, and nothing is written
            epochs, checkpoint, save_model, images, labels = 1, None, None, images[:batch_size], labels[:batch_size]
        # In each epoch an image is moved by up to one pixel down and across, to one of nine windows of its padded form.
        windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 28, 1).unfold(3, 28, 1)
        model = Net().to(device, memory_format=torch.channels_last)
        parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        matrices = [as_matrix(parameter.detach()) for parameter in model.parameters()]
        optimizer = optim.Muon(matrices, lr, momentum=momentum, ns_steps=3)
        steps = math.ceil(len(images) / batch_size)
        # With fewer than 5 steps it divides by zero.
        schedule = OneCycleLR(optimizer, lr, max(epochs * steps, 5), anneal_strategy="linear", cycle_momentum=False)

        parts = dict(model=model, optimizer=optimizer, schedule=schedule)
        # What must be the same for a checkpoint to be resumed; of the data and the network, checksums.
        numbers = [images.flatten(1).sum(1).tolist(), labels.tolist(), test_set[1].tolist()] if checkpoint else []
        config = dict(data=zlib.crc32(repr(numbers).encode()), network=zlib.crc32(repr((model, MEAN, STD)).encode()),
                      epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum, seed=seed, validation=validation)
        # Only rank 0 needs to see the file.
        received = [load_checkpoint(checkpoint, config) if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(received)
        state = received[0]
        if "model" in state:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            log(f"Resuming from {checkpoint}: {state['epoch']} epochs and {state['step']} steps are done")

        def save(epoch, step):
            # Random numbers follow from seed, epoch, step and rank, so that they need no state of their own.
            state.update({name: part.state_dict() for name, part in parts.items()}, epoch=epoch, step=step)
            if checkpoint and rank == 0:
                save_atomically(state, checkpoint)

        log(f"Training on {len(images)} images with {world} x {device.type} in {precision(device)}")
        seconds, first_step = 1e-9, schedule.last_epoch  # which counts steps; seconds are not 0 if none is left to do
        for epoch in range(state["epoch"], epochs):
            started, losses = time.perf_counter(), []
            # The hash of a tuple of integers is the same in every process.
            torch.manual_seed(hash((seed, epoch)))
            order = torch.randperm(len(images)).to(device)
            rows, columns = torch.randint(3, (2, len(images))).to(device)  # which window of each image
            parallel.train()
            for step in range(state["step"], steps):
                # The processes agree on whether to stop, as one that went on alone would wait for the others.
                if step % 10 == 0 and all_reduce_sum(torch.tensor(int(stop.is_set()), device=device)):
                    save(epoch, step)
                    log(f"Interrupted by SIGTERM after {epoch} epochs and {step} steps; checkpoint: {checkpoint}")
                    raise SystemExit(128 + signal.SIGTERM)
                batch = order[step * batch_size : (step + 1) * batch_size]
                share = batch[rank::world]  # 1/N of every batch for each of N processes
                torch.manual_seed(hash((seed, epoch, step, rank)))  # dropout differs by process
                loss = cross_entropy(predict(parallel, windows[share, :, rows[share], columns[share]]), labels[share])
                model.zero_grad()
                # DistributedDataParallel takes the mean of the processes' gradients; their sum is that of the batch.
                (loss * world / len(batch)).backward()
                for matrix, parameter in zip(matrices, model.parameters()):
                    matrix.grad = as_matrix(parameter.grad)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach() / len(batch))
                if log_interval and (step + 1) % log_interval == 0:
                    loss, ended = all_reduce_sum(torch.stack(losses[-log_interval:]).mean()).item(), (step + 1) / steps
                    log(f"Epoch: {epoch + 1} ({ended:6.1%}) -", epoch + ended, train_loss=loss)
            train_loss = all_reduce_sum(torch.stack(losses).mean()).item()
            seconds += time.perf_counter() - started
            loss, accuracy = test(model, *test_set, test_batch_size, rank, world)
            state["accuracies"].append(accuracy)
            save(epoch + 1, 0)
            log(f"Epoch: {epoch + 1} -", epoch + 1, train_loss=train_loss, **{loss_name: loss}, accuracy=accuracy)
        log(f"Trained in {seconds:.1f} s, {(schedule.last_epoch - first_step) * batch_size / seconds:.0f} images/s")
        if save_model and rank == 0:
            save_atomically({name: w.cpu().contiguous() for name, w in model.state_dict().items()}, save_model)
        return model.eval(), state["accuracies"]


def main(argv=None):
    """Run the command line; exit with 2 after wrong usage, 1 after what else the user can fix, 143 after SIGTERM."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=512, help="images in a step of all processes together")
    parser.add_argument("--test-batch-size", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of Muon, by a OneCycle schedule")
    parser.add_argument("--momentum", type=float, default=0.7, help="of Muon")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-interval", type=int, default=0, metavar="N", help="log every N steps, too")
    parser.add_argument("--no-cuda", action="store_true", help="train on the CPU even if there is a GPU")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl with CUDA, gloo without")
    parser.add_argument("--timeout", type=int, default=600, metavar="S", help="seconds to wait for another process")
    parser.add_argument("--data", default=DATA, metavar="DIR", help="folder of the four MNIST files, gzipped or not")
    parser.add_argument("--checkpoint", metavar="FILE", help="written after each epoch and at SIGTERM; resumed from")
    parser.add_argument("--save-model", metavar="FILE", help="gets the weights at the end (a state_dict)")
    parser.add_argument("--validation", type=int, default=0, metavar="N", help="hold out N training images to test on")
    parser.add_argument("--dry-run", action="store_true", help="one step and one test; write nothing")
    args = parser.parse_args(argv)
    ok = 0 < args.lr < math.inf and 0 <= args.momentum < 1 and 0 <= args.seed < 2**63 and args.validation >= 0
    if min(args.epochs, args.batch_size, args.test_batch_size, args.timeout, args.log_interval + 1) < 1 or not ok:
        parser.error("counts are at least 1 (some 0), --lr above 0, --momentum in [0, 1), --seed in [0, 2**63)")
    try:
        train(**vars(args))
    except TrainingError as error:
        parser.exit(1, f"mnist.py: {error}\n")


if __name__ == "__main__":
    main()
