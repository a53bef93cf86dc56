"""Directories, files and changesets through the SDK; what it says is what a real engine says."""

import os
import stat
from pathlib import Path

import dagger
import pytest

from tests.embedded.support import Connect, host, shell


async def test_a_directory_is_made_of_calls(connect: Connect) -> None:
    async with connect() as dag:
        directory = (
            dag.directory()
            .with_new_file("sub/f", "content")
            .with_new_directory("empty")
            .with_symlink("sub/f", "link")
            .with_file("sub/named", dag.file("g", "other", permissions=0o755))
            .with_directory(
                "copy", dag.directory().with_new_file("a", "").with_new_file("b", ""), include=["a"]
            )
        )
        assert await directory.entries() == ["copy/", "empty/", "link", "sub/"]
        assert await directory.entries(path="copy") == ["a"]
        assert await directory.glob("**/f") == ["sub/f"]
        assert await directory.glob("*") == ["copy/", "empty/", "link", "sub/"]
        assert await directory.file("link").contents() == "content"
        assert await directory.file("sub/named").stat().permissions() == 0o755
        assert await directory.name() == "/"
        assert await directory.directory("sub").name() == "sub/"
        assert await directory.file("sub/f").name() == "f"
        assert await directory.file("sub/f").size() == 7
        assert await directory.without_directory("sub").entries() == ["copy/", "empty/", "link"]
        assert await directory.without_files(["link", "nowhere"]).entries() == [
            "copy/",
            "empty/",
            "sub/",
        ]
        assert await directory.without_file("link").entries() == ["copy/", "empty/", "sub/"]


async def test_what_is_not_there_is_named(connect: Connect) -> None:
    async with connect() as dag:
        directory = dag.directory().with_new_file("f", "")
        for broken, message in [
            (directory.entries(path="nope"), "open .*nope: no such file or directory"),
            (directory.entries(path="f"), "open .*f: not a directory"),
            (directory.directory("nope").entries(), "stat nope: no such file or directory"),
            (directory.directory("f").entries(), "path f is a file, not a directory"),
            (directory.file("../../etc/passwd").contents(), "no such file or directory"),
            (dag.host().directory("/no/where").entries(), "no such file or directory"),
            (dag.host().file("/no/where").contents(), "no such file or directory"),
            (host(dag).file("/no/where").contents(), "stat /no/where: no such file or directory"),
            (dag.file("a/b", "").name(), "must not contain a directory"),
        ]:
            with pytest.raises(dagger.QueryError, match=message):
                await broken


async def test_exists_follows_links_and_knows_types(connect: Connect) -> None:
    async with connect() as dag:
        directory = dag.directory().with_new_file("f", "").with_symlink("nowhere", "broken")
        assert await directory.exists("f")
        assert not await directory.exists("f", expected_type=dagger.ExistsType.DIRECTORY_TYPE)
        assert not await directory.exists("broken")
        assert await directory.exists("broken", do_not_follow_symlinks=True)
        container = host(dag)
        assert await container.exists("/bin", expected_type=dagger.ExistsType.DIRECTORY_TYPE)
        assert not await container.exists("/bin", expected_type=dagger.ExistsType.REGULAR_TYPE)


async def test_text_that_is_not_utf8_is_replaced(connect: Connect) -> None:
    async with connect() as dag:
        ran = shell(host(dag), r"printf 'a\377b' >/tmp/f; printf 'c\377d'")
        assert await ran.stdout() == "c\ufffdd"
        assert await ran.file("/tmp/f").contents() == "a\ufffdb"


async def test_lines_of_a_file(connect: Connect) -> None:
    async with connect() as dag:
        assert await dag.file("f", "1\n2\n3\n4").contents(offset_lines=1, limit_lines=2) == "2\n3\n"


async def test_equal_content_has_an_equal_digest_whatever_its_times(connect: Connect) -> None:
    async with connect() as dag:
        directory = dag.directory().with_new_file("f", "1")
        assert await directory.digest() == await directory.with_timestamps(1000).digest()
        assert await directory.digest() != await directory.with_new_file("f", "2").digest()


