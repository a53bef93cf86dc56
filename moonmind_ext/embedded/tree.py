"""Directories as values: what is where, by content.

A `Tree` maps paths to entries; the bytes of files are elsewhere, under their
digest (`store`). So whatever the API does to a directory is arithmetic on a
dictionary, two directories are compared without reading them, and a file that a
hundred directories share exists once.

A single file is a tree whose root is that file.
"""

import hashlib
import posixpath
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

MAX_LINKS = 40
"""Symbolic links followed on the way to one path; Linux has the same limit."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One node of a tree.

    Attributes
    ----------
    mode
        Type and permissions, as `st_mode`.
    content
        SHA-256 of a regular file's bytes, the target of a symbolic link, `major:minor`
        of a device; else empty.
    size
        Of a regular file, in bytes.
    mtime_ns
        Not part of the identity: a fresh checkout is the same directory.
    """

    mode: int
    content: str = ""
    size: int = 0
    mtime_ns: int = 0

    @property
    def is_directory(self) -> bool:
        """Whether it can have entries below it."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it has bytes of its own."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


Tree = Mapping[str, Entry]
"""Relative paths to entries. The root, "", is always there, and so is every
parent directory of an entry."""


def directory(permissions: int = 0o755) -> Entry:
    """Make an entry for a new directory."""
    return Entry(stat.S_IFDIR | permissions, mtime_ns=time.time_ns())


def relative(path: str) -> str:
    """Normalise a path of the API: relative to the root, and never out of it."""
    return posixpath.normpath(f"/{path}").lstrip("/")


def parents(path: str) -> Iterator[str]:
    """List the directories that a path is in, outermost first, without the root."""
    at = path.find("/")
    while at >= 0:
        yield path[:at]
        at = path.find("/", at + 1)


def inside(path: str, ancestor: str) -> bool:
    """Whether a path is strictly below another."""
    return path.startswith(f"{ancestor}/") if ancestor else bool(path)


def resolve(tree: Tree, path: str, *, follow_last: bool = True) -> str | None:
    """Find where a path leads, following symbolic links inside the tree.

    Returns
    -------
    str or None
        A key of the tree; None where nothing is.
    """
    todo = relative(path).split("/")[::-1]
    at = ""
    links = 0
    while todo:
        name = todo.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            at = posixpath.dirname(at)
            continue
        here = f"{at}/{name}" if at else name
        entry = tree.get(here)
        if entry is None:
            return None
        if entry.is_link and (todo or follow_last):
            links += 1
            if links > MAX_LINKS:
                return None
            if entry.content.startswith("/"):
                at = ""
            todo.extend(entry.content.split("/")[::-1])
            continue
        at = here
    return at


def subtree(tree: Tree, root: str) -> Tree:
    """Take what is at a key of the tree as a tree of its own."""
    if not root:
        return tree
    cut = len(root) + 1
    return {"": tree[root]} | {p[cut:]: e for p, e in tree.items() if inside(p, root)}


def put(tree: Tree, path: str, other: Tree) -> Tree:
    """Lay a tree over another at a path; directories merge, everything else is replaced."""
    at = _destination(tree, path)
    result = dict(tree)
    for parent in parents(at):
        if parent not in result or not result[parent].is_directory:
            result[parent] = directory()
    prefix = f"{at}/" if at else ""
    # What is no directory any more, or only now becomes one.
    replaced = {
        key
        for name, entry in other.items()
        if (key := prefix + name if name else at) in tree
        and tree[key].is_directory != entry.is_directory
    }
    if replaced:
        result = dict(without(result, replaced))
    for name, entry in other.items():
        result[prefix + name if name else at] = entry
    return result


def _destination(tree: Tree, path: str) -> str:
    """Follow the links among the parents of a path that need not exist."""
    head, _, name = relative(path).rpartition("/")
    missing = [name] if name else []
    while head and (found := resolve(tree, head)) is None:
        head, _, name = head.rpartition("/")
        missing.insert(0, name)
    return "/".join(filter(None, [found if head else "", *missing]))


def without(tree: Tree, paths: Iterable[str]) -> Tree:
    """Take paths out, with everything below them."""
    gone = set(paths)
    return {
        path: entry
        for path, entry in tree.items()
        if not path or (path not in gone and gone.isdisjoint(parents(path)))
    }


def listing(tree: Tree, root: str = "") -> list[str]:
    """Name what is directly in a directory; directories end with a slash."""
    cut = len(root) + 1 if root else 0
    return sorted(
        shown(tree, path)[cut:] for path in tree if inside(path, root) and "/" not in path[cut:]
    )


def shown(tree: Tree, path: str) -> str:
    """Write a path as the API does: directories end with a slash."""
    return f"{path}/" if tree[path].is_directory else path


def digest(tree: Tree) -> str:
    """Hash everything but the times."""
    total = hashlib.sha256()
    for path in sorted(tree):
        entry = tree[path]
        total.update(f"{path}\0{entry.mode:o}\0{entry.content}\0".encode(errors="surrogateescape"))
    return f"sha256:{total.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Changes:
    """How one tree differs from another; directories end with a slash.

    Attributes
    ----------
    added, modified
        A directory is never modified; a file is by its bytes or its permissions.
    removed
        Of a removed directory only itself, not what was in it.
    """

    added: list[str]
    modified: list[str]
    removed: list[str]


def changes(before: Tree, after: Tree) -> Changes:
    """Compare two trees."""
    added, modified = [], []
    for path, entry in after.items():
        old = before.get(path)
        if old is None or old.is_directory != entry.is_directory:
            if path:
                added.append(shown(after, path))
        elif not entry.is_directory and (old.mode, old.content) != (entry.mode, entry.content):
            modified.append(path)
    gone = {
        path
        for path, old in before.items()
        if path not in after or old.is_directory != after[path].is_directory
    }
    removed = [shown(before, path) for path in gone if gone.isdisjoint(parents(path))]
    return Changes(sorted(added), sorted(modified), sorted(removed))


def layer(before: Tree, after: Tree) -> Tree:
    """Take what is new or different in a tree, with its parents; times count."""
    kept = {path for path, entry in after.items() if path and before.get(path) != entry}
    # A directory's time changes with what is in it, so it says nothing of its own.
    kept = {path for path in kept if not _same_directory(before.get(path), after[path])}
    return select(after, kept)


def _same_directory(old: Entry | None, new: Entry) -> bool:
    return old is not None and new.is_directory and old.mode == new.mode


def select(tree: Tree, kept: Iterable[str]) -> Tree:
    """Take some paths, with their parents."""
    wanted = {""}
    for path in kept:
        wanted.add(path)
        wanted.update(parents(path))
    return {path: entry for path, entry in tree.items() if path in wanted}


def glob(tree: Tree, pattern: str) -> list[str]:
    """List the paths that match; `**` crosses directories, `*` does not."""
    matcher = re.compile(glob_regex(relative(pattern)))
    return sorted(shown(tree, path) for path in tree if path and matcher.fullmatch(path))


def glob_regex(pattern: str) -> str:
    """Translate a pattern with `**`, `*`, `?` and `[…]` to a regular expression."""
    out = []
    at = 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            out.append("(?:.*/)?")
            at += 3
        elif pattern.startswith("**", at):
            out.append(".*")
            at += 2
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            body = pattern[at + 1 : end].replace("\\", "\\\\")
            negated = body[0] in "!^"
            out.append(f"[^/{body[1:]}]" if negated else f"[{body}]")
            at = end + 1
        elif pattern[at] == "\\" and at + 1 < len(pattern):
            out.append(re.escape(pattern[at + 1]))
            at += 2
        else:
            out.append({"*": "[^/]*", "?": "[^/]"}.get(pattern[at]) or re.escape(pattern[at]))
            at += 1
    return "(?s:" + "".join(out) + ")"
