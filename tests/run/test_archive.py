import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moonmind_ext.run.archive import ArchiveError, unpack
from tests.snapshot import snapshot
from tests.workspace.support import as_ordinary_user

TARS = [
    pytest.param([name for name in command if name], id=command[-1] or "busybox")
    for command in (("tar", ""), ("busybox", "tar"))
    if shutil.which(command[0])
]


def pack(command: list[str], source: Path, archive: Path) -> Path:
    with archive.open("wb") as file:
        subprocess.run([*command, "-cf", "-", "."], cwd=source, stdout=file, check=True, timeout=20)
    return archive


def unpacked(archive: Path) -> Path:
    target = archive.with_name("unpacked")
    target.mkdir()
    unpack(archive, target)
    return target


NAMES = st.one_of(
    st.text("ab\n\\ -'é", min_size=1, max_size=4).map(os.fsencode),
    st.sampled_from([b"caf\xe9", b"L" * 99, b"L" * 100, b"L" * 101, b"L" * 255, b"...", b"-rf"]),
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)
NODES = st.one_of(
    st.tuples(st.just("file"), st.sampled_from([0, 1, 511, 512, 513, 70_000])),
    st.tuples(st.just("directory"), st.just(0)),
    st.tuples(st.just("link"), st.integers(1, 200)),
    st.tuples(st.just("hard"), st.just(0)),
)
MODES = st.sampled_from([0o644, 0o600, 0o000, 0o755, 0o500, 0o4755, 0o6711, 0o1777, 0o2770])


@pytest.mark.parametrize("command", TARS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(PATHS, st.tuples(NODES, MODES, st.integers(0, 1 << 32)), max_size=10))
def test_a_random_tree_comes_out_as_it_went_in(
    command: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    tree: dict[bytes, tuple[tuple[str, int], int, int]],
) -> None:
    folder = tmp_path_factory.mktemp("trees")
    source = folder / "source"
    source.mkdir()
    modes: list[tuple[bytes, int, int]] = []
    files: list[bytes] = []
    for path, ((kind, size), mode, mtime) in tree.items():
        place = os.fsencode(source) + b"/" + path
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            if kind == "directory":
                os.mkdir(place)
            elif kind == "link":
                os.symlink(b"x" * size, place)
                os.utime(place, (mtime, mtime), follow_symlinks=False)
                continue
            elif kind == "hard" and files:
                os.link(files[0], place)
                continue
            else:
                with open(place, "xb") as file:
                    file.write(os.urandom(size))
                files.append(place)
        except (FileExistsError, FileNotFoundError, NotADirectoryError):
            continue
        modes.append((place, mode, mtime))
    for place, mode, mtime in reversed(modes):
        # Who is not root could not pack it otherwise.
        os.chmod(place, mode if os.getuid() == 0 else mode | stat.S_IRWXU)
        os.utime(place, (mtime, mtime))

    assert snapshot(unpacked(pack(command, source, folder / "tar"))) == snapshot(source)
    shutil.rmtree(folder)


