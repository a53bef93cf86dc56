import base64
import json
import re
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.masking import MASK, Masker, too_short

SECRET = "s3cr3t/Pä$$ word+1"

LONG_SECRET = "".join(chr(33 + (n * n + 7 * n) % 94) for n in range(89))
KEY_LINES = [base64.b64encode(bytes(range(n, n + 48))).decode() for n in range(0, 200, 40)]
KEY = "\n".join(["-----BEGIN OPENSSH PRIVATE KEY-----", *KEY_LINES, "short", "-----END-----"])

long_enough = st.text(min_size=6, max_size=20).filter(lambda text: not too_short(text))
secrets = st.lists(long_enough, min_size=1, max_size=4)


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
    st.text(min_size=8, max_size=30).map(str.strip).filter(lambda text: len(text) >= 8),
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


def wrapped(data: bytes, width: int, line_break: bytes) -> bytes:
    encoded = base64.b64encode(data)
    lines = [encoded[at : at + width] for at in range(0, len(encoded), width)]
    return line_break.join([*lines, b""])


@pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
@pytest.mark.parametrize("width", [1, 64, 76])
@pytest.mark.parametrize("before", [b"", b"user:", b"x" * 70])
@pytest.mark.parametrize("secret", [LONG_SECRET, SECRET, KEY])
def test_base64_that_is_broken_into_lines_is_masked_as_one(
    secret: str, before: bytes, width: int, line_break: bytes
) -> None:
    text = wrapped(before + secret.encode(), width, line_break)
    shown = masked(Masker([secret]), text)
    assert shown.count(MASK) == 1
    ends = wrapped(before, width, line_break) + MASK + b"xxxx" + 4 * line_break
    assert len(shown) <= len(ends)
    url_safe = text.translate(bytes.maketrans(b"+/", b"-_"))
    assert masked(Masker([secret]), url_safe).count(MASK) == 1


@given(st.integers(1, 80), st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0, 300)))
def test_no_cut_of_the_stream_lets_base64_in_lines_through(
    width: int, line_break: bytes, cuts: list[int]
) -> None:
    text = b"before " + wrapped(LONG_SECRET.encode(), width, line_break) + b" after"
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    masker = Masker([LONG_SECRET, "another-one"])
    assert masked(masker, *chunks) == masked(masker, text)


def test_line_breaks_do_not_change_which_of_two_secrets_is_the_longer() -> None:
    inner = "password-of-a-user"
    outer = base64.b64encode(f"{inner}:and-more-of-it".encode()).decode()
    for secret in (outer, f"{outer[:20]}\n{outer[20:]}", f"{outer[:20]}\r\n{outer[20:]}"):
        assert Masker([inner, secret]).mask(f"-{secret}-") == "-***-"


@pytest.mark.parametrize("secret", ["hunter2-x\n", "hunter2-x\r", " hunter2-x", "\thunter2-x \r\n"])
def test_blanks_around_a_secret_do_not_count(secret: str) -> None:
    assert Masker([secret]).mask("a hunter2-x b") == "a *** b"
    assert "hunter2" not in Masker([secret]).mask(f"{secret}{json.dumps(secret)}")
    encoded = base64.b64encode(b"hunter2-x")
    assert encoded not in masked(Masker([secret]), encoded)


@pytest.mark.parametrize("secret", ["abcde\n", "      ", " abc \r\n"])
def test_a_secret_is_too_short_without_the_blanks_around_it(secret: str) -> None:
    assert too_short(secret)
    assert Masker([secret]).mask(f"-{secret}-") == f"-{secret}-"


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_each_longer_line_of_a_secret_is_masked_on_its_own(line_break: str) -> None:
    masker = Masker([KEY.replace("\n", line_break)])
    for line in KEY_LINES:
        assert masker.mask(f"> {line}\n") == "> ***\n"
    assert masker.mask("\n".join(KEY_LINES)) == "\n".join(["***"] * len(KEY_LINES))
    assert masker.mask("short circuit") == "short circuit"
    assert masker.mask(f"<{KEY}>".replace("\n", line_break)) == "<***>"


def test_a_secret_that_is_not_utf_8_is_masked_in_every_form() -> None:
    value = b"hunter2-\xff\xe4-/+"
    masker = Masker([value.decode("utf-8", "surrogateescape")])
    for form in (value, quote(value).encode(), quote_plus(value).encode()):
        assert masked(masker, b"<" + form + b">") == b"<***>"
    assert MASK in masked(masker, base64.b64encode(value))


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
    # Base64 of it has 13 constant characters, and up to two of a line break between them.
    assert len(shown) > 1000 - (13 + 2 * 12)


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
