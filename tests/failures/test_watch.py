"""What the page reads from a log, and what it does when a training cannot go on."""

import pytest
from support.failures import Strike, Watch
from support.page import PageError


def test_what_a_strike_cost(capsys):
    """A log of 4 steps an epoch that arrives in pieces: killed in step 7, resumed from 4; then from the beginning."""
    acts = []
    moments = {"first": 1.6, "second": 2}
    strikes = [Strike(name, at, lambda: acts.append(len(watch.points)), r"\(exit.*") for name, at in moments.items()]
    watch = Watch(strikes, steps=4)
    start, resumed = "Training on 9 images\n", "Resuming from c.pt: 1 epochs and 0 steps are done\n"

    def lines(loss, *steps):
        return "".join(f"Epoch: {epoch} ({step / 4:6.1%}) - train_loss={loss + step:.4f}\n" for epoch, step in steps)

    log = start + lines(0, *((1, step) for step in (1, 2, 3, 4)), *((2, step) for step in (1, 2, 3)))
    log += "E failed (exit -9)\n" + resumed + start + lines(10, *((2, step) for step in (1, 2, 3, 4)))
    log += start + lines(20, (1, 1))
    for place in range(0, len(log), 7):
        watch.write(log[place : place + 7])
    assert acts == [7, 11] and [(s.step, s.resumed, s.repeated) for s in strikes] == [(7, 4, 3), (8, 0, 8)]
    assert [strike.line for strike in strikes] == ["(exit -9)", ""] and strikes[1].seconds >= 0
    assert watch.losses() == {1: 21, 2: 2, 3: 3, 4: 4, 5: 11, 6: 12, 7: 13, 8: 14}
    told = [line.split(maxsplit=4)[-1] for line in capsys.readouterr().out.splitlines()]
    assert [text.split(" after")[0] for text in told] == ["first", "goes on", "second", "goes on"]


def test_launcher_that_fails_is_started_again_only_after_a_repair(tmp_path):
    """The repair removes the cause here; without a strike that has one, the page stops with the end of the log."""
    line, cause = "Epoch: 1 (50.0%) - train_loss=1", tmp_path / "cause"
    code = f"import os, sys; print({line!r}); sys.exit(os.path.exists({str(cause)!r}))"
    command = f'python -c "{code}"'
    cause.touch()
    with pytest.raises(PageError, match="^exit status 1 of: (.|\n)*train_loss=1$"):
        Watch([Strike("nothing", 0, lambda: None, "")], 2).run(command)
    assert Watch([Strike("file", 0, lambda: None, "", cause.unlink)], 2).run(command).log == [line, line]