@pytest.mark.parametrize("command", TARS)
def test_paths_of_several_thousand_bytes_come_out(command: list[str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    deep = source / "/".join("d" * 200 for _ in range(18))
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    (source / "link").symlink_to("t" * 4000)

    target = unpacked(pack(command, source, tmp_path / "tar"))

    assert (target / deep.relative_to(source) / "file").read_text() == "x"
    assert os.readlink(target / "link") == "t" * 4000


@pytest.mark.parametrize("command", TARS)
def test_owners_are_not_kept(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("x")
    if os.getuid() == 0:
        os.chown(tmp_path / "source" / "file", 12, 34)

    target = unpacked(pack(command, tmp_path / "source", tmp_path / "tar"))

    assert (target / "file").stat().st_uid == os.getuid()


def member(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    content: bytes = b"",
    target: str = "",
    mode: int = 0o644,
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, target, len(content), mode
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + content + bytes(-len(content) % 512)


def changed(header: bytes, at: int, to: bytes) -> bytes:
    """A header with some bytes changed, and a checksum that fits."""
    header = header[:at] + to + header[at + len(to) :]
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank[:512]) + header[156:]


END = bytes(1024)
FILE = member("./file", content=b"x")
FOLDER = member("./d/", tarfile.DIRTYPE)


def pax() -> bytes:
    info = tarfile.TarInfo("./file")
    info.pax_headers = {"path": "../outside"}
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def test_an_ordinary_user_gets_the_modes_too(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(
        member("./closed/", tarfile.DIRTYPE, mode=0o500)
        + member("./closed/in/", tarfile.DIRTYPE, mode=0)
        + member("./closed/in/file", content=b"x", mode=0)
        + member("./runner", content=b"x", mode=0o4755)
        + END
    )

    printed = as_ordinary_user(
        tmp_path,
        "moonmind_ext.run.archive",
        """
        Path("into").mkdir()
        unpack(Path("tar"), Path("into"))
        modes = []
        for name in ("into/closed", "into/closed/in", "into/closed/in/file", "into/runner"):
            modes.append(oct(Path(name).stat().st_mode))
            Path(name).chmod(0o700)
        print(*modes)
        """,
    )

    assert printed.split() == ["0o40500", "0o40000", "0o100000", "0o104755"]


HOSTILE = {
    "a path with ..": member("./../outside"),
    "only ..": member(".."),
    ".. after a directory": FOLDER + member("./d/../../outside"),
    "an absolute path": member("/outside"),
    "an absolute path after a dot": member(".//outside"),
    "a dot in the middle": FOLDER + member("./d/./file"),
    "a directory by the name of ..": member("./../", tarfile.DIRTYPE),
    "through a link": member("./l", tarfile.SYMTYPE, target="/") + member("./l/outside"),
    "through a link to a directory": FOLDER
    + member("./l", tarfile.SYMTYPE, target="d")
    + member("./l/inside"),
    "a file in the place of a link": member("./l", tarfile.SYMTYPE, target="../outside")
    + member("./l"),
    "a directory in the place of a link": member("./l", tarfile.SYMTYPE, target="..")
    + member("./l/", tarfile.DIRTYPE)
    + member("./l/outside"),
    "a link in the place of a directory": FOLDER
    + member("./d", tarfile.SYMTYPE, target="..")
    + member("./d/outside"),
    "in a file": FILE + member("./file/inside"),
    "in a directory that is not there": member("./d/file"),
    "a hard link to the outside": member("./h", tarfile.LNKTYPE, target="../secret"),
    "an absolute hard link": member("./h", tarfile.LNKTYPE, target="/etc/passwd"),
    "a hard link through a link": member("./l", tarfile.SYMTYPE, target="..")
    + member("./h", tarfile.LNKTYPE, target="./l/secret"),
    "a hard link to a link": member("./l", tarfile.SYMTYPE, target="../secret")
    + member("./h", tarfile.LNKTYPE, target="./l"),
    "a hard link to a directory": FOLDER + member("./h", tarfile.LNKTYPE, target="./d"),
    "a hard link to what comes later": member("./h", tarfile.LNKTYPE, target="./file") + FILE,
    "a hard link to itself": member("./h", tarfile.LNKTYPE, target="./h"),
    "a link to nothing": member("./l", tarfile.SYMTYPE),
    "a device": member("./null", tarfile.CHRTYPE),
    "a block device": member("./disk", tarfile.BLKTYPE),
    "a pipe": member("./pipe", tarfile.FIFOTYPE),
    "a sparse file": member("./sparse", tarfile.GNUTYPE_SPARSE, b"x" * 512),
    "a file twice": FILE + FILE,
    "a directory twice": FOLDER + FOLDER,
    "a file in the place of the root": member("./"),
    "a link in the place of the root": member(".", tarfile.SYMTYPE, target="/"),
    "an extended header": pax(),
    "a size that is negative": changed(FILE, 124, b"-0000000001\0"),
    "a size in another base": changed(FILE, 124, b"\x80" + b"\xff" * 11),
    "a size with a letter": changed(FILE, 124, b"0000000000a\0"),
    "a size that is no octal": changed(FILE, 124, b"00000000009\0"),
    "a size beyond the end": changed(FILE, 124, b"77777777777\0"),
    "a link with a size": changed(member("./l", tarfile.SYMTYPE, target="x"), 124, b"00000000001"),
    "a wrong checksum": FILE[:148] + b"000001\0 " + FILE[156:],
    "a name without an end": changed(member("n" * 200), 124, b"77777777777\0"),
    "a name for nothing": member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"./name\0"),
    "two names for one": member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"./a\0")
    + member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"./b\0")
    + FILE,
    "a long name to the outside": member("@", tarfile.GNUTYPE_LONGNAME, b"../outside\0") + FILE,
    "a name that no disk takes": member("./" + "n" * 256),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(
    data: bytes, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "tar").write_bytes(member("./", tarfile.DIRTYPE) + data + END)
    (tmp_path / "unpacked").mkdir()

    with pytest.raises(ArchiveError):
        unpack(tmp_path / "tar", tmp_path / "unpacked")

    assert {path.name for path in tmp_path.iterdir()} == {"secret", "tar", "unpacked"}
    assert (tmp_path / "secret").stat().st_nlink == 1
    for path in (tmp_path / "unpacked").rglob("*"):
        mode = path.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


@pytest.mark.parametrize(
    "cut", [0, 1, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2559], ids="after {}".format
)
def test_an_archive_that_is_cut_off_anywhere_is_refused(cut: int, tmp_path: Path) -> None:
    whole = FOLDER + FILE + END
    (tmp_path / "tar").write_bytes(whole[:cut])
    (tmp_path / "into").mkdir()

    with pytest.raises(ArchiveError):
        unpack(tmp_path / "tar", tmp_path / "into")
    assert len(whole) == 2560


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"not a tar" * 1000),
        lambda path: path.write_bytes(os.urandom(10_240)),
        Path.mkdir,
        Path.exists,
    ],
    ids=["text", "noise", "a directory", "nothing"],
)
def test_what_is_no_archive_is_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "tar")
    (tmp_path / "into").mkdir()

    with pytest.raises(ArchiveError):
        unpack(tmp_path / "tar", tmp_path / "into")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_never_leads_outside(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    outside = member("./d/l", tarfile.SYMTYPE, target="../..") + member("./d/k/outside")
    whole = bytearray(FOLDER + outside + FILE + END)
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    (folder / "tar").write_bytes(whole)
    (folder / "into").mkdir()

    with suppress(ArchiveError):
        unpack(folder / "tar", folder / "into")
    assert {path.name for path in folder.iterdir()} == {"tar", "into"}
    shutil.rmtree(folder)


LINKS = {"/etc/passwd", "../../x", "nowhere", "./file", "file/"}


def test_links_are_kept_wherever_they_lead_and_never_followed(tmp_path: Path) -> None:
    stream = io.BytesIO()
    for target in LINKS:
        stream.write(member(f"./to {target.replace('/', '_')}", tarfile.SYMTYPE, target=target))
    (tmp_path / "tar").write_bytes(stream.getvalue() + FILE + END)

    into = unpacked(tmp_path / "tar")

    assert {os.readlink(path) for path in into.iterdir() if path.is_symlink()} == LINKS
    assert (into / "file").read_text() == "x"
