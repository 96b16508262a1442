"""Where settings come from, which values they accept, and that no problem quotes a value.

No test reads the environment of its own process.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from service.config import SECRETS, Durability, Livemode, Settings, describe, read_again
from service.environment import example
from service.errors import ConfigError
from service.parsers import parse_time
from service.secret import Secret

API_KEY = "STRIPE_API_KEY"
NOWHERE = Path(__file__) / "nowhere"
NAMES = tuple(row.name for row in describe())
CANARY = "canary-é7 \t"
ASCENDING = (
    "SESSION_RETENTION_DAYS: expected more than MAX_EVENT_AGE_DAYS",
    "RETRY_MAX_DELAY_S: expected at least RETRY_INITIAL_DELAY_S",
)
# What is refused, for each setting. A number has ASCII digits only, and a decimal one point between
# digits, although Python reads other texts as numbers.
NO_NUMBERS = (
    *("+80", "-1", " 80", "80 ", "80\n", "8_0", "0x50", "1e3", "٨٠", "²", "nan", "inf", "9" * 5000),
    *("80.", ".5", "1.5.0", "1,5"),
)
NO_SECRETS = (
    *(" ", ",", "a,", ",a", "a,,b", "a, b", " a", "a ", "a b", "a\tb", "a\n", "a\0"),
    *("é", "a,a", '"whsec_a"', "'whsec_a'", '"whsec_a', 'whsec_a"', "whsec_a,'whsec_b'"),
    *("a" * 257, ",".join(map(str, range(17)))),
)
NO_TOKENS = (
    *("canary", "canary" * 4, ":canarycanarycanary", "a:canary", "a:" + "b" * 15),
    *("a:" + "b" * 257, "A:canarycanarycanary", f"{'a' * 33}:canarycanarycanary"),
    *("a:canarycanary canary", "a:canarycanary\tcanary", " a:canarycanarycanary"),
    *("a:canarycanarycanarÿ", "a:canarycanarycanary,", "a:canarycanarycanary\n"),
    "a:canarycanarycanary,a:another0canary00",
    "a:canarycanarycanary,b:canarycanarycanary",
)
REFUSED: dict[str, tuple[str, ...]] = {
    "PORT": (*NO_NUMBERS, "80.0"),
    "DRAIN_S": NO_NUMBERS,
    "REDIS_URL": (
        *("http://localhost", "unix+cluster:///run/redis.sock", "redis://", "redis://local host"),
    ),
    "REDIS_PREFIX": ("IDV", "a" * 33),
    "HOST": ("local host",),
    "LOG_LEVEL": ("INFO",),
    "HANDLERS": (
        *("log,log", "log,fetch", "reconcile", "log, nats", "log,"),
        *("acme.audit", "acme..audit:open", "ärger"),
    ),
    "LOG_METADATA_KEYS": ("a,,b",),
    "STRIPE_API_BASE": (
        *("http://api.stripe.com", "http://127.0.0.1.example.com"),
        *("https://user:canary@api.stripe.com", "https://api.stripe.com/?x=1"),
        "https://api.stripe.com/",
    ),
    "STRIPE_ACCOUNTS": ("acct_1, acct_2", "1"),
    "RECONCILE_FROM": (
        *("3", "-3d", "3w", "2026-11-29", "2026-11-29T10:00:00", "2026-13-29T10:00:00Z"),
    ),
    SECRETS: NO_SECRETS,
    f"{SECRETS}_ACME": NO_SECRETS,
    # A key of neither mode, two of one mode, whitespace and quotation marks.
    API_KEY: (
        *("pk_live_1", "sk_org_canary", "sk_live", "sk_live_", "whsec_1", "SK_LIVE_1", "sk_prod_1"),
        *(" sk_live_1", "sk_live_1 ", "sk_live_1\n", "sk_live_1, sk_test_1", "sk_live_1\t"),
        *('"sk_live_1"', "'sk_live_1'", "sk_live_1,", ",", "sk_live_1;sk_test_1", "sk_live_é"),
        *("sk_live_1,sk_live_1", "sk_live_1,rk_live_2", "sk_live_1,sk_test_1,rk_test_1"),
        "rk_live_" + "a" * 241,
    ),
    "ADMIN_TOKENS": NO_TOKENS,
    "ADMIN_READ_TOKENS": NO_TOKENS,
    "ADMIN_HOSTS": ("a:8001", "[::1]", "a_b", ".a", "a.", "-a", "a b", "a,a", "*.a"),
}
# How some problems begin.
EXPECTED = {
    API_KEY: "rk_live_..., rk_test_...",
    "ADMIN_TOKENS": "name:token, ",
    "ADMIN_READ_TOKENS": "name:token, ",
    "ADMIN_HOSTS": "0 to 64 different names",
}


def load(
    environ: dict[str, str], *, require_secrets: bool = False, run_secrets: Path = NOWHERE
) -> Settings:
    """Read settings without the secrets of this machine."""
    return Settings.from_environ(environ, require_secrets=require_secrets, run_secrets=run_secrets)


def problems(
    environ: dict[str, str], *, require_secrets: bool = False, run_secrets: Path = NOWHERE
) -> tuple[str, ...]:
    """Return the problems of an environment that must be refused; none may quote a canary."""
    with pytest.raises(ConfigError) as caught:
        load(environ, require_secrets=require_secrets, run_secrets=run_secrets)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert "canary" not in f"{caught.value!s}{caught.value!r}{caught.value.args}"
    return caught.value.problems


def file(folder: Path, name: str, text: str) -> Path:
    """Write a file and return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(text.encode())
    return path


