"""The lease file in a bucket: an object that is written and removed only if it still is what was read before.

Google's store numbers the states of an object (`generation`), S3 names them (`ETag`). Both refuse a request whose
condition does not hold, so that of two processes exactly one succeeds. A client repeats a request whose reply was lost;
where the first attempt had succeeded, the second one is refused, and the record tells that it was our own.
"""

from __future__ import annotations

from typing import Any

from vr_jax.storage import store
from vr_jax.storage.lease_file import Version

_ABSENT = ""  # the tag that stands for "there is no object"
_REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


class BucketLeaseFile:
    """A `LeaseFile` in a bucket. The object holds the record, a line end, and the time of the last refresh."""

    def __init__(self, path: str):
        """Remembers the address of the object."""
        self._path = path
        self._object = GoogleObject(path) if store.kind_of(path) == "gs" else S3Object(path)
        self._tag = _ABSENT  # of the last state that this process has read or written

    def create(self, record: bytes, now: float) -> Version | None:
        """Creates the object and returns its state; returns None if it exists."""
        return self._write(Version(record, int(now * 1e9)), _ABSENT)

    def read(self) -> Version | None:
        """Returns the present state, or None if there is no object."""
        with store.store_errors(self._path):
            found = store.reread(self._object.get)
        if found is None:
            return None
        content, self._tag = found
        record, _, refreshed = content.rstrip().rpartition(b"\n")
        try:
            return Version(record + b"\n", int(refreshed))
        except ValueError:  # Something else has written it.
            return Version(content, 0)

    def refresh(self, version: Version, now: float) -> Version | None:
        """Sets the time of the last refresh if the object is still the holder's; returns None if it is not."""
        found = self.read()
        if found is None or found.record != version.record:
            return None
        return self._write(Version(version.record, int(now * 1e9)), self._tag)

    def remove(self, version: Version) -> bool:
        """Removes the object if it still is in this state; returns whether it did."""
        if self.read() != version:
            return False
        with store.store_errors(self._path):
            return self._object.delete(self._tag)

    def _write(self, version: Version, expected: str) -> Version | None:
        content = version.record.rstrip(b"\n") + b"\n" + str(version.refreshed).encode() + b"\n"
        with store.store_errors(self._path):
            tag = self._object.put(content, expected)
        if tag is None:
            found = self.read()
            if found != version:
                return None
            return found
        self._tag = tag
        return version


def _whole(content: bytes, size: int) -> bytes:
    """Returns the content of an object if it is whole, because a part of a record is that of nobody."""
    if len(content) != size:
        raise store.TruncatedRead(f"{len(content)} bytes came, expected {size}")
    return content


class GoogleObject:
    """An object of Google's store, with conditions on its generation."""

    def __init__(self, path: str):
        self._path = path
        self._bucket, _, self._name = path.partition("://")[2].partition("/")

    def put(self, content: bytes, expected: str) -> str | None:
        client = store.filesystem(self._path)
        try:
            written: dict[str, Any] = client.call(
                "POST",
                f"{client._location}/upload/storage/v1/b/{self._bucket}/o",  # noqa: SLF001  # gcsfs has no other name
                uploadType="media",
                name=self._name,
                ifGenerationMatch=expected or "0",
                data=content,
                json_out=True,
            )
        except FileExistsError:  # what gcsfs makes of 412
            return None
        return str(written["generation"])

    def get(self) -> tuple[bytes, str] | None:
        client = store.filesystem(self._path)
        # The generation is asked for before the content: a state that changes between both is found by its condition.
        for _ in range(3):
            try:
                state = client.call("GET", "b/{}/o/{}", self._bucket, self._name, json_out=True)
                tag = str(state["generation"])
                _, content = client.call("GET", "b/{}/o/{}", self._bucket, self._name, alt="media", generation=tag)
            except FileNotFoundError:
                try:
                    client.call("GET", "b/{}/o/{}", self._bucket, self._name, json_out=True)
                except FileNotFoundError:
                    return None
                continue  # It was written anew between the two requests.
            return _whole(content, int(state["size"])), tag
        return None

    def delete(self, expected: str) -> bool:
        client = store.filesystem(self._path)
        try:
            client.call("DELETE", "b/{}/o/{}", self._bucket, self._name, ifGenerationMatch=expected)
        except (FileExistsError, FileNotFoundError):
            return False
        return True


class S3Object:
    """An object of S3, with conditions on its tag."""

    def __init__(self, path: str):
        self._path = path
        bucket, _, name = path.partition("://")[2].partition("/")
        self._where = {"Bucket": bucket, "Key": name}

    def put(self, content: bytes, expected: str) -> str | None:
        condition = {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
        written = self._call("put_object", Body=content, **condition)
        return None if written is None else str(written["ETag"])

    def get(self) -> tuple[bytes, str] | None:
        client = store.filesystem(self._path)
        try:
            state = client.info(self._path)
            return _whole(client.cat_file(self._path), int(state["size"])), str(state["ETag"])
        except FileNotFoundError:
            return None

    def delete(self, expected: str) -> bool:
        return self._call("delete_object", IfMatch=expected) is not None

    def _call(self, method: str, **arguments: Any) -> dict[str, Any] | None:
        """What S3 replies, or None where the condition does not hold."""
        client = store.filesystem(self._path)
        try:
            reply: dict[str, Any] = client.call_s3(method, **self._where, **arguments)
            return reply
        except FileNotFoundError:
            return None
        except Exception as error:
            text = f"{error} {getattr(error.__cause__, 'response', '')}"
            if any(word in text for word in _REFUSED):
                return None
            raise


__all__ = ["BucketLeaseFile"]
