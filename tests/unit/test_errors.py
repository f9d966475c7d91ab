"""What is said, whatever files and arguments hold: one line, in words that a terminal only shows."""

import pytest

from pixart_sigma.cli.checks import tell
from pixart_sigma.errors import CheckpointError, SettingError, SigmaError, printable
from pixart_sigma.settings import Settings

COMMANDS = (
    "\x1b[2J\x1b]0;title\x07\x9b31m\r\x00\u202e\ud800"  # clears, renames, colours, turns, is no character
)


def raw(text: str) -> bool:
    return not all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("kind", [SigmaError, CheckpointError])
def test_a_message_commands_no_terminal_and_has_an_end(kind):
    message = str(kind(f"model.safetensors holds {COMMANDS}. Choose another file."))
    assert not raw(message) and "\\x1b[2J" in message and message.endswith("Choose another file.")
    message = str(kind(f"model.safetensors holds {'k' * 5_000_000}. Choose another file."))
    assert len(message) < 400 and message.startswith("model.safetensors holds k")
    assert message.endswith("Choose another file.")
    assert len(str(kind("many words " * 10**5 + "Choose another file."))) < 2100


def test_a_setting_is_shown_short_and_spelled_out():
    error = SettingError("t5_precision", COMMANDS * 100, "choose another")
    for message in (str(error), error.called("--t5-precision")):
        assert not raw(message) and len(message) < 500 and message.endswith("; choose another.")


def test_notes_on_standard_error_are_spelled_out(capsys):
    tell(f"It holds {COMMANDS}")
    said = capsys.readouterr().err
    assert not raw(said) and "\\x1b" in said


def test_other_scripts_stay_as_they_are():
    for text in ("雪の中の狐\u3000🦊", "Ein\u00a0Bär, größer\n\t- als", "שלום"):
        assert printable(text) == text == str(SigmaError(text))


def test_a_prompt_of_halves_of_characters_is_no_text():
    for name in ("prompt", "negative"):
        with pytest.raises(SettingError, match="UTF-8"):
            Settings(**{name: "a st\udcffar"})
