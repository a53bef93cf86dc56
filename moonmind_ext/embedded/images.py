"""Images are not pulled: each is the host's own root, but for a few made for tests."""

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moonmind_ext.embedded.root import Root, make_directories

TEST_REGISTRY = "embedded.test"
"""The images below it exist in the embedded engine only; `.test` is reserved for such names."""

_SHELLS = (
    "ash",
    "bash",
    "busybox",
    "csh",
    "dash",
    "fish",
    "ksh",
    "mksh",
    "rbash",
    "sh",
    "tcsh",
    "zsh",
)
_BIN_DIRECTORIES = ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin")
_ENTRY = '#!/bin/sh\nENTRY=yes\nexport ENTRY\nexec "$@"\n'


class ImageError(Exception):
    """There is no such image."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a container starts from.

    Attributes
    ----------
    address
        As it was given.
    layer
        The key of `LAYERS` for what it has beyond the host's root.
    """

    address: str
    layer: str = ""
    user: str = ""
    workdir: str = ""
    entrypoint: tuple[str, ...] = ()
    default_args: tuple[str, ...] = ("sh",)

    def variables(self) -> tuple[tuple[str, str], ...]:
        """List what the image sets: of our own environment, what makes the host's programs work."""
        inherited = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
        return (("PATH", os.environ.get("PATH", os.defpath)), *inherited.items())


def find_image(address: str) -> Image:
    """Find an image.

    Raises
    ------
    ImageError
        As a real engine says it for an image that does not exist.
    """
    registry, _, name = address.partition("/")
    name = name.partition("@")[0].partition(":")[0]
    if registry != TEST_REGISTRY:
        repository = address.partition("@")[0].rpartition("/")[2].partition(":")[0]
        return Image(address, layer="busybox" if repository == "busybox" else "")
    match name:
        case "no-shell":
            return Image(address, layer=name, default_args=())
        case "not-root":
            return Image(address, layer=name, user="1000:1000", workdir="/home/app")
        case "entrypoint":
            return Image(address, layer=name, entrypoint=("/entry",))
        case "busybox":
            if static_busybox() is None:
                raise ImageError(
                    f"{address} needs a static busybox on the host: install busybox-static"
                )
            return Image(address, layer=name)
    raise ImageError(f'failed to resolve image "{address}": {address}: not found')


def static_busybox() -> str | None:
    """Find a busybox that needs no libraries, so that it runs in any image."""
    places = f"/bin:/usr/bin:{os.environ.get('PATH', '')}"
    for directory in places.split(":"):
        path = shutil.which("busybox", path=directory or None) if directory else None
        if path is not None and is_static(path):
            return path
    return None


def is_static(path: str) -> bool:
    """Whether an ELF program names no loader (a program header of type PT_INTERP)."""
    with Path(path).open("rb") as file:
        head = file.read(4096)
    if head[:5] != b"\x7fELF\x02":  # 64 bits; there is no other host.
        return False
    offset = int.from_bytes(head[32:40], "little")
    size = int.from_bytes(head[54:56], "little")
    number = int.from_bytes(head[56:58], "little")
    headers = (head[offset + size * i : offset + size * i + 4] for i in range(number))
    return all(int.from_bytes(header, "little") != 3 for header in headers)  # noqa: PLR2004


def _without_shells(root: Root, layer: Path) -> None:
    for directory in _BIN_DIRECTORIES:
        found = root.find(directory, follow_last=False)
        if found is None or not stat.S_ISDIR(found.status.st_mode):
            continue
        for shell in _SHELLS:
            if root.find(f"{directory}/{shell}", follow_last=False):
                make_directories(root, layer, directory)
                os.mknod(layer / directory / shell, stat.S_IFCHR, 0)


def _with_home(root: Root, layer: Path) -> None:
    make_directories(root, layer, "home/app")


def _with_entry(_: Root, layer: Path) -> None:
    (layer / "entry").write_text(_ENTRY)
    (layer / "entry").chmod(0o755)


def _with_busybox(root: Root, layer: Path) -> None:
    path = static_busybox()
    place = layer / root.place("bin/busybox")
    if path is not None and Path(path).resolve() != Path("/bin/busybox").resolve():
        make_directories(root, layer, str(place.parent.relative_to(layer)))
        shutil.copy(path, place)


LAYERS: dict[str, Callable[[Root, Path], None]] = {
    "no-shell": _without_shells,
    "not-root": _with_home,
    "entrypoint": _with_entry,
    "busybox": _with_busybox,
}
"""How the layer of an image is made, in an empty directory; blocking."""
