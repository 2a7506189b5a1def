"""Texts become tokens, by a tokenizer or byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from bridge.dist.errors import TrainingError
from bridge.dist.train.text import Text

VOCABULARY = {"[UNK]": 0, "the": 7, "model": 9, "trains": 300}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def write(folder: Path, content: bytes) -> Path:
    file = folder / "text.txt"
    file.write_bytes(content)
    return file


def test_a_byte_is_a_token_without_a_tokenizer(tmp_path: Path) -> None:
    assert Text.read(write(tmp_path, b"ab\xff"), vocab_size=256).tokens.tolist() == [97, 98, 255]


def test_a_tokenizer_makes_the_tokens(tmp_path: Path, tokenizer: Path) -> None:
    text = Text.read(write(tmp_path, b"the model trains well"), vocab_size=301, tokenizer=tokenizer)
    assert text.tokens.tolist() == [7, 9, 300, 0]


def test_a_tokenizer_that_cuts_or_pads_reads_the_whole_text(tmp_path: Path, tokenizer: Path) -> None:
    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.enable_truncation(max_length=2)
    loaded.enable_padding(length=9)
    loaded.save(str(tokenizer))
    text = Text.read(write(tmp_path, b"the model trains well"), vocab_size=301, tokenizer=tokenizer)
    assert text.tokens.tolist() == [7, 9, 300, 0]


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(TrainingError, match="tokens up to 300, but vocab_size is 300: set vocab_size to at least 301"):
        Text.read(write(tmp_path, b"the model trains"), vocab_size=300, tokenizer=tokenizer)
    with pytest.raises(TrainingError, match="bytes up to 255, but vocab_size is 200: set vocab_size to at least 256"):
        Text.read(write(tmp_path, b"\xff"), vocab_size=200)


def test_a_text_that_is_no_utf_8_cannot_be_tokenized(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(TrainingError, match="not valid UTF-8 at byte 2"):
        Text.read(write(tmp_path, b"ab\xff"), vocab_size=301, tokenizer=tokenizer)


def test_a_text_without_tokens_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(TrainingError, match="has no tokens: pass a file with more content"):
        Text.read(write(tmp_path, b" \n"), vocab_size=301, tokenizer=tokenizer)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "[" * 100_000])
def test_a_broken_tokenizer_is_a_clear_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TrainingError, match=r"cannot read the tokenizer .*tokenizer\.json: "):
        Text.read(write(tmp_path, b"the"), vocab_size=301, tokenizer=tmp_path / "tokenizer.json")
