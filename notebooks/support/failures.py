"""Failures on purpose: a training that is watched, struck at given moments, and measured until it goes on."""

import io
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from support.page import PageError, Process

STEP = re.compile(r"Epoch: (\d+) \( *([\d.]+)%\) - train_loss=(\S+)")  # with --log-interval 1
RESUMED = re.compile(r"Resuming from .+: (\d+) epochs and (\d+) steps are done")


@dataclass
class Strike:
    """A failure: what it is called, after how many epochs it strikes, and how; the rest is filled in as it happens."""

    kind: str
    at: float
    act: Callable[[], object]
    sign: str | Callable[[], str]  # regular expression of what the log says of it; or who is asked when it is over
    repair: Callable[[], object] | None = None  # what is left to do, if it does not go on by itself
    where: str = "torchrun"
    begun: float = 0.0  # seconds after the start of the run
    seconds: float | None = None  # from the strike to the next step; None: it did not go on
    step: int = 0  # the last one before the training ended
    resumed: int | None = None  # the one from which it went on
    line: str = ""  # what was seen of it

    @property
    def repeated(self):
        """The number of steps that had to be done twice."""
        return max(0, self.step - self.resumed)


@dataclass
class Watch(io.TextIOBase):
    """Reads a training's log, and strikes at its moments, one by one. As a file, it can replace standard output."""

    strikes: list[Strike]
    steps: int  # in an epoch
    points: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, number of steps done, loss
    launcher: psutil.Process | None = None  # if it runs on this machine

    def __post_init__(self):
        self.out, self.begun, self.rest, self.log = sys.stdout, time.monotonic(), "", []
        self.waiting, self.struck, self.resumed = list(self.strikes), None, 0
        for strike in self.strikes:  # which may have been used before
            strike.seconds, strike.resumed, strike.line = None, None, ""

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.read(line)
        return len(text)

    def read(self, line):
        """Note what a line of the log says; strike if it is time, or note that the training goes on after a strike."""
        self.log.append(line)
        now, struck = time.monotonic() - self.begun, self.struck
        if struck and not struck.line and isinstance(struck.sign, str) and (sign := re.search(struck.sign, line)):
            struck.line = sign[0]
            if struck.repair and not self.launcher:
                struck.repair()
        if resumed := RESUMED.match(line):
            self.resumed = int(resumed[1]) * self.steps + int(resumed[2])
        elif line.startswith("Training on ") and struck:
            struck.step, struck.resumed, self.resumed = self.points[-1][1], self.resumed, 0
        elif step := STEP.match(line):
            done = round((int(step[1]) - 1 + float(step[2]) / 100) * self.steps)
            self.points.append((now, done, float(step[3])))
            if struck and struck.resumed is not None:
                struck.seconds, self.struck = now - struck.begun, None
                struck.line = struck.sign() if callable(struck.sign) else struck.line
                self.tell(now, struck.resumed, f"goes on after {struck.seconds:.1f} s")
            if not self.struck and self.waiting and done >= self.waiting[0].at * self.steps:
                self.struck = self.waiting.pop(0)
                self.struck.begun = now
                self.tell(now, done, self.struck.kind)
                self.struck.act()

    def tell(self, now, step, what):
        print(f"{now:6.1f} s  step {step:4}  {what}", file=self.out, flush=True)

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that the launcher has started, rank 0 first."""
        children = [child for child in self.launcher.children() if "RANK" in child.environ()]
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def run(self, command: str, **environment: str) -> "Watch":
        """Run a launcher until it succeeds: again after the strikes that have a repair; else raise PageError."""
        while True:
            with Process(f"exec {command}", **environment) as launcher:
                self.launcher = psutil.Process(launcher.pid)
                for line in launcher.stdout:
                    self.read(line.rstrip("\n"))
            if not launcher.returncode:
                return self
            if not (self.struck and self.struck.repair):
                raise PageError("\n".join([f"exit status {launcher.returncode} of: {command}", *self.log[-20:]]))
            self.struck.repair()

    def losses(self) -> dict[int, float]:
        """Return the loss of each step; of one that was done twice, the later one."""
        return {step: loss for _, step, loss in self.points}
