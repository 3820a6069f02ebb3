"""The demo pictures, their captions, and the reader that judges rendered pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from farm.demo.training import check, pictures
from farm.demo.training.pictures import Combo


def drawn(combo: Combo, seed: int, size: int = pictures.SIZE) -> Image.Image:
    return pictures.draw(combo, pictures.dice(seed), size)


def test_reader_is_right_on_every_combination() -> None:
    wrong = [
        (combo, read)
        for seed, combo in enumerate(pictures.all_combos())
        if (read := check.read_picture(drawn(combo, seed))) != combo
    ]
    assert wrong == []


@pytest.mark.parametrize("size", [48, 128])
def test_reader_is_right_at_other_sizes(size: int) -> None:
    combos = pictures.all_combos()[::29]
    assert [check.read_picture(drawn(combo, 3, size)) for combo in combos] == combos


def test_reader_says_unknown_to_a_plain_picture() -> None:
    plain = Image.new("RGB", (64, 64), pictures.COLOURS["blue"])
    assert check.read_picture(plain) == (check.UNKNOWN, check.UNKNOWN, "blue")


def test_reader_names_no_shape_in_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert check.read_picture(Image.fromarray(noise)).shape == check.UNKNOWN


def test_reader_names_no_shape_in_half_a_shape() -> None:
    picture = drawn(Combo("star", "red", "white"), 1)
    picture.paste(pictures.COLOURS["white"], (0, 0, 32, 64))
    assert check.read_picture(picture).shape == check.UNKNOWN


def test_drawing_is_deterministic_and_seeds_differ() -> None:
    combo = Combo("heart", "pink", "black")
    assert drawn(combo, 7).tobytes() == drawn(combo, 7).tobytes()
    assert drawn(combo, 7).tobytes() != drawn(combo, 8).tobytes()


def test_drawing_has_the_stated_size_and_mode() -> None:
    picture = drawn(Combo("ring", "green", "white"), 0)
    assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_combinations_are_all_there_once() -> None:
    combos = pictures.all_combos()
    assert len(combos) == len(set(combos)) == 8 * 8 * 7
    assert all(combo.colour != combo.ground for combo in combos)


def test_held_out_share_is_as_stated() -> None:
    held_out, trained = pictures.held_out_combos(), pictures.trained_combos()
    assert not set(held_out) & set(trained)
    assert set(held_out) | set(trained) == set(pictures.all_combos())
    share = 100 * len(held_out) / len(pictures.all_combos())
    assert abs(share - pictures.HELD_OUT_PERCENT) < 2


def test_every_pair_of_words_is_trained_on() -> None:
    trained = pictures.trained_combos()
    for first, second, pairs in ((0, 1, 64), (0, 2, 64), (1, 2, 56)):
        assert len({(combo[first], combo[second]) for combo in trained}) == pairs


def test_captions_are_as_stated() -> None:
    combo = Combo("star", "red", "blue")
    assert pictures.caption(combo) == "a red star on a blue background"
    assert pictures.caption(combo, 2) == "a red star on blue"
    assert pictures.caption(combo, 5) == "a red star"


def test_caption_shares_add_up() -> None:
    assert sum(share for _, share in pictures.TEMPLATES) == pytest.approx(1.0)
    assert max(pictures.TEMPLATES, key=lambda form: form[1]) == pictures.TEMPLATES[0]
