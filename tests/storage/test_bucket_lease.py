"""A lease in a bucket is given to one of several, whatever happens between their requests."""

import threading
from contextlib import suppress

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import bucket_lease, check_unlocked, complete_directory, directory_lock, is_complete, lease
from vr_jax.storage.bucket_lease import BucketLeaseFile
from vr_jax.storage.lease import Clock, Lease


@pytest.fixture
def file(bucket):
    return BucketLeaseFile(str(bucket / ".lock"))


def test_of_many_one_gets_it(bucket):
    """All of them ask at the same moment, ten times over."""
    for number in range(10):
        path, begin, got = str(bucket / f"{number}.lock"), threading.Barrier(6), []

        def ask(k, path=path, begin=begin, got=got):
            begin.wait()
            if BucketLeaseFile(path).create(b"%d\n" % k, 0.0) is not None:
                got.append(k)

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(6)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert len(got) == 1
        assert BucketLeaseFile(path).read().record == b"%d\n" % got[0]


def test_a_state_is_read_refreshed_and_removed(file):
    first = file.create(b"me\n", 5.0)
    assert (first.record, first.refreshed) == (b"me\n", 5_000_000_000)
    assert file.read() == first
    second = file.refresh(first, 6.0)
    assert second.refreshed == 6_000_000_000
    assert not file.remove(first)  # it is another state by now
    assert file.remove(second)
    assert file.read() is None
    assert file.refresh(second, 7.0) is None
    assert not file.remove(second)


def test_a_holder_that_was_replaced_changes_nothing(file, bucket):
    mine = file.create(b"me\n", 0.0)
    other = BucketLeaseFile(str(bucket / ".lock"))
    assert other.remove(other.read())
    theirs = other.create(b"other\n", 1.0)
    assert file.refresh(mine, 2.0) is None
    assert not file.remove(mine)
    assert other.read() == theirs


def test_a_change_between_reading_and_writing_is_seen(file, bucket, monkeypatch):
    """Another process takes the lease over after ours was read, and before it is written."""
    mine = file.create(b"me\n", 0.0)
    other = BucketLeaseFile(str(bucket / ".lock"))
    put = bucket_lease.GoogleObject.put

    def late(self, content, expected):
        if b"me" in content:
            monkeypatch.setattr(bucket_lease.GoogleObject, "put", put)
            assert other.remove(other.read())
            assert other.create(b"other\n", 1.0)
        return put(self, content, expected)

    monkeypatch.setattr(bucket_lease.GoogleObject, "put", late)
    assert file.refresh(mine, 2.0) is None
    assert file.read().record == b"other\n"


def test_a_reply_that_was_lost_is_no_other_holder(file, object_store):
    """The store created the object, and the connection broke before the reply came; the client asks again."""
    object_store.inject({"method": "POST", "kind": "truncated", "times": 1})
    made = file.create(b"me\n", 3.0)
    assert object_store.counts()["truncated"] == 1
    assert made is not None
    assert file.refresh(made, 4.0) is not None


def test_a_reply_that_is_cut_short_is_no_other_holder(file, object_store):
    """The header of the reply says that this is all."""
    version = file.create(b"mine\n", 1.0)
    object_store.inject({"kind": "short", "method": "GET", "contains": "alt=media", "times": 1})
    try:
        assert file.read() == version
        assert object_store.counts()["short"] == 1
    finally:
        object_store.inject()


def test_a_folder_of_a_bucket_is_held(bucket):
    with directory_lock(bucket):
        with pytest.raises(UserError, match="is in use by another run"), lease(bucket / ".lock"):
            pass
        with pytest.raises(UserError, match="is in use by another run"):
            check_unlocked(bucket)
    check_unlocked(bucket)
    assert not (bucket / ".lock").exists()


def test_a_holder_without_a_sign_of_life_is_followed(bucket):
    place, now = str(bucket / ".lock"), [1000.0]
    clock = Clock(now=lambda: now[0], pause=lambda seconds: None)
    gone = BucketLeaseFile(place)
    gone.create(b'{"token": "x"}\n', 0.0)
    held = Lease.acquire(place, BucketLeaseFile(place), clock=clock)
    held.check()
    held.release()


def test_a_folder_is_whole_or_counts_as_absent(bucket):
    target = bucket / "m"
    with complete_directory(target) as folder:
        (folder / "one").write_text("1")
        assert not is_complete(target)
    assert is_complete(target)
    (target / "results.json").write_text("of an evaluation")
    with pytest.raises(UserError, match="exists; choose another folder"), complete_directory(target):
        pass
    with suppress(ZeroDivisionError), complete_directory(target, overwrite=True) as folder:
        assert not (folder / "one").exists()
        (folder / "two").write_text("half")
        raise ZeroDivisionError
    assert not is_complete(target)
    with complete_directory(target) as folder:
        (folder / "three").write_text("3")
    assert sorted(path.name for path in target.iterdir()) == ["_COMPLETE", "results.json", "three"]


def test_a_folder_of_others_is_not_replaced(bucket):
    (bucket / "m" / "notes.txt").write_text("mine")
    held = complete_directory(bucket / "m", overwrite=True)
    with pytest.raises(UserError, match="holds files that vr-jax did not write"), held:
        pass
    assert (bucket / "m" / "notes.txt").read_text() == "mine"
