"""Paths that may be in a bucket of Google Cloud Storage: gs://BUCKET/PATH.

`open_path` gives a `pathlib.Path`, or for a bucket an object with the same methods, as far
as they are used here, and the same errors. A file of a bucket is an object: it appears
once it is complete, and can be replaced but not appended to. A directory is nothing but the
common beginning of names.
"""

import atexit
import errno
import fnmatch
import functools
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from e1jax.config.checks import UserError, shortened, shown

SCHEME = "gs://"
_LOGIN = "log in with: gcloud auth application-default login"
_DENIED = (
    r"forbidden|denied|credential|unauthorized|anonymous|reauthentication|\b40[13]\b"
)

CallT = TypeVar("CallT", bound=Callable[..., Any])


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a name or path is in a bucket."""
    return str(path).startswith(SCHEME)


def open_path(name: str | os.PathLike[str]) -> Path:
    """The path of a name: local, or gs://BUCKET/PATH in a bucket.

    Raises UserError for another scheme (s3://, ...), for an impossible name of a bucket,
    and if the package that reaches buckets is missing. Nothing is asked over the network.
    """
    text = os.fspath(name)
    if not in_bucket(text):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
            raise UserError(
                f"{shown(text)} is neither a local path nor {SCHEME}BUCKET/PATH; give one"
            )
        return Path(name)
    if not re.fullmatch(r"gs://[a-z0-9][-a-z0-9_.]+[a-z0-9](/.*)?", text, re.DOTALL):
        raise UserError(
            f"{shown(text)} names no bucket: that is {SCHEME}BUCKET/PATH, with a bucket of "
            "3 or more small letters, digits, dashes, dots and underscores"
        )
    return cast(Path, BucketPath(text))


def check_local(path: Path | None, flag: str) -> None:
    """Refuses a path in a bucket for a flag that writes local files only."""
    if path is not None and in_bucket(path):
        raise UserError(f"{flag} {path} must be a local path, not one in a bucket")


@functools.cache
def _file_system() -> Any:
    # Else gcsfs asks for the kind of each bucket, by another service and at each call.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        # Slow to load, and an extra.
        import fsspec.config
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing, by which {SCHEME} is read and written; install "
            "it: pip install 'e1jax[gcs]'"
        ) from None
    # Their errors are raised, and told in one sentence.
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Other processes, and tensorstore in this one, write there too. Orbax, which makes a
    # file system of its own, has the same setting by this.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def _explained(method: CallT) -> CallT:
    """The method, whose errors become the ones of a local path: OSError with a reason in
    `strerror`, FileNotFoundError for a missing object."""

    @functools.wraps(method)
    def call(self: "BucketPath", *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise _os_error(error, str(self)) from None

    return cast(CallT, call)


def _os_error(error: Exception, path: str) -> OSError:
    text = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 300)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such object or bucket", path)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of the local disk
        return error
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    if re.search(_DENIED, text, re.IGNORECASE):
        reason = f"access denied ({text}); {_LOGIN}, or ask for the right to the bucket"
        return PermissionError(errno.EACCES, reason, path)
    return OSError(errno.EIO, text, path)


class BucketPath(PurePosixPath):
    """A path in a bucket, with the methods of pathlib.Path that e1jax uses."""

    def __str__(self) -> str:
        return SCHEME + "/".join(self.parts[1:])

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def absolute(self) -> "BucketPath":
        return self

    resolve = expanduser = absolute

    @_explained
    def _type(self) -> str | None:
        """Either "file" or "directory"; None if it is not there. Not fsspec's isfile and
        isdir: to them, a bucket that cannot be reached is empty."""
        try:
            return _file_system().info(str(self))["type"]
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._type() is not None

    def is_dir(self) -> bool:
        return self._type() == "directory"

    def is_file(self) -> bool:
        return self._type() == "file"

    @_explained
    def details(self) -> dict[str, dict[str, Any]]:
        """All files below this directory, by their path within it: size, md5Hash, ..."""
        root = str(self).removeprefix(SCHEME) + "/"
        found = _file_system().find(str(self), detail=True)
        return {name.removeprefix(root): found[name] for name in sorted(found)}

    @_explained
    def iterdir(self) -> Iterator["BucketPath"]:
        names = _file_system().ls(str(self), detail=False)
        paths = (BucketPath(f"{SCHEME}{name.rstrip('/')}") for name in names)
        return iter(sorted({path for path in paths if path != self}))

    def relative_to(self, *other: Any) -> PurePosixPath:  # pyright: ignore
        return PurePosixPath(*self.parts).relative_to(PurePosixPath(*other[0].parts))

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """The files and directories in this one whose names match; none if it is none."""
        head, _, rest = pattern.partition("/")
        if rest:
            return (self / head).glob(rest)
        try:
            paths = self.iterdir()
        except FileNotFoundError:
            return iter(())
        return (path for path in paths if fnmatch.fnmatchcase(path.name, pattern))

    @_explained
    def read_bytes(self) -> bytes:
        return _file_system().cat_file(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    @_explained
    def write_bytes(self, data: bytes) -> None:
        _file_system().pipe_file(str(self), data)

    def write_text(self, data: str, encoding: str = "utf-8") -> None:
        self.write_bytes(data.encode(encoding))

    @_explained
    def create(self, data: bytes) -> None:
        """Writes a new object; raises FileExistsError if it is there."""
        _file_system().pipe_file(str(self), data, mode="create")

    @_explained
    def upload(self, file: Path) -> None:
        """Makes this object a copy of a local file."""
        _file_system().put_file(str(file), str(self))

    @_explained
    def download(self, file: Path) -> None:
        """Copies this object to a local file."""
        _file_system().get_file(str(self), str(file))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a directory is there once it holds a file."""

    @_explained
    def unlink(self, missing_ok: bool = False) -> None:
        try:
            _file_system().rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    @_explained
    def rmtree(self) -> None:
        """Deletes every file below this directory, if there are any."""
        names = _file_system().find(str(self))
        if names:
            _file_system().rm(names)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is there in full or, wherever this process is killed, as it was
    before. Raises OSError; an earlier file then stays."""
    if in_bucket(path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    new = path.with_name(path.name + ".new")
    try:
        if isinstance(content, str):
            new.write_text(content, encoding="utf-8")
        else:
            new.write_bytes(content)
        new.replace(path)  # atomic
    except OSError:
        new.unlink(missing_ok=True)
        raise


def files_below(path: Path) -> dict[str, dict[str, Any]]:
    """All files below a directory in a bucket, by their path within it: size, md5Hash..."""
    return cast(BucketPath, path).details()


def remove_tree(path: Path) -> None:
    """Deletes a directory, if it is there."""
    if isinstance(path, BucketPath):
        path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def copy_file(src: Path, dst: Path) -> None:
    """Copies a file; one of the two may be in a bucket."""
    if isinstance(src, BucketPath):
        src.download(dst)
    elif isinstance(dst, BucketPath):
        dst.upload(src)
    else:
        shutil.copyfile(src, dst)


_temporary: dict[str, Path] = {}  # local directories, and what each stands for


def temporary_directory(stands_for: Path) -> Path:
    """A new local directory, deleted when this process ends, unless it is killed."""
    made = tempfile.mkdtemp(prefix="e1jax-")
    _temporary[made] = stands_for
    return Path(made)


def keep_temporary(directory: Path) -> None:
    """Leaves a directory of `temporary_directory` to the user, who is told its name."""
    _temporary.pop(str(directory))


def as_named(text: str) -> str:
    """A message in which temporary directories have the names that the user gave."""
    for local, path in _temporary.items():
        text = text.replace(local, str(path))
    return text


def remove_temporary() -> None:
    """Deletes the directories of `temporary_directory`; called at exit."""
    while _temporary:
        shutil.rmtree(_temporary.popitem()[0], ignore_errors=True)


atexit.register(remove_temporary)
os.register_at_fork(after_in_child=_temporary.clear)
