"""Finds and loads libblockem, and turns its status codes into exceptions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import NoReturn

from . import _ffi


class Error(Exception):
    """A call of libblockem failed; the message says what, where, and the remedy.

    ``status`` is the number of the C header (``BLOCKEM_STATUS_...``), ``name`` its name, such as
    103 and ``"SHAPE"``.
    """

    status: int = 0
    name: str = ""


class ArgumentError(Error, ValueError):
    """The caller is at fault: statuses 100 to 199."""


class DataError(Error, ValueError):
    """A file or its contents are at fault: statuses 201 to 299."""


class FileError(Error, OSError):
    """The operating system refused a file operation: status 200."""


def fail(status: int, message: str) -> NoReturn:
    """Raises the exception of a status."""
    if status == _ffi.STATUS_IO:
        error: Error = FileError(message)
    else:
        error = {1: ArgumentError, 2: DataError}.get(status // 100, Error)(message)
    error.status, error.name = status, status_name(status)
    raise error


def status_name(status: int) -> str:
    return library.blockem_status_name(status).decode()


def check(status: int) -> None:
    """Raises unless a call answered OK. Must run on the thread of the call."""
    if status != _ffi.STATUS_OK:
        fail(status, last_error())


def last_error() -> str:
    length = library.blockem_last_error(None, 0)
    buffer = ctypes.create_string_buffer(length + 1)
    library.blockem_last_error(buffer, length + 1)
    return buffer.value.decode(errors="replace")


def find(package: Path) -> tuple[Path, str]:
    """The library that belongs to this package, and the version that it must have.

    An installed package holds its library; a source checkout has it in target/release. No
    environment variable has a say.
    """
    name = {"darwin": "libblockem.dylib", "win32": "blockem.dll"}.get(sys.platform, "libblockem.so")
    if (package / name).is_file():
        return package / name, importlib.metadata.version("blockem")
    checkout = package.parents[2]
    built, manifest = checkout / "target" / "release" / name, checkout / "Cargo.toml"
    if built.is_file() and manifest.is_file():
        return built, re.search(r'^version = "(.+)"$', manifest.read_text(), re.M)[1]
    raise ImportError(
        f"{name} is neither in {package} nor in {built.parent}: install the package with "
        "`pip install ./bindings/python`, or build the library with "
        "`cargo build --release --lib`"
    )


def load(path: Path, version: str) -> ctypes.CDLL:
    """Loads the library and makes sure that it is the one that this package was written for."""
    try:
        loaded = _ffi.declare(ctypes.CDLL(str(path)))
    except AttributeError as error:
        raise ImportError(f"{path} is not the libblockem of this package: {error}") from None
    found = loaded.blockem_version_string().decode()
    if found != version:
        raise ImportError(
            f"{path} is libblockem {found}, this package belongs to {version}: build or install "
            "both from one checkout"
        )
    info = _ffi.BuildInfo()
    if loaded.blockem_build_info_get(ctypes.byref(info)) != _ffi.STATUS_OK:
        raise ImportError(
            f"{path} does not know this package's blockem_build_info of {ctypes.sizeof(info)} "
            "bytes: build or install both from one checkout"
        )
    return loaded


def build_info() -> dict[str, object]:
    """What the loaded library is: ``version``, ``has_cuda``, ``cpu_isa`` and its ``path``."""
    info = _ffi.BuildInfo()
    check(library.blockem_build_info_get(ctypes.byref(info)))
    return {
        "version": __version__,
        "has_cuda": bool(info.has_cuda),
        "cpu_isa": info.cpu_isa.decode(),
        "path": str(library_path),
    }


library_path, __version__ = find(Path(__file__).resolve().parent)
library = load(library_path, __version__)
