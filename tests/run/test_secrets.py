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
