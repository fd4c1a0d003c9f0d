"""Names that become folders, and addresses with passwords: what is taken, shortened, masked."""

import pytest
from pydantic import TypeAdapter, ValidationError

from flatlora.config.types import FolderName, FolderPath
from flatlora.inputs.rows import Source, local_file
from flatlora.utils.errors import ConfigError
from flatlora.utils.masking import masked, masked_url
from flatlora.utils.names import MOST_BYTES, fitting, printable, size, stays_inside


def takes(kind, text):
    try:
        return TypeAdapter(kind).validate_python(text) == text
    except ValidationError:
        return False


@pytest.mark.parametrize("name", ["a", "a.b", "n" * 100, "é" * 50, "漢" * 33, "😀" * 25, "a=b", "-", "a..b"])
def test_names_of_folders(name):
    assert takes(FolderName, name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".a",
        "a/b",
        "/a",
        "x/../../../evil",
        "a b",
        "a\n",
        "a\x1b[0m",
        "a\x7f",
        "a\x00",
        "a\udcff",
        "\u2028",
    ],
)
def test_names_that_lead_elsewhere_or_cannot_be_shown_are_rejected(name):
    assert not takes(FolderName, name)


@pytest.mark.parametrize(("sign", "most"), [("n", 100), ("é", 50), ("漢", 33), ("😀", 25)])
def test_names_are_counted_in_bytes(sign, most):
    assert takes(FolderName, sign * most)
    assert not takes(FolderName, sign * (most + 1))
    assert takes(FolderPath, "/".join([sign * most] * 8))
    assert not takes(FolderPath, sign * 256)
    assert not takes(FolderPath, "/".join([sign * most] * 30))


def test_a_text_of_any_length_fits_into_a_part_of_a_path():
    assert fitting("max_rows=2") == "max_rows=2"
    long = [fitting("漢" * 300), fitting("漢" * 301), fitting("n" * 300)]
    assert len(set(long)) == 3
    assert all(size(name) <= MOST_BYTES for name in long)


def test_places_below_a_folder():
    assert all(map(stays_inside, ["a/b", "a", "a..b/c"]))
    assert not any(map(stays_inside, ["/a", "../a", "a/../../b", "a\x00"]))


@pytest.mark.parametrize("name", [("../x", "main", "train"), ("/etc", "main", "train"), ("a/b", "main", "../../train")])
def test_names_of_data_sets_do_not_lead_out_of_data_root(name, tmp_path):
    with pytest.raises(ConfigError, match="is outside data_root"):
        local_file(Source(*name), str(tmp_path))


def test_control_characters_are_spelled_in_messages():
    assert printable("a\x1b[31m\udcffé漢\n\tb") == "a\\x1b[31m\\udcffé漢\n\tb"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("judge_url=http://me:pa55@h:1/v1 is", "judge_url=http://***@h:1/v1 is"),
        ("http://token@h/v1, http://h/a", "http://***@h/v1, http://h/a"),
        ("http://me:p@55/x@h/v1", "http://***@h/v1"),  # no address, but a password
        ("file:///a@b and a@b", "file:///a@b and a@b"),
        ("base_url=me:pa55@h/v1 is", "base_url=***@h/v1 is"),  # http:// is missing, or not whole
        ("judge_url=http:/me:pa55@h", "judge_url=***@h"),
        ("judge_url=//me:pa55@h", "judge_url=***@h"),
        ("model@dataset=x:y, 127.0.0.1:80/v1", "model@dataset=x:y, 127.0.0.1:80/v1"),
        ("http://h/v1", "http://h/v1"),
    ],
)
def test_passwords_are_masked(text, shown):
    assert masked(text) == shown


def test_an_address_keeps_all_but_its_user():
    assert masked_url("https://me:pa55@h:1/v1/a@b") == "https://***@h:1/v1/a@b"
    assert masked_url("https://h:1/v1/a@b") == "https://h:1/v1/a@b"
    assert "pa55" not in masked_url("http://me:pa55@[bad/v1")
