from tests.gateway_rig import *


async def test_x(start_gateway):
    e = FakeReplica()
    rig = await start_gateway(e)
    r = await rig.post(CHAT, chat())
    assert r.status_code == 200, r.text
    print(r.headers, r.text)
    assert e.calls[0].path == CHAT
    assert (await rig.request("HEAD", "/health/live", key=None)).status_code == 200
    assert (
        await rig.request(
            "GET",
            "/ws",
            headers={
                "connection": "upgrade",
                "upgrade": "websocket",
                "sec-websocket-key": "x3JJHMbDL1EzLkh9GBhXDw==",
                "sec-websocket-version": "13",
            },
        )
    ).status_code == 403
