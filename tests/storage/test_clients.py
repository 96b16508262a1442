"""The clients: the forms of REDIS_URL, and our settings."""

from __future__ import annotations

import pytest
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, SSLConnection

from service.errors import ConfigError
from service.runtime.embedded_redis import EmbeddedServer
from service.secret import Secret
from service.storage.clients import BLOCK_S
from service.storage.connections import Connections, connect, display_address
from tests.support.proxy import Fault, proxy_to


class TestUrls:
    """The forms of REDIS_URL."""

    async def test_a_socket_may_name_the_database(self, redis_server: EmbeddedServer) -> None:
        """A Unix socket's URL may name the database."""
        async with connect(Secret(f"{redis_server.url}?db=3")) as connections:
            assert await connections.client.ping()
            assert (await connections.client.client_info())["db"] == 3
            assert not connections.is_cluster

    @pytest.mark.parametrize(
        "url",
        [
            *("http://hidden", "redis://hidden:port", "redis://[hidden"),
            *("redis://hidden?socket_timeout=60", "redis://hidden?decode_responses=true"),
            *("redis://hidden?retry_on_timeout=true", "redis://hidden?max_connections=hidden"),
            *("redis://hidden?nonsense=hidden", "redis://hidden?ssl_ca_certs=hidden"),
            *("redis://hidden?sentinel_password=hidden", "rediss://hidden?ssl_nonsense=hidden"),
            *("redis+sentinel://hidden", "redis+sentinel://hidden/service/hidden"),
            "redis+sentinel://hidden:port/service",
            "redis+sentinel://hidden/service?socket_timeout=60",
            "rediss+sentinel://hidden/service?ssl_nonsense=hidden",
            "redis+cluster://hidden:port",
            "redis+cluster://hidden?cluster_error_retry_attempts=3",
            "rediss+cluster://hidden?ssl_nonsense=hidden",
            *("redis://hidden/hidden", "redis://hidden/0/1", "redis+cluster://hidden/3"),
            *("redis+cluster://hidden?db=3", "redis://hidden?connection_class=hidden"),
            *("unix://hidden", "unix://hidden/redis.sock", "unix://hidden:hidden@hidden/socket"),
            *("redis://:12#34@hidden", "redis://:12?34@hidden", "unix:///hidden#hidden"),
            *("redis+cluster://:12#34@hidden", "redis+cluster://:12?34@hidden"),
            *("redis+sentinel://:12/34@hidden", "redis+sentinel://hidden/service#hidden"),
            "rediss://hidden?ssl_cert_reqs=hidden",
            "rediss+sentinel://hidden/service?ssl_cert_reqs=hidden",
            "rediss+cluster://hidden?ssl_cert_reqs=hidden",
        ],
    )
    async def test_an_unusable_url_is_an_error_that_does_not_quote_it(self, url: str) -> None:
        """A URL that is wrong, or would undo our settings, is a ConfigError by name only."""
        with pytest.raises(ConfigError) as refused:
            async with connect(Secret(url)):
                pass

        [problem] = refused.value.problems
        assert problem.startswith("REDIS_URL: expected a usable URL, ")
        assert "hidden" not in problem
        assert refused.value.__cause__ is None

    async def test_a_missing_file_is_named_by_setting_and_option(self) -> None:
        """The error names the setting that holds the URL, and the option that names the file."""
        url = Secret("rediss://hidden?ssl_keyfile=/hidden")
        with pytest.raises(ConfigError, match=r"^ADMIN_REDIS_URL: ssl_keyfile names no file$"):
            async with connect(url, setting="ADMIN_REDIS_URL"):
                pass

    @pytest.mark.parametrize(
        ("url", "where"),
        [
            ("redis://ann:hidden@one", "one:6379"),
            ("rediss://:hidden@[::1]:5000/4?ssl_ca_certs=hidden", "::1:5000"),
            ("unix://ann@/run/redis.sock?password=hidden", "/run/redis.sock"),
            ("redis+sentinel://ann:hid%40den@one,two:5000/main/4", "one:26379, two:5000"),
            ("rediss+cluster://ann:hidden@one,two:7001?ssl_keyfile=hidden", "one:6379, two:7001"),
            ("redis://ann:hidden/part@one", "?"),
        ],
    )
    def test_the_displayed_address_has_no_credentials(self, url: str, where: str) -> None:
        """Hosts and ports, or a path, are shown; user and password are not."""
        assert display_address(Secret(url)) == where

    async def test_a_sentinel_url_has_all_options(self) -> None:
        """Hosts, credentials of both kinds, service and database come from the URL."""
        url = "redis+sentinel://ann:p%40ss@one,[::1]:5000/main/4?sentinel_password=s"
        async with connect(Secret(url)) as connections:
            pool = connections.client.connection_pool
            found = pool.connection_kwargs
            hosts = [
                one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels
            ]

        assert (found["username"], found["password"], found["db"]) == ("ann", "p@ss", 4)
        assert pool.service_name == "main"
        assert [(one["host"], one["port"]) for one in hosts] == [("one", 26379), ("::1", 5000)]
        assert [(one.get("username"), one["password"]) for one in hosts] == [(None, "s")] * 2

    async def test_sentinels_are_reached_over_tls_too(self) -> None:
        """`rediss+sentinel` uses TLS to the Sentinels and to the primary."""
        url = "rediss+sentinel://one/main?ssl_check_hostname=false"
        async with connect(Secret(url)) as connections:
            pool = connections.client.connection_pool
            [watcher] = pool.sentinel_manager.sentinels
            for one in (pool, watcher.connection_pool):
                assert issubclass(one.connection_class, SSLConnection)
                assert one.connection_kwargs["ssl_check_hostname"] is False


@pytest.mark.usefixtures("own_timeouts")
class TestSettings:
    """Our settings, whatever redis-py's defaults are."""

    @pytest.mark.parametrize("url", ["redis://nowhere", "redis+sentinel://nowhere/main"])
    async def test_clients_have_our_settings(self, url: str) -> None:
        """No retries or maintenance notifications; short time-outs, longer than a blocking read."""
        async with connect(Secret(url)) as connections:
            for client, longest in ((connections.client, 1.0), (connections.blocking_client, 9.0)):
                options = client.connection_pool.connection_kwargs
                assert options["retry"].get_retries() == 0
                assert not client.connection_pool.maint_notifications_enabled()
                assert options["legacy_responses"] is True
                assert options["socket_connect_timeout"] == 0.5
                assert options["socket_timeout"] <= longest
            assert options["socket_timeout"] > BLOCK_S

    async def test_pools_are_large_enough(self, connections: Connections) -> None:
        """Short calls queue briefly for a connection; there is one for every blocking read."""
        pool = connections.client.connection_pool
        assert isinstance(pool, BlockingConnectionPool)
        assert pool.timeout == 0.25
        assert connections.blocking_client.connection_pool.max_connections >= 512

    async def test_nothing_is_executed_twice_by_the_client(self, redis_url: str) -> None:
        """A lost reply is an error: whether to retry is the caller's decision."""
        async with proxy_to(redis_url) as proxy, connect(Secret(proxy.url)) as connections:
            await connections.client.ping()
            proxy.break_next(Fault.LOSE_REPLY, at=b"INCR")
            with pytest.raises(exceptions.ConnectionError):
                await connections.client.incr("counter")
            assert await connections.client.get("counter") == b"1"
