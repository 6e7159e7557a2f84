"""The answer of a deferred service goes out once, whichever comes first: its address or its content."""

from __future__ import annotations

import threading

from flashrt_ros.nodes.deferred import Reply


def test_the_content_may_come_before_the_address() -> None:
    sent: list = []
    reply = Reply(lambda response, header: sent.append((response, header)), {"code": 0})
    reply.send()
    assert sent == []
    reply.addressed("client")
    assert sent == [({"code": 0}, "client")]


def test_the_address_may_come_before_the_content() -> None:
    sent: list = []
    reply = Reply(lambda response, header: sent.append((dict(response), header)), {})
    reply.addressed("client")
    assert sent == []
    reply.response["code"] = 3
    reply.send()
    assert sent == [({"code": 3}, "client")]


def test_both_at_once_send_one_answer() -> None:
    for _ in range(200):
        sent: list = []
        reply = Reply(lambda response, header, sent=sent: sent.append(header), {})
        barrier = threading.Barrier(2)

        def other(reply=reply, barrier=barrier) -> None:
            barrier.wait()
            reply.send()

        thread = threading.Thread(target=other)
        thread.start()
        barrier.wait()
        reply.addressed("client")
        thread.join()
        assert sent == ["client"]
