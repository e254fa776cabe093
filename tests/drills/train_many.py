"""One rank of a group that trains many runs in the same processes: `train_many.py JOBS.json`. Starting a process takes
longer than training one of these runs."""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
import torch.nn.functional as functional

import agrepa_fast.train
from agrepa_fast import load_config
from agrepa_fast.zero.engine import start_ranks

start_ranks()
dist.destroy_process_group = lambda: None
agrepa_fast.train.finish = lambda *_: None  # plots and samples
linear = functional.linear
for job in json.loads(Path(sys.argv[1]).read_text()):
    functional.linear = linear  # ZeRO-3 leaves its own behind, which rounds otherwise in bf16
    run = Path(job["run"])
    if job["source"] and dist.get_rank() == 0:
        shutil.copytree(job["source"], run)
    dist.barrier()
    config = load_config(job["preset"] or run / "config.yaml", [*job["overrides"], f"run.dir={run}"])
    agrepa_fast.train.train(config, job["ds_config"], job["resume"])
