"""Everything that a training run imports, for the server that ranks are forked from.

Nothing here may start a thread: a fork has only the one that forks.
"""

import gc
import importlib

import deepspeed.ops

from agrepa_fast.audio.waves import import_torchaudio

for name in (
    "agrepa_fast.train",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "matplotlib.image",
    "pytest",
    "rich.console",
    "scipy.stats",
    "soundfile",
    "torch._dynamo",
    "torch._inductor.distributed_autotune",
    "torch.utils.tensorboard",
):
    importlib.import_module(name)
import_torchaudio()
assert deepspeed.ops.__compatible_ops__  # the first access looks for compilers
gc.collect()
gc.freeze()  # or the first collection in a fork would copy every page
