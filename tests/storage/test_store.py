"""A store that fails is asked again, and what is left is one line."""

import builtins

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import StoreError, as_path, store


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """gcsfs waits up to half a minute between its attempts."""
    asleep = store.asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda seconds: asleep(min(seconds, 0.01)))


FAULTS = {
    "busy": {"kind": "status", "status": 503},
    "too many requests": {"kind": "status", "status": 429},
    "broken off": {"kind": "truncated"},
    "short": {"kind": "short"},
    "no reply": {"kind": "dropped"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_twice_is_asked_again(bucket, object_store, fault):
    (bucket / "a").write_bytes(b"content" * 100)
    object_store.inject({"method": "GET", "contains": "/o/", "times": 2, **FAULTS[fault]})
    assert (bucket / "a").read_bytes() == b"content" * 100
    assert object_store.counts()[FAULTS[fault]["kind"]] == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_are_read_again_too(bucket, object_store, fault):
    (bucket / "a").write_bytes(b"content" * 100)
    with (bucket / "a").open("rb") as file:
        object_store.inject({"method": "GET", "contains": "/o/", "times": 2, **FAULTS[fault]})
        assert file.read() == b"content" * 100
    assert object_store.counts()[FAULTS[fault]["kind"]] == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_always_fails_is_one_line(bucket, object_store, fault):
    (bucket / "a").write_bytes(b"content" * 100)
    object_store.inject({"method": "GET", "times": 1000, **FAULTS[fault]})
    with pytest.raises(StoreError, match="cannot be read or written now: after several attempts the store") as found:
        (bucket / "a").read_bytes()
    assert "\n" not in str(found.value)


def test_writes_are_repeated(bucket, object_store):
    object_store.inject({"method": "POST", "times": 2, "kind": "status", "status": 503})
    (bucket / "a").write_bytes(b"content")
    assert (bucket / "a").read_bytes() == b"content"


def test_a_slow_reply_is_given_up_and_asked_for_again(bucket, object_store, monkeypatch):
    (bucket / "a").write_bytes(b"content")
    monkeypatch.setattr(store, "REPLY_SECONDS", 0.3)
    store.connected.cache_clear()
    object_store.inject({"method": "GET", "times": 1, "kind": "slow", "seconds": 2})
    assert (bucket / "a").read_bytes() == b"content"
    assert object_store.counts()["requests"] == 2
    store.connected.cache_clear()


def test_what_is_forbidden_is_no_missing_file(bucket, object_store):
    object_store.inject({"times": 1000, "kind": "status", "status": 403})
    with pytest.raises(PermissionError):
        (bucket / "a").read_bytes()
    with pytest.raises(PermissionError):
        (bucket / "a").exists()


@pytest.mark.parametrize(("address", "extra"), [("gs://b/c", "gcs"), ("s3://b/c", "s3")])
def test_a_missing_library_names_its_extra(monkeypatch, address, extra):
    real = builtins.__import__

    def absent(name, *rest):
        if name.partition(".")[0] in ("gcsfs", "s3fs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, *rest)

    store.connected.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=rf"pip install 'vr-jax\[{extra}\]'"):
        as_path(address).exists()
