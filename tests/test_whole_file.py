"""Files that are there as a whole or not at all."""

import pytest

from stretchysnake_jax.whole_file import whole_file


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    with whole_file(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError), whole_file(path) as part:
        part.write_text("tw")
        raise KeyError
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
