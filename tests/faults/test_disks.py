"""A disk without room, files that cannot be read or are not there: one line, and the same goes on."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from bench import Bench, assert_one_line, can_mount
from small_run import INPUTS, OUTPUTS, RECONSTRUCT, RESULTS, STACK, TRAIN, files_of, jobs

from flexlib.files import atomic_path

READ_AGAIN = [("prepare", STACK), ("reconstruct", STACK), ("train", str(RESULTS / "particles/train.mrcs"))]
CASES = [(stage, path) for stage in INPUTS for path in INPUTS[stage]]


NO_ROOM = ("no room for", "No space left", "File too large", "is the disk full")  # before the work, or in it


class SmallDisk:
    """A file system of its own under the bench, which has as much room as is wanted."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def _mount(self, *options: str) -> None:
        command = ["nsenter", "--mount", "--target", str(self.bench.runner.process.pid)]
        subprocess.run([*command, *options, str(self.bench.folder)], check=True)

    def prepare(self, stage: str) -> None:
        """The disk, with all that is there before the stage."""
        self._mount("mount", "-t", "tmpfs", "-o", "size=64m", "none")
        self.bench.clear(stage)
        usage = shutil.disk_usage(self.bench.seen)
        self.used = usage.used

    def fault(self, room: int) -> dict[str, object]:
        """Leave so many bytes; nothing need be done in the process."""
        self._mount("mount", "-o", f"remount,size={self.used + room}", "none")
        return {}

    def make_room(self) -> None:
        """As if the user had removed something."""
        self._mount("mount", "-o", "remount,size=64m", "none")

    def remove(self) -> None:
        """The former disk comes back."""
        self._mount("umount", "--lazy")


class SmallFiles:
    """Where nothing can be mounted: no file may become larger than the room that is left."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def prepare(self, stage: str) -> None:
        """See ``SmallDisk``."""
        self.bench.clear(stage)

    def fault(self, room: int) -> dict[str, object]:
        """See ``SmallDisk``."""
        return {"kind": "file_size_limit", "most": room}

    def make_room(self) -> None:
        """Only the process with the fault has the limit."""

    def remove(self) -> None:
        """Nothing was mounted."""


@pytest.fixture(params=["disk", "files"])
def room(request, bench):
    """What limits the room: both are tried where a disk can be mounted, the second alone where not."""
    chosen = SmallDisk(bench) if request.param == "disk" and can_mount() else SmallFiles(bench)
    yield chosen
    chosen.remove()


@pytest.mark.parametrize("stage", OUTPUTS)
def test_no_room_then_room(bench, room, stage):
    """Full at once, in the middle, and close to the end; each time by the same command in the same folder."""
    sizes = sorted(path.stat().st_size for path in files_of(bench.reference, stage).values())
    on_disk = sum(4096 * -(-size // 4096) for size in sizes)
    room.prepare(stage)
    rooms = (4096, on_disk // 2) if isinstance(room, SmallDisk) else (4096 if sizes[-1] > 4096 else 100, sizes[-1] // 2)
    for left in rooms[: 1 if stage == "report" else 2]:
        ended = bench.runner.run(jobs()[stage], **room.fault(left))
        if ended.status == 0:
            break  # what was written before is not written again
        assert ended.status == 1
        assert_one_line(ended, str(OUTPUTS[stage][0].parent))
        assert any(words in ended.errors[0] for words in NO_ROOM)
        room.make_room()
        bench.check_whole(stage)
    room.make_room()
    bench.finish(stage)


@pytest.mark.parametrize(("stage", "path"), CASES)
def test_read_error(bench, stage, path):
    """The disk gives the first bytes of an input and then none."""
    bench.clear(stage)
    good = (bench.folder / path).stat().st_size // 2
    ended = bench.runner.run(jobs()[stage], kind="read_error", path=path, good=good)
    if stage == "report" and path.startswith(str(TRAIN)):  # what cannot be read of a point is left out, and told
        assert ended.status == 0 and "Traceback" not in ended.said
        return
    assert ended.status == 1
    assert_one_line(ended, path, "Input/output error")
    bench.check_whole(stage)


@pytest.mark.parametrize(("stage", "path"), CASES)
def test_cut_off(bench, stage, path):
    """The second half of an input is missing, from the middle of a line on where it is text."""
    bench.clear(stage)
    whole = (bench.folder / path).read_bytes()
    half = len(whole) // 2
    while whole[half - 1 : half] in (b"\n", b" "):
        half += 1
    (bench.folder / path).write_bytes(whole[:half])
    ended = bench.runner.run(jobs()[stage])
    if stage == "checksum" and not path.endswith(".star"):
        assert ended.status == 0  # it notes what is there
        return
    if stage == "report":
        assert ended.status == 0 and "Traceback" not in ended.said
        return
    assert ended.status == 1
    assert_one_line(ended, path)


@pytest.mark.parametrize(("stage", "path"), CASES)
def test_not_there(bench, stage, path):
    bench.clear(stage)
    (bench.folder / path).unlink()
    ended = bench.runner.run(jobs()[stage])
    if stage in ("report", "provenance") or path.endswith("segments.mrc"):  # told, or not needed
        assert ended.status == 0 and "Traceback" not in ended.said
        return
    assert ended.status == 1
    assert_one_line(ended, path)


@pytest.mark.parametrize("action", ["shrink", "unmount"])
@pytest.mark.parametrize(("stage", "path"), READ_AGAIN)
def test_gone_between_the_check_and_the_reading(bench, stage, path, action):
    """Images are read by the thousand after their stack's header was found right: by then the disk may be another."""
    bench.clear(stage)
    ended = bench.runner.run(jobs()[stage], kind="after_open", path=path, at=2, action=action)
    assert ended.status == 1
    assert_one_line(ended, path)
    bench.check_whole(stage)


def test_what_a_killed_writer_left_is_removed_but_not_what_a_living_one_writes(tmp_path):
    abandoned = tmp_path / ".map.1.part.mrc"
    abandoned.touch()
    with atomic_path(tmp_path / "map.mrc") as own:
        assert not abandoned.exists()
        own.rename(other := tmp_path / ".map.2.part.mrc")  # as another process would call it, with its lock
        with atomic_path(tmp_path / "map.mrc") as later:
            later.write_text("later")
        assert other.exists()
        other.rename(own)
    assert [path.name for path in tmp_path.iterdir()] == ["map.mrc"]


def test_missing_mount_then_there_again(bench):
    """The stack's folder is gone between prepare and reconstruct."""
    bench.clear("reconstruct")
    sim = (bench.folder / STACK).parent
    sim.rename(sim.with_suffix(".elsewhere"))
    ended = bench.runner.run(jobs()["reconstruct"])
    assert ended.status == 1
    assert_one_line(ended, STACK)
    assert not (bench.folder / RECONSTRUCT).exists() or not files_of(bench.folder, "reconstruct")
    sim.with_suffix(".elsewhere").rename(sim)
    bench.finish("reconstruct")
