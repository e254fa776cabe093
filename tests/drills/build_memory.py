"""Measure the memory of each rank while a model is built: deepspeed --num_gpus 2 tests/drills/build_memory.py

Shows that under ZeRO-3 no rank ever holds the whole model. Prints one JSON line per rank, with sizes in bytes.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from agrepa_fast.config_file import load_config
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.zero.construction import new_model, whole_shape
from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config
from agrepa_fast.zero.ema import Ema
from agrepa_fast.zero.engine import build_engine
from agrepa_fast.zero.process_group import join_process_group


def resident(field: str) -> int:
    """Return bytes of this process in memory: `VmRSS` for now, `VmHWM` for the peak since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(action) -> tuple[object, dict]:
    """Return action(), and the bytes that the process needed beyond those it had: at its peak, and at the end."""
    forget_peak()
    before = resident("VmRSS")
    made = action()
    return made, {"peak": resident("VmHWM") - before, "kept": resident("VmRSS") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="agrepa-xl")
    parser.add_argument("--ds_config", default="zero3.json")
    parser.add_argument("--engine", action="store_true", help="go on: DeepSpeed's engine with AdamW, and the EMA")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    config = load_config(args.preset, ["model.n_mels=100", "model.vocab=8192", *args.overrides])
    device = join_process_group()
    world = dist.get_world_size()
    layout = BatchLayout(config.train.batch_clips, config.train.accumulation, dist.get_rank(), world)
    ds_config = resolve_ds_config(find_ds_config(args.ds_config), config.train, layout, device)
    torch.manual_seed(config.run.seed)
    model, build = measure(lambda: new_model(config, ds_config))
    count = sum(torch.Size(whole_shape(parameter)).numel() for parameter in model.parameters())
    found = {"rank": dist.get_rank(), "ranks": world, "parameters": count, "whole_fp32": 4 * count, "build": build}
    if args.engine:

        def engine_and_average():
            engine = build_engine(model, config, ds_config)
            return engine, Ema(engine, config.train.ema_decay)

        _, found["engine"] = measure(engine_and_average)
    for rank in range(world):  # one line at a time
        if rank == dist.get_rank():
            print(json.dumps(found), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
