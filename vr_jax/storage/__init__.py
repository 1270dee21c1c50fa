"""Files and folders that are either whole or absent, and who may write to a folder (a leaf module).

`as_path` makes the paths of the whole package: those of a disk are `pathlib.Path`, and those of a bucket (gs://, s3://)
have the same methods (`BucketPath`). `Path` is the type of both. This package alone knows how a file is written whole
(`atomic_write`), how one grows (`AppendedFile`), how a folder is moved and removed, how it becomes complete (a marker
file written last), who holds it (a lease file with a heartbeat), and how a library that knows disks only reads
(`on_disk`) and writes (`UploadedFolder`) what lies in a bucket. Everything that the operating system or a store refuses
is a `UserError`.
"""

from vr_jax.storage.bucket_path import BucketPath
from vr_jax.storage.disk_copy import on_disk
from vr_jax.storage.files import (
    Path,
    PathLike,
    as_path,
    atomic_write,
    file_errors,
    for_library,
    is_local,
    move_folder,
    remove_empty_folders,
    remove_folder,
    write_bytes,
    write_json,
    write_text,
)
from vr_jax.storage.folders import (
    COMPLETE_MARKER,
    check_complete,
    check_free,
    check_target,
    complete_directory,
    is_complete,
    owner_of,
    results_folder,
)
from vr_jax.storage.growing import AppendedFile, UploadedFolder
from vr_jax.storage.json_text import RepeatedKey, parse_json
from vr_jax.storage.lease import (
    LOCK_FILE,
    STALE_AFTER,
    Clock,
    Lease,
    check_unlocked,
    directory_lock,
    lease,
    make_folder,
)
from vr_jax.storage.paths import (
    check_apart,
    in_order,
    matching_paths,
    refuse_s3,
    split_paths,
)
from vr_jax.storage.store import StoreError, refuse_missing_client

__all__ = [
    "COMPLETE_MARKER",
    "LOCK_FILE",
    "STALE_AFTER",
    "AppendedFile",
    "BucketPath",
    "Clock",
    "Lease",
    "Path",
    "PathLike",
    "RepeatedKey",
    "StoreError",
    "UploadedFolder",
    "as_path",
    "atomic_write",
    "check_apart",
    "check_complete",
    "check_free",
    "check_target",
    "check_unlocked",
    "complete_directory",
    "directory_lock",
    "file_errors",
    "for_library",
    "in_order",
    "is_complete",
    "is_local",
    "lease",
    "make_folder",
    "matching_paths",
    "move_folder",
    "on_disk",
    "owner_of",
    "parse_json",
    "refuse_missing_client",
    "refuse_s3",
    "remove_empty_folders",
    "remove_folder",
    "results_folder",
    "split_paths",
    "write_bytes",
    "write_json",
    "write_text",
]
