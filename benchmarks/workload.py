"""Repositories and payloads to measure with."""

import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

FILE_BYTES = 7500
BIG_BYTES = 200_000_000
CHANGED_FILES = 20
_PER_DIRECTORY = 200

_GIT = (
    "git",
    *("-c", "user.name=benchmark"),
    *("-c", "user.email=benchmark@example.com"),
    # Not behind our back, while something else is measured.
    *("-c", "gc.auto=0", "-c", "maintenance.auto=false"),
)


@dataclass(frozen=True, slots=True)
class Repository:
    """A git repository to clone.

    Attributes
    ----------
    names
        Of its small files.
    """

    path: Path
    names: tuple[str, ...]

    @classmethod
    def make(cls, path: Path, *, files: int, big: bool = False) -> "Repository":
        """Make a repository; the same again each time.

        Parameters
        ----------
        big
            Whether it has one file of `BIG_BYTES` more.
        """
        dice = random.Random(files)  # noqa: S311
        text = dice.randbytes(FILE_BYTES).hex()[:FILE_BYTES]
        names = tuple(
            f"part{number // _PER_DIRECTORY:03}/file{number:05}.txt" for number in range(files)
        )
        for name in names:
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{name}\n{text}")
        if big:
            with (path / "big.bin").open("wb") as all_of_it:
                piece = dice.randbytes(FILE_BYTES).hex().encode()
                for at in range(0, BIG_BYTES, len(piece)):
                    all_of_it.write(piece[: BIG_BYTES - at])
        _git(path, "init", "--quiet", "--initial-branch=main")
        _git(path, "add", "--all")
        _git(path, "commit", "--quiet", "--message=All of it")
        # As a server has it: loose objects would be as many files again in a clone.
        _git(path, "repack", "-a", "-d", "--quiet")
        return cls(path, names)

    def clone(self, target: Path) -> Path:
        """Clone it, as a worker does."""
        _git(self.path, "clone", "--quiet", "--", str(self.path), str(target))
        return target

    def change(self, checkout: Path, salt: str) -> None:
        """Change some files, all over the checkout, to what nobody has seen yet."""
        step = len(self.names) // CHANGED_FILES
        for name in self.names[:: max(1, step)][:CHANGED_FILES]:
            (checkout / name).write_text(f"{name} {salt}\n" * (FILE_BYTES // 50))


def _git(path: Path, *arguments: str) -> None:
    subprocess.run([*_GIT, "-C", str(path), *arguments], check=True, stdin=subprocess.DEVNULL)


def write_payload(path: Path, image: str, command: list[str]) -> Path:
    """Write a payload file."""
    path.write_text(json.dumps({"image": image, "command": command}))
    return path
