"""Files: written whole or not at all, read without executing anything, and packages that only some users need.

torch is imported where it is used: the scripts of data/ need none of it, and it takes seconds to start.
"""

import contextlib
import gzip
import hashlib
import importlib
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

try:
    import lzma
except ImportError:  # some Pythons are built without it
    lzma = None


@contextlib.contextmanager
def whole(path: Path, suffix: str = ".tmp"):
    """Yields a temporary path beside `path`, for a file or a folder. What is written there is flushed to the disk and
    renamed to `path` at the end of the block, or removed if the block fails: a kill leaves the old file or the new."""
    path = Path(path)
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str):
    """Write a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def as_json(content) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_log(path: Path) -> list[dict]:
    """The records of a run's log.jsonl, but for lines torn by a crash; none if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


OPENERS = {".gz": gzip.open} | ({".xz": lzma.open} if lzma else {})
# What is raised for a file that is not what its name says, and for any that cannot be read
DAMAGED = (ValueError, EOFError, gzip.BadGzipFile, zlib.error, *([lzma.LZMAError] if lzma else []))
READ_ERRORS = (OSError, *DAMAGED, NotImplementedError)  # the last from pyarrow


def opened(path):
    """The file's bytes, decompressed if its name ends in .gz or .xz, as a file to read from."""
    return OPENERS.get(Path(path).suffix.lower(), open)(path, "rb")


def decoded(data: bytes, offset: int = 0) -> str:
    """UTF-8 as text, every character as it stands, line ends too, but for the byte order mark that some editors put in
    front of a file. `offset`: where `data` begins in it. Raises ValueError with the number of a byte that is not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {offset + error.start} cannot be read)") from error
    return text if offset else text.removeprefix("\ufeff")


@contextlib.contextmanager
def named(path):
    """For reading: other errors than the system's, which name the file already, become a ValueError that does."""
    try:
        yield
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} cannot be read: {error or 'it ends too early'}") from error


def read_text(path) -> str:
    """The text of a file, see opened() and decoded(). Raises FileNotFoundError and other OSErrors, and ValueError."""
    with named(path), opened(path) as file:
        return decoded(file.read())


def sha256_of(path: Path) -> str:
    """Which content a file has, however large it is."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def require(module: str, purpose: str):
    """A module of requirements-extra.txt. Raises ImportError, which says that `purpose` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs {package}: pip install -r requirements-extra.txt") from error


# Archives: torch zip files of tensors, numbers, strings, lists and dicts, and nothing else.


def save_archive(content: dict, path: Path):
    """Write `content` whole or not at all. Raises OSError (disk full, no permission); the old file is then still there."""
    import torch

    try:
        with whole(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides it in there
        raise OSError(f"could not write {path}: {str(cause).splitlines()[0]}") from error


def read_archive(path: Path):
    """The contents of a torch file. Nothing in it is executed. Raises FileNotFoundError, and ValueError for a file that
    is damaged or holds anything but data."""
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums it writes: a flipped bit goes unseen
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a checksum does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "Weights only load failed" in reason:
            reason = "it holds objects that would run code when loaded, not only tensors and numbers"
        raise ValueError(f"{path} is not a usable checkpoint: {reason}") from error
