"""Measure what several processes that train on this machine gain, and what their exchange costs; print a table.

    python benchmarks/processes.py --data DIR --runs 3         1, 2 and 3 processes with one thread each, one epoch

Each number of processes trains in three ways, in turn: as it is, with the exchange of one number in place of the
gradients, and without any exchange. The last takes the time to compute, the second in addition what the processes wait
for the slowest of them in each step, the first in addition what the exchange of the gradients takes.
"""

import os
import sys

import torch
from benchmark import HERE, machine, make_parser, positive, run, training_seconds
from torch import distributed, nn

import mnist

WAYS = "gradients", "number", "nothing"


def exchange_number(_, bucket):
    """Exchange one number in place of the gradients: a hook of DistributedDataParallel."""
    return distributed.all_reduce(torch.zeros(1), async_op=True).get_future().then(lambda _: bucket.buffer())


def exchange_nothing(_, bucket):
    """Leave each process its own gradients: a hook of DistributedDataParallel."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def hooked(model, original=nn.parallel.DistributedDataParallel, **options):
    """Return the model in DistributedDataParallel, with the way to exchange that the variable EXCHANGE names."""
    parallel = original(model, **options)
    if os.environ["EXCHANGE"] != "gradients":
        parallel.register_comm_hook(None, globals()[f"exchange_{os.environ['EXCHANGE']}"])
    return parallel


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=positive, default=1, help="of each, of which the least seconds count")
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2, 3], help="how many, 1 first")
    args = parser.parse_args()
    if "EXCHANGE" in os.environ:  # one of the processes that are measured
        nn.parallel.DistributedDataParallel = hooked
        mnist.train(data=args.data, epochs=args.epochs, no_cuda=True)
        return

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    seconds = {}
    for _ in range(args.runs):
        for world in args.processes:
            for os.environ["EXCHANGE"] in WAYS if world > 1 else WAYS[:1]:
                command = [*torchrun, world, HERE / "processes.py", "--data", args.data, "--epochs", args.epochs]
                trained = training_seconds(run(command, 1)[0]) / args.epochs
                key = world, os.environ["EXCHANGE"]
                seconds[key] = min(trained, seconds.get(key, trained))
                print(*key, f"{trained:.1f} s", flush=True)
    print(f"\n{machine()}, threads of each process: 1; seconds per epoch, the least of {args.runs} runs\n")
    print("| processes | all | times faster | computing | waiting | exchange |\n| --- | --- | --- | --- | --- | --- |")
    for world in args.processes:
        full, number, nothing = (seconds.get((world, way), seconds[1, "gradients"]) for way in WAYS)
        print(
            f"| {world} | {full:.1f} | {seconds[1, 'gradients'] / full:.2f} "
            f"| {nothing:.1f} | {number - nothing:.1f} | {full - number:.1f} |"
        )


if __name__ == "__main__":
    main()
