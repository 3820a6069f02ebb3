"""The disk cache between starts: used while nothing has changed, and made again after a change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.pipelines import disk_cache
from farm.pipelines.disk_cache import LARGE, cache_folder, configure, file_hash


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(disk_cache, "SETTLED_SECONDS", -1.0)
    configure(tmp_path / "cache")
    yield tmp_path / "cache"
    configure(None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 2 * LARGE)
    return path


def truth(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(cache: Path) -> Path:
    [found] = (cache / "hashes").iterdir()
    return found


def forged(cache: Path, key_of: Path) -> str:
    """Put another hash with a valid checksum into the entry, so that a hit is visible."""
    status = key_of.stat()
    key: disk_cache.Key = [
        str(key_of.resolve()),
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    ]
    disk_cache._write(entry(cache), key, "0" * 64)
    return "0" * 64


def test_an_unchanged_file_is_not_read_again(cache: Path, weights: Path) -> None:
    assert file_hash(weights) == truth(weights)
    mark = forged(cache, weights)
    assert file_hash(weights) == mark
    link = weights.with_name("link.safetensors")
    link.symlink_to(weights)
    assert file_hash(link) == mark


def test_a_changed_file_is_read_again(cache: Path, weights: Path) -> None:
    file_hash(weights)
    mark = forged(cache, weights)
    before = weights.stat()
    with weights.open("r+b") as file:
        file.write(b"b")
    # Size and modification time are unchanged, as some tools leave them.
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_hash(weights) == truth(weights) != mark
    assert file_hash(weights) == truth(weights)


def test_a_replaced_file_is_read_again(cache: Path, weights: Path) -> None:
    file_hash(weights)
    forged(cache, weights)
    other = weights.with_name("other")
    other.write_bytes(b"c" * 2 * LARGE)
    other.replace(weights)
    assert file_hash(weights) == truth(weights)


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\xfe", b"[]", b"null", b'{"sha256": 1}', b'{"sha256": "0", "check": "0"}']
)
def test_a_damaged_entry_is_made_anew(cache: Path, weights: Path, damage: bytes) -> None:
    file_hash(weights)
    good = entry(cache).read_bytes()
    entry(cache).write_bytes(damage)
    assert file_hash(weights) == truth(weights)
    assert entry(cache).read_bytes() == good


def test_a_hash_that_is_changed_in_place_is_not_believed(cache: Path, weights: Path) -> None:
    file_hash(weights)
    content = json.loads(entry(cache).read_bytes())
    entry(cache).write_text(json.dumps(content | {"sha256": "0" * 64}))
    assert file_hash(weights) == truth(weights)


def test_a_file_that_was_just_written_is_hashed_and_not_remembered(
    cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "SETTLED_SECONDS", 3600.0)
    assert file_hash(weights) == truth(weights)
    assert [*(cache / "hashes").iterdir()] == []


def test_others_may_not_write_there(cache: Path, weights: Path) -> None:
    assert cache_folder("hashes") is not None
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    assert cache_folder("hashes") is None
    assert file_hash(weights) == truth(weights)
    assert [*(cache / "hashes").iterdir()] == []


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "file").write_text("")
    configure(tmp_path / "file")
    assert file_hash(weights) == truth(weights)
    configure(None)
    assert file_hash(weights) == truth(weights)