def keys(*texts: str) -> tuple[Secret[bytes], ...]:
    """Return texts as the secrets of an endpoint."""
    return tuple(Secret(text.encode()) for text in texts)


def test_defaults() -> None:
    """An empty environment gives the documented defaults, without any secret."""
    assert load({}) == Settings()
    assert load({}).redis_url.reveal() == "redis://127.0.0.1:6379/0"
    assert load({}).secrets == {}
    assert (load({}).partitions, load({}).drain_s, load({}).handlers) == (8, 5.0, ("log",))
    assert (load({}).durability, load({}).livemode) == (Durability.NONE, Livemode.BOTH)


def test_values_have_the_declared_type() -> None:
    """Every kind of setting is converted to the type of its field."""
    found = load(
        {
            "PORT": "0",
            "DRAIN_S": "0",
            "RETRY_INITIAL_DELAY_S": "2.5",
            "DURABILITY": "fsync",
            "HANDLERS": "log,my-queue,fetch-2,fetch:open,acme.audit:open",
            "LOG_METADATA_KEYS": "order_id,user",
            "ADMIN_HOSTS": "page.example,Ops-1",
            "REDIS_URL": "rediss+sentinel://:pw@a:1,b:2/main",
        }
    )
    assert (found.port, found.drain_s, found.retry_initial_delay_s) == (0, 0.0, 2.5)
    assert isinstance(found.drain_s, float)
    assert found.durability is Durability.FSYNC
    assert found.handlers == ("log", "my-queue", "fetch-2", "fetch:open", "acme.audit:open")
    assert found.log_metadata_keys == ("order_id", "user")
    assert found.admin_hosts == ("page.example", "Ops-1")
    assert found.redis_url == Secret("rediss+sentinel://:pw@a:1,b:2/main")


def test_settings_cannot_be_changed() -> None:
    """Settings are frozen."""
    with pytest.raises(FrozenInstanceError):
        load({}).port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        load({}).secrets["x"] = ()  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_variable_is_one_not_set(name: str, tmp_path: Path) -> None:
    """An empty `NAME` or `NAME_FILE` is ignored, so that later sources count."""
    assert load({name: "", f"{name}_FILE": ""}) == Settings()
    file(tmp_path, "port", "81")
    assert load({"PORT": ""}, run_secrets=tmp_path).port == 81


def test_unknown_variables_are_ignored() -> None:
    """Variables of other programs are ignored."""
    assert load({"PATH": "/bin", "PORTS": "x", "stripe_webhook_secrets_a": " "}) == Settings()


