"""Which paths of a directory are taken: Dagger's patterns, and .gitignore files.

Two small matchers instead of a dependency: `include` and `exclude` are moby's
`.dockerignore` patterns, which differ from git's (no implicit depth, a match of a
directory is a match of all that is in it, `!` takes single files back out).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from moonmind_ext.embedded.tree import Tree, glob_regex, parents, relative, select

GITIGNORE = ".gitignore"


@dataclass(frozen=True, slots=True)
class Filter:
    """What is asked for in a call; its `repr` is part of a recipe."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gitignore: bool = False

    @property
    def takes_all(self) -> bool:
        """Whether nothing is left out."""
        return not (self.include or self.exclude or self.gitignore)


EVERYTHING = Filter()


class Selection:
    """One walk through a directory, parents before what is in them.

    Attributes
    ----------
    reads_ignore_files
        Whether `add_ignore_file` is to be called.
    """

    def __init__(self, wanted: Filter) -> None:
        self._include = _Patterns(wanted.include)
        self._exclude = _Patterns(wanted.exclude)
        self.reads_ignore_files = wanted.gitignore
        self._rules: list[_IgnoreRule] = []

    def add_ignore_file(self, directory: str, text: str) -> None:
        """Take in a directory's .gitignore, before anything in that directory is asked for."""
        self._rules.extend(_ignore_rules(directory, text))

    def prunes(self, directory: str) -> bool:
        """Whether nothing in a directory can be taken."""
        return self._ignored(directory, is_directory=True) or (
            not self._exclude.has_exceptions and self._exclude.match(directory)
        )

    def takes(self, path: str, *, is_directory: bool) -> bool:
        """Whether a path itself is taken; its parents come along."""
        return (
            (not self._include or self._include.match(path))
            and not self._exclude.match(path)
            and not self._ignored(path, is_directory=is_directory)
        )

    def _ignored(self, path: str, *, is_directory: bool) -> bool:
        for rule in reversed(self._rules):
            if rule.matches(path, is_directory=is_directory):
                return rule.ignores
        return False


def apply(tree: Tree, wanted: Filter, ignore_files: dict[str, str]) -> Tree:
    """Filter a tree.

    Parameters
    ----------
    ignore_files
        The text of each .gitignore in it, by its path.
    """
    if wanted.takes_all:
        return tree
    selection = Selection(wanted)
    kept, pruned = [], set[str]()
    # By components: what is in a directory comes right after it, its .gitignore too.
    for path in sorted(tree, key=lambda path: path.split("/")):
        is_directory = tree[path].is_directory
        if not pruned.isdisjoint(parents(path)):
            continue
        if is_directory:
            if path and selection.prunes(path):
                pruned.add(path)
                continue
            ignore_file = f"{path}/{GITIGNORE}" if path else GITIGNORE
            if selection.reads_ignore_files and ignore_file in ignore_files:
                selection.add_ignore_file(path, ignore_files[ignore_file])
        if path and selection.takes(path, is_directory=is_directory):
            kept.append(path)
    return select(tree, kept)


class _Patterns:
    """Moby's: the last one that matches a path or a directory it is in decides."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        for pattern in patterns:
            taken_back = pattern.strip().startswith("!")
            text = relative(pattern.strip().removeprefix("!"))
            self._rules.append((not taken_back, re.compile(glob_regex(text))))

    def __bool__(self) -> bool:
        return bool(self._rules)

    @property
    def has_exceptions(self) -> bool:
        return not all(matches for matches, _ in self._rules)

    def match(self, path: str) -> bool:
        matched = False
        for verdict, regex in self._rules:
            if verdict != matched and any(map(regex.fullmatch, _and_parents(path))):
                matched = verdict
        return matched


def _and_parents(path: str) -> Iterable[str]:
    return (path, *parents(path))


@dataclass(frozen=True, slots=True)
class _IgnoreRule:
    ignores: bool
    directory: str
    only_directories: bool
    regex: re.Pattern[str] = field(compare=False)

    def matches(self, path: str, *, is_directory: bool) -> bool:
        if self.only_directories and not is_directory:
            return False
        prefix = f"{self.directory}/" if self.directory else ""
        if not path.startswith(prefix):
            return False
        return self.regex.fullmatch(path[len(prefix) :]) is not None


def _ignore_rules(directory: str, text: str) -> Iterator[_IgnoreRule]:
    for line in text.splitlines():
        pattern = re.sub(r"(?<!\\) +$", "", line)
        if not pattern or pattern.startswith("#"):
            continue
        ignores = not pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        only_directories = pattern.endswith("/")
        pattern = pattern.rstrip("/")
        # With a slash before its end a pattern is anchored, without one it counts at any depth.
        anchored = "/" in pattern
        regex = glob_regex(pattern.lstrip("/") if anchored else f"**/{pattern}")
        yield _IgnoreRule(ignores, directory, only_directories, re.compile(regex))
