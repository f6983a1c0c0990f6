"""The admin port as a whole."""

from __future__ import annotations

from aiohttp.test_utils import TestClient, TestServer

from proxy.admin.http import admin_app
from tests.proxy.test_held_for_standby import asleep


async def test_a_web_page_changes_nothing_whatever_the_route() -> None:
    app = admin_app(asleep().runtime, 0.0)
    routes = [(one.method, one.resource.canonical) for one in app.router.routes() if one.resource is not None]
    changing = [(method, path) for method, path in routes if method not in ("GET", "HEAD")]
    assert len(changing) >= 3
    async with TestClient(TestServer(app)) as client:
        for method, path in changing:
            url = path.replace("{name}", "z").replace("{id}", "1")
            async with client.request(method, url, headers={"Origin": "http://127.0.0.1:3000"}) as response:
                assert response.status == 403, (method, path)
            async with client.request(method, url) as response:
                assert response.status != 403, (method, path)
        async with client.get("/state", headers={"Origin": "http://127.0.0.1:3000"}) as response:
            assert response.status == 200
