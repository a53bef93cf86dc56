import base64
import json
import re
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.masking import MASK, Masker

SECRET = "s3cr3t/Pä$$ word+1"

secrets = st.lists(st.text(min_size=6, max_size=20), min_size=1, max_size=4)


def masked(masker: Masker, *chunks: bytes) -> bytes:
    stream = masker.stream()
    return b"".join([*(stream.feed(chunk) for chunk in chunks), stream.finish()])


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        quote(SECRET),
        quote(SECRET, safe=""),
        re.sub("%..", lambda m: m[0].lower(), quote(SECRET, safe="")),
        quote_plus(SECRET),
        json.dumps(SECRET)[1:-1],
        json.dumps({"a": SECRET}, ensure_ascii=False),
    ],
)
def test_a_secret_is_masked_in_every_form_it_is_commonly_printed_in(form: str) -> None:
    text = Masker([SECRET]).mask(f"before {form} after")
    assert SECRET not in text
    assert form not in text
    assert "***" in text
    assert text.startswith("before ")
    assert text.endswith(" after")


@given(
    st.binary(min_size=0, max_size=7),
    st.text(min_size=8, max_size=30),
    st.binary(min_size=0, max_size=7),
)
def test_a_secret_is_masked_in_base64_wherever_it_stands(
    before: bytes, secret: str, after: bytes
) -> None:
    whole = before + secret.encode() + after
    for encoded in (base64.b64encode(whole), base64.urlsafe_b64encode(whole)):
        shown = masked(Masker([secret]), encoded)
        assert MASK in shown
        # What is left at the ends gives away less than one byte on either side.
        middle = base64.b64encode(whole)[(len(before) * 8 + 5) // 6 : -8]
        assert len(middle) < 8 or middle not in shown


@given(secrets, st.data())
def test_no_cut_of_the_stream_lets_a_secret_through(values: list[str], data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(values) | st.text(max_size=5), max_size=8))
    text = "".join(parts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown = masked(Masker(values), *chunks)
    assert shown == masked(Masker(values), text)
    for value in values:
        assert value.encode() not in shown.replace(MASK, b"\x00\x00\x00")


@given(st.binary(max_size=200), st.integers(0, 200))
def test_bytes_without_a_secret_pass_unchanged(data: bytes, cut: int) -> None:
    masker = Masker(["not-in-there-at-all"])
    assert masked(masker, data[:cut], data[cut:]) == data
    assert masked(Masker(), data[:cut], data[cut:]) == data


def test_of_two_secrets_that_begin_alike_the_longer_is_taken_whole() -> None:
    assert Masker(["password", "password-two"]).mask("x password-two y") == "x *** y"


def test_two_secrets_that_overlap_are_masked_as_one() -> None:
    assert Masker(["abcdef", "defghi"]).mask("-abcdefghi-") == "-***-"


def test_what_is_shorter_than_six_characters_is_not_masked() -> None:
    assert Masker(["abcde"]).mask("abcde") == "abcde"
    assert Masker(["abcdef"]).mask("abcdef") == "***"


def test_a_stream_holds_back_no_more_than_the_longest_form() -> None:
    stream = Masker(["x" * 10]).stream()
    shown = stream.feed(b"a" * 1000)
    assert len(shown) >= 1000 - 20


@given(st.integers(0, 30), st.integers(0, 30))
def test_a_log_that_is_cut_shows_no_half_of_a_secret(head: int, tail: int) -> None:
    text = b"0123456789<SECRET-SECRET>9876543210"
    masker = Masker(["<SECRET-SECRET>"])
    shown = masker.stream().feed(text[:head])
    assert b"0123456789<SECRET-SECRET>".startswith(shown.replace(MASK, b"<SECRET-SECRET>"))
    assert b"<" not in shown

    end = masker.stream(after_cut=True)
    shown = end.feed(text[tail:]) + end.finish()
    assert b"S" not in shown
    assert b">" not in shown