async def test_changes_name_what_a_command_did(connect: Connect) -> None:
    async with connect() as dag:
        before = (
            dag.directory()
            .with_new_file("a", "1").with_new_file("b", "1").with_new_file("mode", "m")
            .with_new_file("gone/z", "1").with_new_file("f2d", "f").with_new_file("d2f/k", "k")
            .with_new_directory("emptyd").with_symlink("a", "ln").with_new_file("same", "1")
        )  # fmt: skip
        after = shell(
            host(dag).with_mounted_directory("/w", before).with_workdir("/w"),
            "echo 2 >a; chmod 700 mode; rm -r gone b f2d d2f; mkdir f2d; echo q >f2d/q; echo f >d2f;"
            "rmdir emptyd; mkdir -p new/deep; echo n >new/deep/n; mkdir newempty; ln -sf b ln;"
            "ln -s zz newln; echo z >'sp ace'; touch -d @1 same",
        ).directory("/w")
        changes = after.changes(before)
        assert await changes.added_paths() == [
            "d2f", "f2d/", "f2d/q", "new/", "new/deep/", "new/deep/n", "newempty/", "newln", "sp ace",
        ]  # fmt: skip
        assert await changes.modified_paths() == ["a", "ln", "mode"]
        assert await changes.removed_paths() == ["b", "d2f/", "emptyd/", "f2d", "gone/"]
        assert not await changes.is_empty()
        assert await before.changes(before).is_empty()
        assert "new/deep/n" in await changes.layer().glob("**")
        assert await after.diff(before).glob("gone/*") == ["gone/z"]


async def test_a_change_that_keeps_size_and_time_is_seen(connect: Connect) -> None:
    async with connect() as dag:
        before = dag.directory().with_new_file("f", "1")
        script = "cd /w; touch -r f /tmp/t; sleep 0.1; printf 2 >f; touch -r /tmp/t f"
        after = shell(host(dag).with_mounted_directory("/w", before), script).directory("/w")
        assert await after.changes(before).modified_paths() == ["f"]


async def test_a_changeset_is_exported_with_its_removals(connect: Connect, tmp_path: Path) -> None:
    target = tmp_path / "out"
    async with connect() as dag:
        before = dag.directory().with_new_file("old/x", "").with_new_file("kept", "1")
        await before.export(str(target))
        after = before.without_directory("old").with_new_file("new", "2")
        await after.changes(before).export(str(target))
    assert sorted(path.name for path in target.iterdir()) == ["kept", "new"]


