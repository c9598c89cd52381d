"""What a failed request is told as, in the words that several versions of Python have for it."""

import httpx
import pytest

from client.reachability import problem_of


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)", "unreachable"),
        ("TLS/SSL connection has been closed (EOF) (_ssl.c:992)", "unreachable"),  # Python 3.11.2
        ("_ssl.c:989: The handshake operation timed out", "unreachable"),
        ("[Errno 111] Connection refused", "unreachable"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:992)", "tls"),
        ("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (_ssl.c:2576)", "tls"),
    ],
)
def test_a_peer_that_hangs_up_is_out_of_reach_and_one_of_another_certificate_is_not(words: str, problem: str) -> None:
    assert problem_of(httpx.ConnectError(words)) == problem
