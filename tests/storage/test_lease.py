"""One run at a time holds a folder; a run that is gone is replaced, one that lives is not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import LOCK_FILE, Clock, Lease, check_unlocked, directory_lock
from vr_jax.storage.lease import STALE_AFTER, Holder
from vr_jax.storage.lease_file import DiskLeaseFile

START = float(int(time.time()))
SINCE = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(START))


class FakeTime:
    """A clock that begins at the real time, and then moves only when somebody waits, or when told to."""

    def __init__(self):
        self.time = START
        self.waits = []

    def now(self):
        return self.time

    def pause(self, seconds):
        self.waits.append(seconds)
        self.time += seconds

    @property
    def clock(self):
        return Clock(self.now, self.pause)


@pytest.fixture
def fake():
    return FakeTime()


@pytest.fixture
def path(tmp_path):
    return tmp_path / LOCK_FILE


def acquire(path, fake, **options):
    return Lease.acquire(str(path.parent), DiskLeaseFile(path), clock=fake.clock, **options)


def held_elsewhere(path, fake, **changes):
    """A lease of a living process of another host, or of whom `changes` say."""
    changes = {"host": "elsewhere", "machine": "another machine", "user": "ann", "process": 7} | changes
    holder = dataclasses.replace(Holder.this_process(fake.now()), **changes)
    assert DiskLeaseFile(path).create(holder.record(), fake.now())
    return holder


def test_the_file_names_the_holder_and_goes_at_the_end(path, fake):
    lease = acquire(path, fake)
    found = json.loads(path.read_text())
    assert (found["process"], found["since"]) == (os.getpid(), SINCE)
    assert found["host"]
    assert found["user"]
    lease.check()
    lease.release()
    assert not path.exists()


def test_a_second_run_is_refused_in_one_line_that_names_the_first(path, fake):
    lease = acquire(path, fake)
    fake.time += 5
    with pytest.raises(UserError) as error:
        acquire(path, fake)
    message = str(error.value)
    assert f"{path.parent} is in use by another run" in message
    assert f"process {os.getpid()}, since {SINCE}, last sign of life 5 s ago" in message
    assert "\n" not in message
    lease.release()
    acquire(path, fake).release()


def test_a_refreshed_lease_never_becomes_stale(path, fake):
    lease = acquire(path, fake)
    for _ in range(5):
        fake.time += STALE_AFTER - 1
        with pytest.raises(UserError, match=f"last sign of life {STALE_AFTER - 1:.0f} s ago"):
            acquire(path, fake)
        lease.refresh()
    lease.release()


def test_a_restart_on_another_host_waits_until_the_lease_is_stale(path, fake):
    held_elsewhere(path, fake)
    with pytest.raises(UserError, match=r"ann@elsewhere, process 7"):
        acquire(path, fake, wait=STALE_AFTER / 2)
    assert fake.now() - START == pytest.approx(STALE_AFTER / 2, abs=1)
    lease = acquire(path, fake, wait=2 * STALE_AFTER)
    assert fake.now() - START == pytest.approx(STALE_AFTER, abs=2)
    lease.check()
    lease.release()
    assert not path.exists()


def test_who_waits_says_so_and_goes_on_as_soon_as_the_holder_ends(path, fake, caplog):
    held_elsewhere(path, fake)
    pause = fake.pause

    def pause_and_end(seconds):
        pause(seconds)
        if len(fake.waits) == 3:
            path.unlink()

    fake.pause = pause_and_end
    acquire(path, fake, wait=1000).release()
    assert len(fake.waits) == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "is held by ann@elsewhere, process 7" in line
    assert f"taken over after {STALE_AFTER:.0f} s without one" in line


def test_a_second_run_on_this_host_is_refused_at_once_however_long_it_would_wait(path, fake):
    lease = acquire(path, fake)
    with pytest.raises(UserError, match=f"in use by another run .*process {os.getpid()}, since"):
        acquire(path, fake, wait=1000)
    assert fake.waits == []
    lease.release()


def test_a_holder_on_another_host_that_gives_a_sign_of_life_is_not_waited_for(path, fake):
    held_elsewhere(path, fake)
    pause = fake.pause

    def pause_and_refresh(seconds):
        pause(seconds)
        if len(fake.waits) == 4:
            os.utime(path, (fake.time, fake.time))

    fake.pause = pause_and_refresh
    with pytest.raises(UserError, match=r"in use by another run \(ann@elsewhere, process 7"):
        acquire(path, fake, wait=1000)
    assert len(fake.waits) == 4


def test_a_process_of_this_machine_that_has_ended_is_replaced_at_once(path, fake):
    ended = subprocess.Popen(["true"])
    ended.wait()
    this = Holder.this_process(fake.now())
    held_elsewhere(path, fake, host=this.host, machine=this.machine, process=ended.pid)
    acquire(path, fake).release()
    assert fake.waits == []


def test_another_process_with_the_number_of_the_holder_is_not_taken_for_it(path, fake):
    this = Holder.this_process(fake.now())
    held_elsewhere(path, fake, machine=this.machine, process=os.getpid(), started="1")
    acquire(path, fake).release()


def test_the_same_number_in_another_container_is_no_sign_of_an_end(path, fake):
    held_elsewhere(path, fake, process=2**22 + 1)
    with pytest.raises(UserError, match="in use"):
        acquire(path, fake)


def test_a_file_cut_short_by_a_kill_is_replaced_once_stale(path, fake):
    path.touch()
    os.utime(path, (START, START))
    with pytest.raises(UserError, match=r"in use by another run \(unknown, last sign of life 0 s ago\)"):
        acquire(path, fake)
    fake.time += STALE_AFTER + 1
    acquire(path, fake).release()


def test_of_two_who_find_a_stale_lease_one_gets_it(path, fake):
    """The order that breaks naive take-overs: both have judged before one removes and creates."""
    held_elsewhere(path, fake)
    first, second = DiskLeaseFile(path), DiskLeaseFile(path)
    judged_first, judged_second = first.read(), second.read()
    assert first.remove(judged_first)
    mine = first.create(b"first", fake.now())
    assert not second.remove(judged_second)
    assert second.create(b"second", fake.now()) is None
    assert first.read() == mine
    assert path.read_bytes() == b"first"


def test_a_holder_that_wakes_up_just_before_the_take_over_keeps_its_lease(path, fake):
    file = DiskLeaseFile(path)
    mine = file.create(b"mine", fake.now())
    fake.time += 1000
    judged = DiskLeaseFile(path).read()
    assert file.refresh(mine, fake.now())
    assert not DiskLeaseFile(path).remove(judged)


def test_a_holder_that_stood_still_for_too_long_is_told(path, fake, caplog):
    slow = acquire(path, fake)
    fake.time += STALE_AFTER + 1
    fast = acquire(path, fake)
    before = path.stat().st_mtime_ns
    fake.time += 1
    slow.refresh()
    assert path.stat().st_mtime_ns == before  # not the one's own file any more
    with pytest.raises(UserError, match="lease was given to another run"):
        slow.check()
    assert "lease was given to another run" in caplog.text
    slow.release()
    fast.check()
    assert path.exists()
    fast.release()
    assert not path.exists()


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_at_once_exactly_one_gets_the_lease(path, fake, stale):
    """Threads, each with a lease file of its own, as processes have."""
    for _ in range(30):
        if stale:
            held_elsewhere(path, fake)
            os.utime(path, (START - STALE_AFTER - 1,) * 2)
        start, leases, refused = threading.Barrier(6), [], []

        def contend(start=start, leases=leases, refused=refused):
            start.wait()
            try:
                leases.append(acquire(path, fake))
            except UserError as error:
                refused.append(error)

        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(leases), len(refused)) == (1, 5)
        leases[0].check()
        leases[0].release()
        assert not path.exists()


def test_an_error_gives_the_folder_back(tmp_path):
    def fail():
        with directory_lock(tmp_path / "a" / "b"):
            assert os.listdir(tmp_path / "a" / "b") == [LOCK_FILE]
            with pytest.raises(UserError, match="in use"):
                check_unlocked(tmp_path / "a" / "b")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path / "a" / "b") == []
    check_unlocked(tmp_path / "a" / "b")
    check_unlocked(tmp_path / "absent")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is not a folder"), directory_lock(path):
            pytest.fail("a file was held")


HOLD = """
import sys
from vr_jax.storage import directory_lock
with directory_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_run_leaves_a_folder_that_the_next_one_takes_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=rf"process {process.pid}, since"),
        directory_lock(tmp_path),
    ):
        pytest.fail("held twice")
    process.kill()
    # The process has ended, and nobody has collected its exit status yet.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with directory_lock(tmp_path):
        assert f'"process": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
    assert process.wait() == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_lost_holder_whose_clock_was_ahead_is_followed(tmp_path):
    """Its last refresh lies in the future, and it gives no sign of life for longer than the time that counts."""
    file = DiskLeaseFile(tmp_path / ".lock")
    lost = dataclasses.replace(Holder.this_process(0.0), machine="another")
    assert file.create(lost.record(), 1e9 + 3600) is not None
    now = [1e9]
    clock = Clock(now=lambda: now[0], pause=lambda seconds: now.__setitem__(0, now[0] + seconds))
    Lease.acquire("runs/x", file, wait=90, clock=clock).release()
    assert 60 < now[0] - 1e9 < 70
