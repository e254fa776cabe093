"""Train: warm up, measure every layer (FoG-A), choose the layers, align them, and
show the evidence. The deepspeed launcher runs this file, and so does agrepa.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script, whose folder must not be searched: its `flow` or `data` would shadow others'
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse
import traceback

from agrepa_fast.config import Config
from agrepa_fast.errors import UserError, one_line
from agrepa_fast.launch import end_process, launched_rank
from agrepa_fast.ranks import AgreedError, of_lost_rank
from agrepa_fast.reporting.summary import finish
from agrepa_fast.training.builder import Training, build
from agrepa_fast.training.inputs import share_inputs
from agrepa_fast.training.stop import StopRequest

# isort: split
import torch.distributed as dist  # after agrepa_fast, which sets how torch's threads wait

GO_ON = "--resume latest goes on from the last checkpoint"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="agrepa train",
        description=__doc__,
        epilog="example: deepspeed agrepa_fast/train.py --ds_config zero2.json train.steps=1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--ds_config", default="zero2.json", help="a JSON file, or zero0.json … zero3.json of the package")
    option("--preset", default="demo", help="a preset's name, or a yaml file")
    option("--resume", metavar="latest|best|TAG", help="continue the run in run.dir (default: the preset's newest)")
    option("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    option("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_intermixed_args(argv)  # overrides may stand anywhere


def train(config: Config, ds_values: dict, resume: str | None) -> None:
    """Train to the last step, or until a signal stops all ranks. Every rank must call it. Arguments as of `build`."""
    training = build(config, ds_values, resume)
    with StopRequest(training.run.device) as request:  # from the last step on, a signal must not cost the results
        if take_steps(training, request):
            finish(training.run, training.validation_clips, training.vocoder)
    training.close()


def take_steps(training: Training, request: StopRequest) -> bool:
    """Train to the last step and return True, or return False once a signal has stopped all ranks. Every rank must call
    it."""
    run, checkpoints, choice = training.run, training.checkpoints, training.run.choice
    every, steps = run.config.train, run.config.train.steps
    if training.first_step == 0:
        training.validate(0)
    run.engine.module.train()
    with training.batches, run.training_time():
        for step in range(training.first_step, steps):
            run.step(training.batches, step)
            done = step + 1
            last, stopped = done == steps, request.agreed() and done < steps
            saves = last or stopped or done % every.save_every == 0
            if saves or done % every.log_every == 0:
                run.log(done)
            if last or done % every.val_every == 0:
                training.validate(done)
            choice.after_step(done, lambda: run.timed("probe"))
            if saves:
                with run.timed("checkpoint"):
                    run.nonfinite.check_weights(done)
                    checkpoints.save(run.engine, run.ema, choice, done, must_succeed=last or stopped)
            if stopped:
                checkpoints.leave_copy()
                again = f"--resume latest run.dir={run.context.folder}"
                run.metrics.print(f"step {done}: stopped by a signal, saved; {again} goes on from here")
                return False
    return True


def main(argv: list[str] | None = None) -> None:
    """Train as the arguments say. Raises SystemExit: code 2 after an error that the user can put right or that ranks
    agree on, 1 after any other, 130 after an interrupt; each has printed its line."""
    args = parse(argv)
    try:
        train(*share_inputs(args.preset, args.overrides, args.ds_config, args.resume), args.resume)
    except (UserError, OSError) as error:
        if launched_rank() == 0 or not isinstance(error, AgreedError):
            print(f"agrepa train: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"agrepa train: interrupted; {GO_ON}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        traceback.print_exc()
        print(f"agrepa train: rank {launched_rank()}: {explain(error)}", file=sys.stderr)
        raise SystemExit(1) from error


def explain(error: Exception) -> str:
    """Return one line about an error that no setting caused: which process ended, if the error says so."""
    text = " ".join(str(error).split())
    if text.startswith("DataLoader worker"):
        return f"a loader process ended ({text}): memory that ran out is the usual reason, lower data.workers; {GO_ON}"
    if of_lost_rank(error):
        return f"another rank ended, or does not answer; its own output says why. {GO_ON}"
    return f"{type(error).__name__}: {text[:300]}"


def run_process(argv: list[str] | None = None) -> None:
    """`main` for a process that does nothing else. End it without Python's finalization, which can abort in a process
    group's threads and lose the exit code."""
    try:
        main(argv)
    except SystemExit as ending:  # its traceback keeps the progress bar from writing below the last line
        if not dist.is_initialized():
            raise
        end_process(ending.code)
    else:
        end_process(0)


if __name__ == "__main__":
    run_process()
