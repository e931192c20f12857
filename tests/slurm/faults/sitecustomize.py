"""A training that can be made to run out of memory from outside; on PYTHONPATH of the jobs of test_slurm.py only.

Python imports this at each start. In a training, a thread waits for the file ``$EAT_MEMORY/<process id>`` and then
takes memory until SLURM ends the job: 4 GB at most, so that where SLURM does not, the test fails and the machine lives.
"""

import os
import sys
import threading
import time
from pathlib import Path

MOST_MB = 4096


def eat_memory(order: Path) -> None:
    while not order.exists():
        time.sleep(0.1)
    eaten = [bytearray(os.urandom(1024) * 1024) * 64 for _ in range(MOST_MB // 64)]
    os.kill(os.getpid(), 19)  # SIGSTOP: holds what it has, and trains no further
    del eaten


if "EAT_MEMORY" in os.environ and getattr(sys, "orig_argv", [""])[-1].endswith(".train.py"):
    order = Path(os.environ["EAT_MEMORY"]) / str(os.getpid())
    threading.Thread(target=eat_memory, args=(order,), daemon=True).start()