async def test_an_export_is_the_same_tree(connect: Connect, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "made" / "target"
    make_odd_tree(source)
    async with connect() as dag:
        sent = dag.host().directory(str(source))
        back = shell(host(dag).with_mounted_directory("/w", sent), "true").directory("/w")
        assert await back.export(str(target)) == str(target)
    assert describe(target) == describe(source)


def make_odd_tree(root: Path) -> None:
    """Make whatever an ordinary user can make."""
    (root / "empty").mkdir(parents=True)
    (root / "sub").mkdir()
    (root / "sub" / "run").write_text("#!/bin/sh\n")
    (root / "sub" / "run").chmod(0o755)
    (root / "secret").write_text("s")
    (root / "secret").chmod(0o600)
    (root / "link").symlink_to("sub/run")
    (root / "outside").symlink_to("/etc/passwd")
    (root / "broken").symlink_to("no where")
    (root / "two words\n").write_bytes(b"\0\xff" * 1000)
    (root / os.fsdecode(b"latin-\xe4")).write_text("")
    (root / "big").write_bytes(os.urandom(3 << 20))
    os.mkfifo(root / "fifo")
    for path in (*root.rglob("*"), root):
        os.utime(path, ns=(1_600_000_000_123_456_789,) * 2, follow_symlinks=False)


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Tell everything of a tree that must survive."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        found[str(path.relative_to(root))] = (oct(status.st_mode), content, status.st_mtime_ns)
    return found


async def test_an_export_merges_unless_it_wipes(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    async with connect(state_dir=tmp_path.parent / f"{tmp_path.name}-state") as dag:
        directory = dag.directory().with_new_file("f", "1")
        await directory.export(str(tmp_path))
        assert sorted(os.listdir(tmp_path)) == ["f", "there"]
        await directory.export(str(tmp_path), wipe=True)
        assert sorted(os.listdir(tmp_path)) == ["f"]


async def test_an_export_does_not_follow_a_link_that_is_in_its_way(
    connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("before")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f").symlink_to(tmp_path / "victim")
    async with connect() as dag:
        await dag.directory().with_new_file("f", "after").export(str(tmp_path / "out"))
    assert (tmp_path / "victim").read_text() == "before"
    assert (tmp_path / "out" / "f").read_text() == "after"


async def test_a_file_is_exported_to_a_path_or_into_a_directory(
    connect: Connect, tmp_path: Path
) -> None:
    async with connect() as dag:
        file = dag.file("f", "1")
        await file.export(str(tmp_path / "new" / "g"))
        with pytest.raises(dagger.QueryError, match="is a directory"):
            await file.export(str(tmp_path / "new"))
        await file.export(str(tmp_path / "new"), allow_parent_dir_path=True)
    assert sorted(os.listdir(tmp_path / "new")) == ["f", "g"]


async def test_files_that_their_owner_may_not_read_come_back_as_they_are(
    connect: Connect, tmp_path: Path
) -> None:
    async with connect() as dag:
        script = "mkdir /w/d; echo 1 >/w/d/f; echo 2 >/w/g; chmod 0 /w/d/f /w/d /w/g"
        ran = shell(host(dag).with_mounted_directory("/w", dag.directory()), script).directory("/w")
        assert await ran.file("g").contents() == "2\n"
        assert await ran.file("d/f").contents() == "1\n"
        await ran.export(str(tmp_path / "out"))
    assert stat.S_IMODE((tmp_path / "out" / "d").stat().st_mode) == 0
    (tmp_path / "out" / "d").chmod(0o700)
    assert stat.S_IMODE((tmp_path / "out" / "d" / "f").stat().st_mode) == 0


async def test_a_directory_of_the_host_is_filtered(connect: Connect, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    for name in ("a.py", "build/x", "node_modules/deep/y", "sub/b.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / ".gitignore").write_text("node_modules/\n")
    async with connect() as dag:
        place = str(folder)
        found = dag.host().directory(place, exclude=["build"], gitignore=True)
        assert await found.glob("**/*") == [".gitignore", "a.py", "sub/", "sub/b.py"]
        assert await dag.host().directory(place, include=["**/*.py"]).glob("**/*") == [
            "a.py",
            "sub/",
            "sub/b.py",
        ]
        everything = dag.host().directory(place)
        assert await everything.filter(include=["build/"]).glob("**") == ["build/", "build/x"]
        assert await everything.filter(gitignore=True).exists("sub/b.py")
        assert not await everything.filter(gitignore=True).exists("node_modules")


async def test_a_file_of_the_host(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("1")
    async with connect() as dag:
        file = dag.host().file(str(tmp_path / "f"))
        assert await file.contents() == "1"
        assert await file.name() == "f"


async def test_an_id_that_nobody_gave_is_refused(connect: Connect) -> None:
    async with connect() as dag:
        with pytest.raises(dagger.QueryError, match="no object in this session"):
            await (
                dag.directory()
                .with_directory("/", dagger.Directory(dag._ctx.select_id("Directory", "x")))
                .sync()
            )


async def test_ten_thousand_files_take_a_few_seconds(connect: Connect, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    for outer in range(100):
        (folder / f"{outer}").mkdir(parents=True)
        for inner in range(100):
            (folder / f"{outer}" / f"{inner}").write_text(f"{outer}-{inner}")
    async with connect() as dag:
        sent = await dag.host().directory(str(folder), no_cache=True).sync()
        ran = shell(
            host(dag).with_mounted_directory("/w", sent), "echo 1 >/w/0/0; find /w -type f | wc -l"
        )
        assert await ran.stdout() == "10000\n"
        assert await ran.directory("/w").changes(sent).modified_paths() == ["0/0"]
