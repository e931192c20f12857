"""Training images are read from a stack four times what the process may take on top of a first batch.

A whole training run on such a stack takes minutes: benchmarks/bench_larger_than_memory.py.
"""

import subprocess
import sys

LIMIT_BYTES = 100_000_000
BOX, IMAGES = 128, 6400  # 419 MB

_READ = """
import resource, sys
from pathlib import Path
import numpy as np
from flexlib.images.batch import read_ahead, split_batches
from flexlib.images.noise import Calibration
from flexlib.images.sources import TrainingImages
from flexlib.images.stack import read_stack_header
from flexlib.particles.table import OpticsGroup, Particles

def status_bytes(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

path, limit = Path(sys.argv[1]), int(sys.argv[2])
header = read_stack_header(path)
n, box, zeros = header.num_images, header.box, np.zeros(header.num_images)
particles = Particles(
    optics=(OpticsGroup("1", 300.0, 2.7, 0.1, 2.0, box),), optics_index=zeros.astype(np.int32),
    rotation=np.broadcast_to(np.eye(3), (n, 3, 3)), origin_A=np.zeros((n, 2)), defocus_u_A=zeros + 1e4,
    defocus_v_A=zeros + 1e4, defocus_angle_rad=zeros, phase_shift_rad=zeros, ctf_bfactor_A2=zeros,
    ctf_scale=zeros + 1, half_set=(np.arange(n) % 2).astype(np.int8), contrast_sign=zeros + 1, stack_paths=(path,),
    stack_index=zeros.astype(np.int32), image_index=np.arange(n), source_path=path, source_row=np.arange(n),
)
sigma = np.ones((1, box // 2))
source = TrainingImages(
    header, particles, pixel_size_A=2.0, sides_px=np.array([box]), calibration=Calibration(np.ones(1), sigma, box, 2.0)
)
batches = split_batches(np.random.default_rng(0).permutation(n), 50)
for batch in read_ahead(source, batches[:3]):
    pass
resident = status_bytes("VmHWM")
resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + limit,) * 2)
read = sum(len(batch.images) for batch in read_ahead(source, batches))
print(read, status_bytes("VmHWM") - resident)
"""


def test_reading_a_stack_four_times_the_memory_limit(tmp_path):
    """Linux refuses allocations over the limit; pages of a mapped stack would escape it, but not the resident set."""
    import mrcfile

    path = tmp_path / "train.mrcs"
    with mrcfile.new_mmap(path, (IMAGES, BOX, BOX), mrc_mode=2) as stack:  # takes no room on the disk
        stack.set_image_stack()
    assert path.stat().st_size > 4 * LIMIT_BYTES
    done = subprocess.run([sys.executable, "-c", _READ, path, str(LIMIT_BYTES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read, grown_bytes = map(int, done.stdout.split())
    assert read == IMAGES
    assert grown_bytes < LIMIT_BYTES, f"{grown_bytes / 1e6:.0f} MB more are resident"
