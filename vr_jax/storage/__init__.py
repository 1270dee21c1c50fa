"""Files and folders that are either whole or absent, and who may write to a folder (a leaf module).

Paths are `etils.epath` paths. This package alone knows how a folder becomes complete (a marker file written last) and
who holds it (a lease file with a heartbeat). Everything that the operating system refuses is a `UserError`.
"""

from vr_jax.storage.files import (
    AppendedFile,
    PathLike,
    as_path,
    atomic_write,
    file_errors,
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
    local_path,
    matching_paths,
    refuse_buckets,
    split_paths,
)

__all__ = [
    "COMPLETE_MARKER",
    "LOCK_FILE",
    "STALE_AFTER",
    "AppendedFile",
    "Clock",
    "Lease",
    "PathLike",
    "RepeatedKey",
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
    "is_complete",
    "is_local",
    "lease",
    "local_path",
    "make_folder",
    "matching_paths",
    "move_folder",
    "owner_of",
    "parse_json",
    "refuse_buckets",
    "remove_empty_folders",
    "remove_folder",
    "results_folder",
    "split_paths",
    "write_bytes",
    "write_json",
    "write_text",
]
