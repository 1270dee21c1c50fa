"""The object stores behind gs:// and s3://: connections, retries, and what a store that fails is called.

Google's store is reached through gcsfs, S3 and what speaks its protocol through s3fs; both are optional extras. Each
request is repeated while the store asks for it (busy, unavailable, a connection that breaks) for half a minute or so.
What is left then is a `StoreError`, which ends a command with one line. It is no `OSError`, so that nothing takes a
store that does not answer for a file that is not there.

Emulators of stores are named by variables of the environment: STORAGE_EMULATOR_HOST for gs://, AWS_ENDPOINT_URL for
s3://. The first one is told to TensorStore and array_record too, which have names of their own for it.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vr_jax.errors import UserError
from vr_jax.failures import DISTRIBUTION

REPLY_SECONDS = 60.0  # a store that sends nothing for so long is asked again
_CONNECT_SECONDS = 20.0
_REREADS = 4  # attempts to read bytes of which fewer came than were announced
_FORBIDDEN, _ABSENT = {401, 403}, 404
_EXTRAS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_ADDRESSES = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}


class StoreError(UserError):
    """An object store that does not answer, or answers with an error; the message is one line."""


class TruncatedRead(Exception):
    """A store sent fewer bytes than it has; the request is repeated."""


def kind_of(path: str) -> str:
    """Returns the kind of store of an address: "gs" or "s3"."""
    return path.partition("://")[0]


def filesystem(path: str) -> Any:
    """Returns fsspec's interface to the store of an address. It belongs to this process, and is made once.

    Raises:
        UserError: The library for this store is not installed; the message names the extra of this package.
    """
    kind = kind_of(path)
    name, extra = _EXTRAS[kind]
    try:
        # A process that was forked needs connections of its own.
        return connected(kind, os.getpid(), os.environ.get(_ADDRESSES[kind]))
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in (name, "aiohttp", "botocore", "aiobotocore"):
            raise
        raise UserError(f"{path}: {kind}:// needs the library {name}; pip install '{DISTRIBUTION}[{extra}]'") from error


@functools.lru_cache(maxsize=8)
def connected(kind: str, process: int, address: str | None) -> Any:
    """Returns fsspec's interface to a kind of store; one for each process and each address of an emulator."""
    del process, address
    if kind == "gs":
        tell_emulator()
        import aiohttp
        from gcsfs.core import GCSFileSystem

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # What it logs with tracebacks becomes one line here.
        wait = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=REPLY_SECONDS)
        return GCSFileSystem(use_listings_cache=False, requests_timeout=wait, skip_instance_cache=True)
    from s3fs import S3FileSystem

    config = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": REPLY_SECONDS}
    return S3FileSystem(use_listings_cache=False, config_kwargs=config, skip_instance_cache=True)


def refuse_missing_client(path: str) -> None:
    """Makes sure that the store of an address can be reached by this process, and by libraries that it calls.

    Raises:
        UserError: The library for this store is not installed; the message names the extra of this package.
    """
    filesystem(path)


def tell_emulator() -> None:
    """Names the emulator of STORAGE_EMULATOR_HOST to TensorStore and array_record, which have other variables."""
    os.environ.setdefault("EPATH_USE_TF", "false")  # Orbax opens paths by etils, which would import tensorflow.
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if host in ("", "default"):
        return
    address = host if "://" in host else f"http://{host}"
    os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
    os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
    os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # TensorStore would look for credentials
    # An emulator has no zonal or hierarchical buckets, which gcsfs would ask Google about.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@contextmanager
