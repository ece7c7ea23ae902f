"""Strike trainings, one by one, each at a random moment, and compare their weights with those of an undisturbed one.

The strikes are those of notebooks/failures.ipynb on one machine. Exit status 1 if weights differ, or if a training did
not go on within the bound.
"""

import argparse
import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]

import torch  # noqa: E402
from support.failures import Strike, Watch  # noqa: E402
from tabulate import tabulate  # noqa: E402

EPOCHS = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("MNIST_DIR"), metavar="DIR", help="folder of MNIST's files")
    parser.add_argument("--validation", type=int, default=50_000, metavar="N", help="images to train without: quicker")
    parser.add_argument("--strikes", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=1, help="of the moments, the victims and the trainings")
    parser.add_argument("--bound", type=float, default=120, metavar="S", help="seconds within which it must go on")
    args = parser.parse_args()
    if not args.data:
        parser.error("name the folder of MNIST's files: --data DIR, or the variable MNIST_DIR")
    chance, results = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        checkpoint, backup = folder / "checkpoint.pt", folder / "backup.pt"
        train = "torchrun --standalone --nproc-per-node 2 --max-restarts 1"
        train += f" {shlex.quote(str(PROJECT / 'mnist.py'))} --no-cuda --timeout 5"
        train += f" --data {shlex.quote(args.data)} --epochs {EPOCHS} --validation {args.validation} --log-interval 1"
        train += f" --seed {args.seed} --checkpoint {checkpoint} --save-model {folder}/"
        steps = len(Watch([], 1).run(train + "reference.pt", **ENVIRONMENT).points) // EPOCHS
        reference = torch.load(folder / "reference.pt")

        def victim():
            return chance.choice(watch.ranks())

        def tear():
            shutil.copy(checkpoint, backup)
            os.truncate(checkpoint, 1000)
            victim().kill()

        kinds = {
            "SIGKILL": (lambda: victim().kill(), None),
            "SIGTERM": (lambda: watch.launcher.terminate(), lambda: None),
            "SIGSEGV": (lambda: victim().send_signal(signal.SIGSEGV), None),
            "SIGSTOP": (lambda: victim().suspend(), None),
            "disk": (lambda: Path(f"{checkpoint}.tmp").symlink_to("/dev/full"), None),
            "torn": (tear, lambda: shutil.copy(backup, checkpoint)),
        }
        order = [*kinds, "SIGKILL", "SIGTERM", "SIGKILL", "SIGKILL"]  # those that happen most, most often
        for number in range(args.strikes):
            kind = order[number % len(order)]
            act, repair = kinds[kind]
            checkpoint.unlink()
            # A torn checkpoint must be there; and after the last steps, nobody asks any more whether SIGTERM came.
            moment = chance.uniform(1.05 if kind == "torn" else 0.05, 0.7 * EPOCHS)
            strike = Strike(kind, moment, act, "$.", repair)
            watch = Watch([strike], steps)
            watch.run(train + "model.pt", **ENVIRONMENT)
            if strike.seconds is None:
                sys.exit(f"error: the training ended before {kind} could strike it")
            weights = torch.load(folder / "model.pt")
            equal = all(torch.equal(weights[name], reference[name]) for name in reference)
            results.setdefault(kind, []).append((strike.seconds, strike.repeated, equal))
            print(f"{number + 1}: {'equal' if equal else 'NOT EQUAL'}", flush=True)
    rows = []
    for kind, found in results.items():
        seconds, repeated, equal = zip(*found)
        times = f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"
        rows.append([kind, len(found), *times, f"{statistics.mean(repeated):.1f}", sum(equal)])
    headers = ["strike", "strikes", "s to go on, median", "most", "steps repeated, mean", "equal weights"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    everything = [result for found in results.values() for result in found]
    sys.exit(not all(equal and seconds <= args.bound for seconds, _, equal in everything))


if __name__ == "__main__":
    main()
