import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from moonmind_ext.run.collect import check_artifacts
from moonmind_ext.workspace.tree import walk
from pipelines.payload import ArtifactRules
from tests.workspace.support import as_ordinary_user


def test_a_directory_its_owner_may_not_read_is_made_readable(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "file").write_text("x")
    (tmp_path / "closed" / "file").chmod(0)
    (tmp_path / "closed").chmod(0)

    found = check_artifacts(tmp_path, ArtifactRules())

    assert [file.path for file in found.files] == ["closed/file"]


def test_a_name_that_is_no_utf8_is_listed_and_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).write_text("x")

    found = check_artifacts(tmp_path, ArtifactRules())

    assert found.model_dump_json()
    assert [file.path for file in found.files] == ["caf\ufffd"]
    assert (tmp_path / name).exists()


def test_a_socket_is_refused(tmp_path: Path) -> None:
    os.mknod(tmp_path / "socket", 0o140644)

    found = check_artifacts(tmp_path, ArtifactRules())

    assert set(found.refused) == {"socket"}
    assert not (tmp_path / "socket").exists()


def test_a_directory_by_a_reserved_name_is_removed_and_named_once(tmp_path: Path) -> None:
    (tmp_path / "logs" / "runner.log" / "inner").mkdir(parents=True)
    (tmp_path / "logs" / "runner.log" / "inner" / "file").write_text("x")
    (tmp_path / "logs" / "mine").write_text("x")

    found = check_artifacts(tmp_path, ArtifactRules())

    assert set(found.refused) == {"logs/runner.log"}
    assert [file.path for file in found.files] == ["logs/mine"]
    assert not (tmp_path / "logs" / "runner.log").exists()


def test_an_ordinary_user_is_not_held_up_by_modes(tmp_path: Path) -> None:
    printed = as_ordinary_user(
        tmp_path,
        "moonmind_ext.run.collect",
        """
        Path("a/logs/runner.log/inner").mkdir(parents=True)
        Path("a/logs/runner.log/inner/file").write_text("x")
        Path("a/closed").mkdir()
        Path("a/closed/file").write_text("x")
        Path("a/closed/link").symlink_to("/etc")
        for path in ("logs/runner.log/inner/file", "logs/runner.log/inner", "logs/runner.log"):
            Path("a", path).chmod(0)
        Path("a/closed/file").chmod(0)
        for path in ("logs", "closed", "."):
            Path("a", path).chmod(0o555)
        found = check_artifacts(Path("a"), ArtifactRules())
        print(sorted(found.refused), [file.path for file in found.files])
        """,
    )

    assert printed.strip() == "['closed/link', 'logs/runner.log'] ['closed/file']"


@given(st.sets(st.text("ab/", min_size=1, max_size=6), max_size=8))
def test_walking_finds_every_path_once(tmp_path_factory: object, paths: set[str]) -> None:
    root = tmp_path_factory.mktemp("walk")  # type: ignore[attr-defined]
    made: set[str] = set()
    for path in paths:
        parts = [part for part in path.split("/") if part]
        for depth in range(1, len(parts) + 1):
            made.add("/".join(parts[:depth]))
        (root / "/".join(parts)).mkdir(parents=True, exist_ok=True)

    found = [path for path, _ in walk(root)]

    assert sorted(found) == sorted(made)
    assert all(found.index(p.rpartition("/")[0]) < found.index(p) for p in found if "/" in p)
