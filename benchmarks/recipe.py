"""Measure what each change of mnist.py's recipe brought, and what did not help; print a Markdown table.

    python benchmarks/recipe.py --data DIR --seeds 1 2 --csv benchmarks/recipe.csv     one epoch of each, for the page
    python benchmarks/recipe.py --data DIR --seeds 1 2 3 --only final        of those whose name begins so
    python benchmarks/recipe.py --data DIR --precision float32 --seeds 1 2 3

A variant is mnist.py with some lines replaced, as below, so that a change of mnist.py cannot be forgotten here. The
variants take turns. Accuracies are those of 10,000 training images that are held out, never of the test set.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean

from benchmark import FLOAT32, accuracies, machine, make_parser, positive, run, training_seconds, variant

OPTIMIZER = "optim.Muon(matrices, lr, momentum=momentum, ns_steps=3)"
WIDE = {"Conv2d(1, 16": "Conv2d(1, 32", "Conv2d(16, 32": "Conv2d(32, 64", "Linear(32 *": "Linear(64 *"}
DROPOUT = {"dropout=(0.05, 0.05)": "dropout=(0.1, 0.25)", "Dropout2d": "Dropout"}
NO_SMOOTHING = {", label_smoothing=0.1": ""}
NOT_MOVED = {"torch.randint(3, (2, len(images)))": "torch.ones(2, len(images), dtype=torch.long)"}
SGD = {OPTIMIZER: "optim.SGD(matrices, lr, momentum, weight_decay=5e-4, nesterov=True, fused=True)"}
ADAMW = {OPTIMIZER: "optim.AdamW(matrices, lr, (momentum, 0.9), fused=True)"}
SGD_FLAGS, ADAMW_FLAGS = "--batch-size 64 --lr 0.1 --momentum 0.9", "--batch-size 128 --lr 0.01"

STEPS = {  # from the trainer of 2026-11-21 to today's: what is still as it was then
    "start: SGD, batches of 64, 32 and 64 kernels": (WIDE | DROPOUT | NO_SMOOTHING | NOT_MOVED | SGD, SGD_FLAGS),
    "half the kernels": (DROPOUT | NO_SMOOTHING | NOT_MOVED | SGD, SGD_FLAGS),
    "less dropout": (NO_SMOOTHING | NOT_MOVED | SGD, SGD_FLAGS),
    "label smoothing": (NOT_MOVED | SGD, SGD_FLAGS),
    "AdamW, batches of 128": (NOT_MOVED | ADAMW, ADAMW_FLAGS),
    "Muon, batches of 512": (NOT_MOVED, ""),
    "final: each image moved by up to a pixel": ({}, ""),
}
OTHERS = {  # today's with one other value
    "batches of 1024": ({}, "--batch-size 1024"),
    "learning rate 0.05": ({}, "--lr 0.05"),
    "momentum 0.9": ({}, "--momentum 0.9"),
    "SGD, batches of 64": (SGD, SGD_FLAGS),
    "AdamW, batches of 512": (ADAMW, "--lr 0.015"),
    "2 steps of Newton-Schulz in place of 3": ({"ns_steps=3": "ns_steps=2"}, ""),
    "5 steps of Newton-Schulz in place of 3": ({"ns_steps=3": "ns_steps=5"}, ""),
    "no label smoothing": (NO_SMOOTHING, ""),
    "dropout 0.1 and 0.25": (DROPOUT, ""),
    "moved by up to two pixels": ({"(images, (1, 1, 1, 1))": "(images, (2, 2, 2, 2))", "randint(3,": "randint(5,"}, ""),
    "32 and 64 kernels": (WIDE, ""),
}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="how the names of variants begin")
    parser.add_argument("--precision", choices=("native", "float32"), default="native")
    parser.add_argument("--csv", default=os.devnull, metavar="FILE", help="write the table there, too")
    args = parser.parse_args()
    precision = {} if args.precision == "native" else FLOAT32
    variants = {name: value for name, value in (STEPS | OTHERS).items() if name.startswith(tuple(args.only))}
    results = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name, (replacements, flags) in variants.items():
                program = variant(Path(folder), "variant.py", replacements | precision)
                command = [sys.executable, program, "--data", args.data, "--no-cuda"]
                command += ["--epochs", args.epochs, "--seed", seed, "--validation", 10_000, *flags.split()]
                text, _ = run(command, args.threads)
                seconds = training_seconds(text) / args.epochs
                results[name].append((seconds, accuracies(text)[-1]))
                print(f"{name}: seed {seed}, {seconds:.1f} s an epoch, {results[name][-1][1]:.2%}", flush=True)
    print(f"\n{machine()}, threads: {args.threads}, precision: {args.precision}, epochs: {args.epochs}")
    print("\n| recipe | validation accuracy, mean (least) | s per epoch (least) | runs |\n| --- | --- | --- | --- |")
    with open(args.csv, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recipe", "accuracy", "least accuracy", "seconds", "runs", "part of the way"])
        for name, runs in results.items():
            seconds, accuracy = zip(*runs)
            average, least = round(mean(accuracy), 4), min(accuracy)
            print(f"| {name} | {average:.2%} ({least:.2%}) | {min(seconds):.1f} | {len(runs)} |")
            writer.writerow([name, average, least, min(seconds), len(runs), name in STEPS])


if __name__ == "__main__":
    main()
