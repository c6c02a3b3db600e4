import pytest

from isomorph.engine.config import UserError
from isomorph.engine.foreign import cause_of, foreign, one_line, printable, shortened


def test_the_whole_cause_is_kept_on_one_line() -> None:
    with pytest.raises(UserError) as caught, foreign("reading x.json, line 3"):
        try:
            raise KeyError("rope")
        except KeyError as error:
            raise ValueError("could not be read from one of:\n(1) a file\n(2) a hub\x1b[2J") from error
    assert str(caught.value) == (
        "reading x.json, line 3: ValueError: could not be read from one of: (1) a file (2) a hub\\x1b[2J; "
        "from KeyError: 'rope'"
    )


def test_an_error_without_words_has_its_type_and_ours_stays_as_it_is() -> None:
    assert cause_of(ValueError()) == "ValueError"
    with pytest.raises(UserError, match="^ours$"), foreign("around"):
        raise UserError("ours")
    with pytest.raises(KeyboardInterrupt), foreign("around"):
        raise KeyboardInterrupt


def test_a_panic_of_a_library_in_rust_is_an_error_like_others() -> None:
    class PanicException(BaseException):  # as PyO3 makes it
        pass

    with pytest.raises(UserError, match="around: PanicException: index out of bounds"), foreign("around"):
        raise PanicException("index out of bounds")


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b]0;title\x07 \x9b2J \r \u202e\ud800") == "\\x1b]0;title\\x07 \\x9b2J \\r \\u202e\\ud800"
    assert one_line("a\r\n b\x0b c") == "a\\r b\\x0b c"
    assert shortened("x" * 300, 10) == "xxxxx ... xxxxx"
    printable("half a pair: \udfff").encode("utf-8")