def test_order_of_the_sources(tmp_path: Path) -> None:
    """The order is: variable, file, systemd credentials, mounted secrets."""
    mounted, credentials = tmp_path / "mounted", tmp_path / "credentials"
    places = [
        file(mounted, "port", "1"),
        file(mounted, "PORT", "2"),
        file(credentials, "port", "3"),
        file(credentials, "PORT", "4"),
    ]
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    pointer = {"PORT_FILE": str(file(tmp_path, "any", "5\n"))}
    assert load(environ | {"PORT": "6"}, run_secrets=mounted).port == 6
    assert load(environ | pointer, run_secrets=mounted).port == 5
    for expected, place in zip((4, 3, 2, 1), reversed(places), strict=True):
        assert load(environ, run_secrets=mounted).port == expected
        place.unlink()
    assert load(environ, run_secrets=mounted).port == 8000


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_and_its_file_are_a_problem(name: str) -> None:
    """Setting both `NAME` and `NAME_FILE` is a problem."""
    assert problems({name: "1", f"{name}_FILE": "x"}) == (
        f"{name}: expected alone, but {name}_FILE is set as well",
    )


@pytest.mark.parametrize("path", ["/nonexistent/canary", ".", "canary\0", "\udcff"])
def test_an_unreadable_file_is_a_problem(path: str) -> None:
    """A `NAME_FILE` that cannot be read is a problem, which does not quote the path."""
    assert problems({"REDIS_URL_FILE": path}) == (
        "REDIS_URL_FILE: expected a readable file of UTF-8 text",
    )


def test_an_unreadable_mounted_file_is_a_problem(tmp_path: Path) -> None:
    """A mounted file that is not text is a problem."""
    (tmp_path / "redis_url").write_bytes(b"redis://\xff")
    assert problems({}, run_secrets=tmp_path) == (
        "REDIS_URL: expected a readable file of UTF-8 text",
    )