def store_errors(path: str) -> Iterator[None]:
    """Turns what the clients of the stores raise in the block into an `OSError` or a `StoreError`.

    Args:
        path: The address that the block reads or writes.

    Raises:
        FileNotFoundError: There is no such object.
        PermissionError: The store knows no such user, or the user may not do it.
        StoreError: The store did not answer in time, or answered with an error.
    """
    try:
        yield
    except (UserError, IsADirectoryError, NotADirectoryError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
    except Exception as error:
        translated = _translated(error, path)
        if translated is None:
            raise
        raise translated from error


def _translated(error: Exception, path: str) -> Exception | None:
    """The error to raise in the place of a client's, or None for one that is not about the store."""
    code = _status(error)
    if code == _ABSENT:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if code in _FORBIDDEN or isinstance(error, PermissionError) or text.startswith("Forbidden"):
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    family = type(error).__module__.partition(".")[0]
    about_store = isinstance(error, OSError | TruncatedRead | asyncio.TimeoutError) or text.startswith("Bad Request")
    if not about_store and family not in (
        "aiohttp",
        "gcsfs",
        "google",
        "requests",
        "botocore",
        "aiobotocore",
        "fsspec",
    ):
        return None
    if type(error).__name__ in ("DefaultCredentialsError", "NoCredentialsError", "RefreshError"):
        return StoreError(f"{path} cannot be opened: no credentials for the store are found ({text}); log in first")
    said = f"answered {code} ({text})" if code else f"does not answer as it should ({type(error).__name__}: {text})"
    return StoreError(
        f"{path} cannot be read or written now: after several attempts the store {said}; when it is back, start the "
        "same command again"
    )


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of gcsfs, aiohttp or botocore carries."""
    response = getattr(error, "response", None)
    found = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode", found)
    try:
        return int(found) if found is not None else None
    except (TypeError, ValueError):
        return None


def reread[T](read: Callable[[], T]) -> T:
    """Calls a function that reads, again where fewer bytes came than the store has.

    Raises:
        TruncatedRead: The last attempt failed like the others.
    """
    for attempt in range(_REREADS):
        try:
            return read()
        except TruncatedRead:
            if attempt == _REREADS - 1:
                raise
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def read_range(path: str, begin: int, end: int) -> bytes:
    """Reads the bytes begin..end-1 of an object.

    Raises:
        FileNotFoundError: There is no such object.
        StoreError: The store failed.
    """
    if end <= begin:
        return b""

    def read() -> bytes:
        data: bytes = filesystem(path).cat_file(path, start=begin, end=end)
        if len(data) != end - begin:
            raise TruncatedRead(f"{len(data)} bytes came, expected {end - begin}")
        return data

    with store_errors(path):
        return reread(read)


def read_object(path: str) -> bytes:
    """Reads a whole object and compares it with the store's checksum, where the store sends one.

    Raises:
        FileNotFoundError: There is no such object.
        StoreError: The store failed.
    """
    with store_errors(path):
        if kind_of(path) == "gs":
            return reread(lambda: _read_gs(path))
        return reread(lambda: _read_s3(path))


def _read_gs(path: str) -> bytes:
    store = filesystem(path)
    headers, data = store.call("GET", store.url(path))
    sent = [one.partition("=") for one in headers.get("X-Goog-Hash", "").split(",")]
    wanted = next((value for name, _, value in sent if name.strip() == "crc32c"), None)
    if wanted is not None and headers.get("Content-Encoding") is None and crc32c(data) != wanted:
        raise TruncatedRead(f"{len(data)} bytes came whose checksum is another one than the store's")
    return data


def _read_s3(path: str) -> bytes:
    store = filesystem(path)
    size = store.info(path)["size"]
    data: bytes = store.cat_file(path)
    if len(data) != size:
        raise TruncatedRead(f"{len(data)} bytes came, expected {size}")
    return data


def crc32c(data: bytes) -> str:
    """Returns the checksum of bytes as Google's store names it."""
    import base64

    import google_crc32c

    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def write_object(path: str, data: bytes) -> None:
    """Writes a whole object; it is there whole, or as it was before.

    Raises:
        StoreError: The store failed.
        PermissionError: This user may not write there, or there is no such bucket.
    """
    with store_errors(path):
        filesystem(path).pipe_file(path, data)
