"""The examples for several machines, on two network namespaces of this one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {"torchrun": ["ip"], "hostfile": ["ip", "sshd", "pdsh"], "slurm": ["ip", "slurmctld", "slurmd", "munged"]}
PACKAGES = "openssh-server pdsh iproute2 slurm-wlm"


@pytest.mark.drill
@pytest.mark.parametrize("launcher", COMMANDS)
def test_two_machines_have_the_curve_of_one(launcher):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    missing = [command for command in COMMANDS[launcher] if shutil.which(command, path=path) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'network namespaces'}: apt-get install {PACKAGES}")
    script = Path(__file__).with_name("two_nodes.sh")
    done = subprocess.run([script, launcher], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