@pytest.mark.parametrize("directory", ["", "/nonexistent", "a\0"])
def test_a_directory_that_cannot_be_listed_is_empty(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A credentials directory that cannot be listed, or an empty one, changes nothing."""
    file(tmp_path, "port", "81")
    monkeypatch.chdir(tmp_path)
    assert load({"CREDENTIALS_DIRECTORY": directory}) == Settings()


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("whsec_a", True),
        ("whsec_a\n", True),
        ("whsec_a\n\n", False),
        ("whsec_a \n", False),
        ("whsec_a\r\n", False),
        ("\n", False),
        ("", False),
    ],
)
def test_exactly_one_newline_of_a_file_is_dropped(text: str, good: bool, tmp_path: Path) -> None:
    """One newline at the end of a file is dropped; all other whitespace is refused."""
    environ = {f"{SECRETS}_FILE": str(file(tmp_path, "any", text))}
    if good:
        assert load(environ).secrets == {"": keys("whsec_a")}
    else:
        assert len(problems(environ)) == 1


def test_all_problems_are_reported_at_once() -> None:
    """The error has every problem, each with the variable and what is expected."""
    wrong = dict.fromkeys(NAMES, CANARY)
    found = problems(wrong | {f"{SECRETS}_A": " ", f"{SECRETS}_b": "x"})
    assert len(found) == len(NAMES) + 2
    assert "PORT: expected a whole number from 0 to 65535" in found
    assert "LIVEMODE: expected one of both, live, test" in found
    assert {problem.partition(":")[0].strip("'") for problem in found} == (
        {*NAMES, f"{SECRETS}_A", f"{SECRETS}_b"}
    )


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("PARTITIONS", 1, 256),
        ("PORT", 0, 65535),
        ("ADMIN_PORT", 0, 65535),
        ("MAX_BODY_BYTES", 1024, 16777216),
        ("SIGNATURE_TOLERANCE_S", 1, 3600),
        ("MAX_IN_FLIGHT", 1, 100000),
        ("MAX_EVENT_AGE_DAYS", 31, 399),
        ("SESSION_RETENTION_DAYS", 36, 3650),
        ("HANDLER_CONCURRENCY", 1, 1024),
        ("RETRY_MAX_ATTEMPTS", 1, 1000),
        # Alerts expect a pass at least so often.
        ("RECONCILE_EVERY_S", 0, 300),
        ("LEASE_TTL_S", 1, 300),
    ],
)
def test_bounds_are_included(name: str, low: int, high: int) -> None:
    """Both bounds of a number are accepted, and nothing beyond them."""
    assert getattr(load({name: str(low)}), name.lower()) == low
    assert getattr(load({name: str(high)}), name.lower()) == high
    assert problems({name: str(low - 1)})
    assert problems({name: str(high + 1)})


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in REFUSED.items() for text in texts]
)
def test_wrong_texts_are_refused(name: str, text: str) -> None:
    """At the start, not at the first event, and with what is expected."""
    [problem] = problems({name: text}, require_secrets=name.startswith(SECRETS))
    assert problem.startswith(f"{name}: expected {EXPECTED.get(name, '')}")


def test_related_settings_are_compared() -> None:
    """Retention must exceed the age limit, and the longest delay the first one."""
    environ = {"MAX_EVENT_AGE_DAYS": "400", "RETRY_INITIAL_DELAY_S": "300.5"}
    assert problems(environ) == ASCENDING
    assert (
        load({"MAX_EVENT_AGE_DAYS": "399", "RETRY_INITIAL_DELAY_S": "300"}).max_event_age_days
        == 399
    )


def test_a_wrong_value_is_not_compared() -> None:
    """A wrong setting causes one problem, and no second one by comparison."""
    environ = {"MAX_EVENT_AGE_DAYS": "x", "SESSION_RETENTION_DAYS": "32"}
    assert problems(environ) == ("MAX_EVENT_AGE_DAYS: expected a whole number from 31 to 3649",)


def test_the_largest_secrets_are_accepted() -> None:
    """Sixteen secrets of 256 characters are accepted."""
    texts = [f"{number:x}" * 256 for number in range(16)]
    assert load({SECRETS: ",".join(texts)}).secrets[""] == keys(*texts)


def test_endpoints_are_found_in_every_source(tmp_path: Path) -> None:
    """Every source can name an endpoint; the key is its name in lower case."""
    mounted, credentials = tmp_path / "mounted", tmp_path / "credentials"
    file(mounted, "stripe_webhook_secrets_docker_1", "d\n")
    file(mounted, f"{SECRETS}_ENV", "lost")
    file(mounted, "unrelated", " ")
    file(credentials, f"{SECRETS}_SYSTEMD", "s")
    environ = {
        SECRETS: "main",
        f"{SECRETS}_ENV": "e1,e2",
        f"{SECRETS}_PATH_FILE": str(file(tmp_path, "any", "p\n")),
        "CREDENTIALS_DIRECTORY": str(credentials),
    }
    assert load(environ, run_secrets=mounted).secrets == {
        "": keys("main"),
        "docker_1": keys("d"),
        "env": keys("e1", "e2"),
        "path": keys("p"),
        "systemd": keys("s"),
    }


@pytest.mark.parametrize("ending", ["", "a", "A-B", "Ä", "FILE_FILE", "A_FILE_FILE", "A" * 65])
def test_an_endpoint_has_a_plain_name(ending: str) -> None:
    """A variable that begins like ours but names no possible endpoint is a problem."""
    (problem,) = problems({f"{SECRETS}_{ending}": "whsec_canary"}, require_secrets=True)
    assert "expected an ENDPOINT" in problem
    assert problem.isascii()
    assert "canary" not in problem


def test_a_mounted_file_cannot_look_like_a_pointer(tmp_path: Path) -> None:
    """Directories hold values only, so a name that ends in `_file` is refused."""
    file(tmp_path, "stripe_webhook_secrets_file", "a")
    assert len(problems({}, run_secrets=tmp_path)) == 1


def test_a_named_endpoint_has_secrets() -> None:
    """An endpoint with an empty variable is a problem: the variable failed to expand."""
    assert len(problems({SECRETS: "a", f"{SECRETS}_ACME": ""})) == 1


def test_secrets_are_required_on_request() -> None:
    """A receiver needs secrets for at least one endpoint; a worker needs none."""
    assert load({}).secrets == {}
    assert load({f"{SECRETS}_ACME": "a"}, require_secrets=True).secrets == {"acme": keys("a")}
    found = problems({"PORT": "x"}, require_secrets=True)
    assert [problem.partition(":")[0] for problem in found] == [SECRETS, "PORT"]


@pytest.mark.parametrize(
    "text",
    [
        *("rk_live_1", "sk_test_1", "sk_live_1,rk_test_1", "rk_test_1,rk_live_1"),
        "rk_live_" + "a" * 240,
    ],
)
def test_api_keys_are_of_different_modes(text: str) -> None:
    """There is at most one key of each mode, secret or restricted."""
    found = load({API_KEY: text}).stripe_api_key
    assert [key.reveal() for key in found] == text.split(",")


def test_secrets_are_read_again() -> None:
    """Read alone they must be there, unless the caller says otherwise: a file may be empty."""
    assert read_again({API_KEY: "sk_test_1"}, API_KEY) == (Secret("sk_test_1"),)
    assert read_again({}, "ADMIN_TOKENS", may_be_empty=True) == ()
    for name, text in ((API_KEY, ""), (API_KEY, "sk_org_canary"), ("ADMIN_TOKENS", "canary")):
        with pytest.raises(ConfigError, match=f"^{name}: expected ") as caught:
            read_again({name: text}, name, may_be_empty=name != API_KEY)
        assert "canary" not in str(caught.value)


def test_admin_tokens_are_named() -> None:
    """Each token of the page has a name; the token may hold any visible character but a comma."""
    odd = "!\"#$%&'()*+-./:;<=>?@[\\]^_`{|}~"
    found = load({"ADMIN_TOKENS": f"alice:{odd},on-call_2:{'b' * 256}"}).admin_tokens
    assert [(each.name, each.token.reveal()) for each in found] == [
        ("alice", odd),
        ("on-call_2", "b" * 256),
    ]
    assert load({"ADMIN_READ_TOKENS": "a:" + "b" * 16}).admin_tokens == ()


def test_a_token_to_read_with_is_none_to_act_with() -> None:
    """Who was given it to look could replay and drop. A name may be in both."""
    tokens = {"ADMIN_TOKENS": f"alice:{'a' * 16}", "ADMIN_READ_TOKENS": f"bob:{'a' * 16}"}
    assert [*problems(tokens)] == ["ADMIN_READ_TOKENS: expected none of ADMIN_TOKENS"]
    assert load(tokens | {"ADMIN_READ_TOKENS": f"alice:{'b' * 16}"}).admin_read_tokens


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3d", 1_000_000 - 3 * 86_400),
        ("12h", 1_000_000 - 12 * 3600),
        ("0h", 1_000_000),
        ("1970-01-01T00:01:00Z", 60),
        ("1970-01-01t01:01:00.5+01:00", 60.5),
    ],
)
def test_a_time_is_back_from_now_or_absolute(text: str, seconds: float) -> None:
    """Days and hours count back from now; an RFC 3339 time has its offset."""
    assert parse_time(text, 1_000_000) == seconds
    assert load({"RECONCILE_FROM": text}).reconcile_from == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "https://api.stripe.com",
            "https://proxy.example:8443/stripe/v",
            "http://127.0.0.1:12111",
        ),
        *("http://localhost", "http://[::1]:80"),
    ],
)
def test_plain_http_stays_on_this_machine(text: str) -> None:
    """Stripe's API may be elsewhere, over HTTPS or on the loopback."""
    assert load({"STRIPE_API_BASE": text}).stripe_api_base == text


def test_repr_shows_no_secret() -> None:
    """The repr of settings masks secrets and the URL of Redis."""
    secrets = {
        SECRETS: "whsec_canary",
        "REDIS_URL": "redis://:canary@localhost",
        API_KEY: "sk_live_canary",
        "ADMIN_TOKENS": "alice:canarycanarycanary",
        "ADMIN_REDIS_URL": "redis://:canary@localhost",
    }
    shown = repr(load(secrets))
    assert "canary" not in shown
    assert "partitions=8" in shown


def test_the_example_names_every_setting_once() -> None:
    """Every setting is in the example once, with one line of comment before it."""
    lines = [line for line in example(describe()).splitlines() if line]
    named = [line.partition("=")[0].lower() for line in lines[1::2]]
    expected = [item.name.replace("secrets", SECRETS.lower()) for item in fields(Settings)]
    assert named == expected
    assert all(line.startswith("# ") for line in lines[::2])


def test_the_example_is_the_defaults() -> None:
    """The example sets every default, and no secret."""
    lines = [line for line in example(describe()).splitlines() if line and not line.startswith("#")]
    environ = dict(line.split("=", 1) for line in lines)
    assert load(environ) == Settings()
    assert environ[SECRETS] == ""
