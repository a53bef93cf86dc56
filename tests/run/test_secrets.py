from pathlib import Path

import pytest

from moonmind_ext.run.secrets import SecretError, read_env_file, resolve_secrets


def test_each_kind_of_reference_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\n")
    values = resolve_secrets(
        {
            "A": "env://HOST_A",
            "B": f"file://{tmp_path}/token",
            "C": "vault://kv/deploy#token",
            "D": "env://HOST_D",
        },
        environment={"HOST_A": "from-env", "HOST_D": "from-env"},
        given={"C": "from-env-file", "HOST_D": "from-env-file"},
    )

    assert values == {
        "A": "from-env",
        "B": "from-file",
        "C": "from-env-file",
        "D": "from-env-file",
    }


def test_everything_that_has_no_value_is_named_at_once() -> None:
    references = {"A": "env://NOT_SET", "B": "file:///not/there", "C": "vault://kv/x#y"}
    with pytest.raises(SecretError) as caught:
        resolve_secrets(references, environment={}, given={})

    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "task.container.secretEnv.A" in lines[0]
    assert "NOT_SET" in lines[0]
    assert "/not/there" in lines[1]
    assert "env file" in lines[2]


def test_an_env_file_is_read_as_docker_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# comment\n\nA=1\nB= two words \nC=a=b\nD=\n")

    assert read_env_file(file) == {"A": "1", "B": " two words ", "C": "a=b", "D": ""}


def test_a_broken_line_is_named_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("A=1\nhunter2\n")

    with pytest.raises(SecretError, match="line 2") as caught:
        read_env_file(file)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("character", ["\u2028", "\x0b", "\x0c", "\x85", "\x1c", "\r", "\r x"])
def test_a_value_is_cut_at_the_end_of_its_line_and_nowhere_else(
    tmp_path: Path, character: str
) -> None:
    file = tmp_path / "env"
    file.write_bytes(f"A=one{character}two\nB=three\r\nC=four\r\r\n".encode())

    assert read_env_file(file) == {"A": f"one{character}two", "B": "three", "C": "four\r"}


def test_a_bare_name_is_refused_and_told_that_it_is_not_needed(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("HOST_A\n")

    with pytest.raises(SecretError, match="line 1: must be NAME=VALUE; what is in the environment"):
        read_env_file(file)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_in_a_file_keeps_the_line_ends_within(tmp_path: Path, end: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(f"one\r\ntwo\n\nthree{end}".encode())

    values = resolve_secrets({"A": f"file://{file}"}, environment={}, given={})
    assert values == {"A": "one\r\ntwo\n\nthree"}


def test_a_variable_that_is_not_utf_8_is_named_with_its_field() -> None:
    environment = {"HOST_A": b"hunter2\xff".decode("utf-8", "surrogateescape")}
    with pytest.raises(SecretError) as caught:
        resolve_secrets({"A": "env://HOST_A"}, environment=environment, given={})

    message = "task.container.secretEnv.A: the variable HOST_A is not UTF-8"
    assert str(caught.value) == message
