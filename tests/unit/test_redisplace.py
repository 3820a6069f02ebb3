"""An address of Redis has the same meaning for Celery and for redis-py."""

from __future__ import annotations

import ssl

import pytest

from farm.redis_address import redis_place

CA = "ssl_ca_certs=%2Fetc%2Fca.pem"


def test_a_certificate_is_verified_unless_the_address_says_otherwise() -> None:
    place = redis_place("rediss://h:6379/0")
    assert place.tls == {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    with place.client() as client:
        assert (
            client.connection_pool.connection_kwargs.get("ssl_cert_reqs", "required") == "required"
        )


@pytest.mark.parametrize("word", ["none", "CERT_NONE", "cert_none", "NONE"])
def test_celery_s_words_and_redis_py_s_are_one(word: str) -> None:
    place = redis_place(f"rediss://:secret@h:6379/0?ssl_cert_reqs={word}&{CA}")
    assert place.broker == f"rediss://:secret@h:6379/0?ssl_cert_reqs=none&{CA}"
    with place.client() as client:
        told = client.connection_pool.connection_kwargs
        assert (told["ssl_cert_reqs"], told["ssl_ca_certs"]) == ("none", "/etc/ca.pem")


def test_another_word_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="ssl_cert_reqs=required, optional or none"):
        redis_place("rediss://h:6379/0?ssl_cert_reqs=maybe")
