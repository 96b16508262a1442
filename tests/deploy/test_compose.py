"""The Compose file is valid and hardened, and its Redis accepts only its own users."""

from __future__ import annotations

import contextlib
import re
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from service.config import Settings
from tests.deploy.settings_named import known_settings
from tests.support.harness import SECRET, event, signed
from tests.support.processes import Process
from tests.support.programs import ROOT, documents, program, run, tool
from tests.support.servers import binary, free_port
from tests.support.waiting import until, wait_until

COMPOSE = ROOT / "deploy" / "compose.yaml"
USERS = ("receiver", "worker", "operator")
OURS = {"receiver-1", "receiver-2", "worker", "operator"}


@pytest.fixture(scope="module")
def project() -> Any:
    """Return the parsed file."""
    [found] = documents(COMPOSE)
    return found


def test_it_is_valid() -> None:
    """It conforms to the schema of the Compose Specification."""
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_every_container_is_hardened(project: Any) -> None:
    """No container can write to its image or has or gains a capability; all are restarted."""
    for name, service in project["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == ("no" if name == "operator" else "unless-stopped")
        # Our containers have the health check of their image.
        assert name in OURS or "healthcheck" in service


def test_mounted_files_exist(project: Any) -> None:
    """Each mounted file exists; the balancer publishes its port, and to this machine the page."""
    mounted = [
        volume.partition(":")[0]
        for service in project["services"].values()
        for volume in service.get("volumes", [])
    ]

    for path in mounted:
        assert path in project["volumes"] or (COMPOSE.parent / path).exists()
    published = {name: one["ports"] for name, one in project["services"].items() if "ports" in one}
    assert published == {"balancer": ["443:8443"], "worker": ["127.0.0.1:8001:8001"]}


def test_paths_for_redis_are_in_its_container(project: Any) -> None:
    """Each path in redis.conf or on the command line is mounted, or a folder of the image."""
    service = project["services"]["redis"]
    text = (COMPOSE.parent / "redis" / "redis.conf").read_text()
    named = re.findall(r"^(?!#)\S+ (/\S+)", text, re.MULTILINE)
    named += re.findall(r"(?<=\s)/[a-z][^\s;]*", service["entrypoint"][-1])
    mounted = [volume.split(":")[1] for volume in service["volumes"]]

    assert named
    assert [
        path
        for path in named
        if not path.startswith((*mounted, *service["tmpfs"], "/run/secrets/"))
    ] == []


def test_one_service_builds_the_image(project: Any) -> None:
    """All our containers run one image, built once and never pulled from a registry."""
    ours = {name: project["services"][name] for name in OURS}
    building = [name for name, one in ours.items() if "build" in one]

    assert building == ["receiver-1"]
    assert {one["image"] for one in ours.values()} == {"identity-webhooks"}
    assert {one["pull_policy"] for name, one in ours.items() if name not in building} == {"never"}


def test_the_balancers_name_what_exists(project: Any) -> None:
    """Receivers, port and certificate are those of the balancers' files; it has time to stop."""
    balancer = project["services"]["balancer"]
    receivers = {f"{name}:{Settings.port}" for name in OURS if name.startswith("receiver-")}
    [port] = {each.partition(":")[2] for each in balancer["ports"]}
    [certificate] = balancer["secrets"]
    haproxy = COMPOSE.with_name("haproxy.cfg").read_text()
    [hard_stop_s] = re.findall(r"hard-stop-after (\d+)s", haproxy)

    assert int(balancer["stop_grace_period"].removesuffix("s")) > int(hard_stop_s)
    for path in (COMPOSE.with_name("haproxy.cfg"), COMPOSE.with_name("nginx.conf")):
        text = path.read_text()
        assert set(re.findall(r"^\s+server .*?(receiver-\S+:\d+)", text, re.MULTILINE)) == receivers
        assert re.search(rf"^\s+(bind :|listen ){port} ssl", text, re.MULTILINE)
        assert f"/run/secrets/{certificate}" in text


def test_processes_get_settings(project: Any) -> None:
    """Variables are settings, secrets are files, a 200 means on disk, and all have time to stop."""
    assert "\nappendfsync always\n" in (ROOT / "deploy" / "redis" / "redis.conf").read_text()
    for name in OURS:
        service = project["services"][name]
        mounted = {each if isinstance(each, str) else each["target"] for each in service["secrets"]}
        assert service["environment"]["DURABILITY"] == "fsync"
        names = {each.upper() for each in mounted}
        assert service["environment"].keys() | names <= known_settings()
        assert "STRIPE_API_KEY" in names
        least = Settings.drain_s + Settings.shutdown_grace_s + 5
        assert float(service["stop_grace_period"].removesuffix("s")) >= least


@contextmanager
def its_redis(project: Any, directory: Path, port: int) -> Iterator[None]:
    """Run the entry point of Redis from the file, with *directory* in place of the root."""
    *_, script = project["services"]["redis"]["entrypoint"]
    moved = script.replace("$$", "$").replace("--bind '*'", f"--bind 127.0.0.1 --port {port}")
    moved = moved.replace("valkey-server", str(binary()))
    for path, place in {
        "/tmp/users.acl": f"{directory}/users.acl",  # noqa: S108 - the container's
        "/etc/redis/": f"{ROOT}/deploy/redis/",
        "/run/secrets/": f"{directory}/",
        "--dir /data": f"--dir {directory}",
    }.items():
        moved = moved.replace(path, place)
    process = subprocess.Popen([program("bash", "bash"), "-euc", moved], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def write_secrets(directory: Path, port: int) -> dict[str, str]:
    """Write the files of deploy/secrets; return the users' passwords."""
    passwords = {user: secrets.token_hex(32) for user in USERS}
    for user, password in passwords.items():
        url = f"redis://{user}:{password}@127.0.0.1:{port}/0"
        (directory / f"redis_url_{user}").write_text(url)
    (directory / "stripe_webhook_secrets").write_bytes(SECRET.reveal())
    (directory / "stripe_api_key").touch()
    (directory / "admin_tokens").write_text(f"alice:{secrets.token_hex(32)}")
    return passwords


def run_secrets(project: Any, name: str, directory: Path) -> Path:
    """Return a directory with the secrets of one container, under the names it sees."""
    mounted = directory / name
    mounted.mkdir()
    for each in project["services"][name]["secrets"]:
        secret = {"source": each, "target": each} if isinstance(each, str) else each
        (mounted / secret["target"]).symlink_to(directory / secret["source"])
    return mounted


def test_redis_accepts_its_users_only(project: Any, tmp_path: Path) -> None:
    """Each user can log in by the password in its URL only, and no login works without one."""
    port = free_port()
    passwords = write_secrets(tmp_path, port)

    def client(**user: str) -> redis.Redis:
        return redis.Redis(port=port, socket_timeout=30, **user)  # type: ignore[arg-type]

    def answers() -> bool:
        try:
            return bool(client(username="receiver", password=passwords["receiver"]).ping())
        except redis.exceptions.ConnectionError:
            return False

    with its_redis(project, tmp_path, port):
        wait_until(answers)
        for user, password in passwords.items():
            assert client(username=user, password=password).ping()
            with pytest.raises(redis.AuthenticationError):
                client(username=user, password="guessed").ping()
            with pytest.raises(redis.exceptions.NoPermissionError):
                client(username=user, password=password).flushall()
        with pytest.raises(redis.AuthenticationError):
            client().ping()
        with pytest.raises(redis.AuthenticationError):
            client(username="administrator", password="").ping()


async def test_its_processes_keep_the_promises(project: Any, tmp_path: Path) -> None:
    """With their containers' settings, receiver and worker pass the operator's self-test."""
    port = free_port()
    write_secrets(tmp_path, port)
    ours = {"HOST": "127.0.0.1", "PORT": "0", "ADMIN_PORT": "0", "DRAIN_S": "0"}
    with its_redis(project, tmp_path, port), contextlib.ExitStack() as ending:

        def start(name: str, *command: str) -> Process:
            process = Process(
                *(command or project["services"][name]["command"]),
                directory=tmp_path,
                CREDENTIALS_DIRECTORY=str(run_secrets(project, name, tmp_path)),
                **{**project["services"][name]["environment"], **ours},
            )
            ending.callback(process.end)
            return process

        receiver, worker = start("receiver-1").ready(), start("worker").ready()
        body = event()
        async with httpx2.AsyncClient() as client:
            answer = await client.post(receiver.url, content=body, headers=signed(body))
        [transition] = await until(lambda: worker.lines("transition"))
        page = httpx2.get(f"{worker.admin}/dead-letters/log")
        tried = start("operator", "selftest", "--to", receiver.url)
        assert tried.wait() == 0, tried.out

    assert (answer.status_code, transition["event_id"]) == (200, "evt_1")
    # It reads as the operator's user, which its worker is not.
    assert (page.status_code, "This handler has no dead letter" in page.text) == (200, True)
