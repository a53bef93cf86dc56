from pipelines.masking import Masker
from pipelines.report import last_line


def test_the_last_line_is_the_last_that_says_something() -> None:
    assert last_line("one\ntwo\n\n  \n") == "two"
    assert last_line("") == ""
    assert last_line("x" * 10_000) == "x" * 500 + "..."


def test_in_json_the_texts_are_masked_and_the_keys_are_not() -> None:
    masker = Masker(["secretEnv"])

    assert masker.mask_json({"secretEnv": ["a secretEnv", 1, None]}) == {
        "secretEnv": ["a ***", 1, None]
    }
