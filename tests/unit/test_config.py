"""Settings from environment variables."""

import pytest

from services.gateway.settings import GatewaySettings
from services.inferer.settings import InfererSettings
from shared.config import BrokerSettings, load
from shared.errors import SettingsError


def inferer(**environ: str) -> InfererSettings:
    return load(InfererSettings, "INFERER", environ)


def test_values_get_the_types_of_their_fields() -> None:
    """Text, whole numbers and fractions; what is not given keeps its default."""
    settings = inferer(
        INFERER_MODEL="/models/7", INFERER_ALIAS="7", INFERER_CONCURRENCY="4", INFERER_GRACE_S="2.5"
    )
    assert (settings.model, settings.alias) == ("/models/7", "7")
    assert (settings.concurrency, settings.grace_s) == (4, 2.5)
    assert type(settings.concurrency) is int
    assert settings.max_attempts == InfererSettings().max_attempts
    assert inferer(INFERER_MODEL="tiny", INFERER_CONCURRENCY="auto").concurrency == "auto"


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("INFERER_CONCURRENCY", "many", "a number from 1 to 64 or auto"),
        ("INFERER_CONCURRENCY", "1.5", "a number from 1 to 64 or auto"),
        ("INFERER_CONCURRENCY", "0", "a number from 1 to 64 or auto"),
        ("INFERER_CONCURRENCY", "65", "a number from 1 to 64 or auto"),
        ("INFERER_MAX_ATTEMPTS", "few", "int"),
        ("INFERER_GRACE_S", "-1", ">= 0"),
        ("INFERER_GRACE_S", "nan", ">= 0"),
        ("INFERER_GRACE_S", "inf", "<= 86400"),
        ("INFERER_N_BATCH", "0", ">= 1"),
        ("INFERER_ID", "a.b", "[A-Za-z0-9_-]"),
        ("INFERER_KV_TYPE", "q8", "choose f16 or q4_0 or q8_0"),
        ("INFERER_SPLIT_MODE", "rows", "choose layer or none or row"),
        ("INFERER_FLASH_ATTENTION", "true", "choose auto or off or on"),
        ("INFERER_GPU_LAYERS", "-2", ">= -1"),
        ("INFERER_GPU_LAYERS", "4294967296", "<= 2147483647"),
        ("INFERER_MAIN_GPU", "-1", ">= 0"),
        ("INFERER_N_CTX", "4294967297", "<= 16777216"),
    ],
)
def test_a_wrong_value_names_the_variable_and_why(variable: str, value: str, why: str) -> None:
    """One line with the variable, what stood there, and what belongs there."""
    with pytest.raises(SettingsError) as raised:
        inferer(INFERER_MODEL="tiny", **{variable: value})
    message = str(raised.value)
    assert message.startswith(f"{variable}={value!r}: ")
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize("url", ["a:4222", "http://a", "nats://", "nats://a:x", "nats://a,b:1"])
def test_a_wrong_url_is_refused(url: str) -> None:
    """Here, not by a client that tries for ever; each of several counts."""
    with pytest.raises(SettingsError, match=r"^NATS_URL="):
        load(BrokerSettings, "NATS", {"NATS_URL": url})


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    """A typo is not ignored in silence; a name like nothing we know lists what there is."""
    with pytest.raises(SettingsError, match=r"INFERER_CONCURENCY.*mean INFERER_CONCURRENCY\?"):
        inferer(INFERER_CONCURENCY="2")
    with pytest.raises(
        SettingsError,
        match=r"INFERER_WHATEVER_IT_MAY_BE.*the settings are INFERER_ADAPTERS, INFERER_",
    ):
        inferer(INFERER_WHATEVER_IT_MAY_BE="2")


def test_the_default_patience_is_longer_on_a_cluster() -> None:
    """A submit waits out the election that only a cluster can have; what is set is kept."""
    assert load(GatewaySettings, "GATEWAY", {}).patience_s == 4
    assert load(GatewaySettings, "GATEWAY", {"GATEWAY_REPLICAS": "3"}).patience_s == 20
    chosen = {"GATEWAY_REPLICAS": "3", "GATEWAY_PUBLISH_PATIENCE_S": "1.5"}
    assert load(GatewaySettings, "GATEWAY", chosen).patience_s == 1.5


def test_an_empty_variable_counts_as_unset() -> None:
    """As compose files leave them; also under a name that does not exist."""
    assert inferer(INFERER_CONCURRENCY="", INFERER_MODEL="", INFERER_ZZZ="") == InfererSettings()


def test_variables_of_others_are_left_alone() -> None:
    """The `nats` command has its own NATS_ variables, and other prefixes are not ours."""
    environ = {"NATS_URL": "nats://a:1", "NATS_CONTEXT": "x", "INFERER_ZZZ": "1", "NATSX": "1"}
    assert load(BrokerSettings, "NATS", environ) == BrokerSettings(url="nats://a:1")


def test_the_url_may_list_several_servers() -> None:
    """With commas between, and spaces around them."""
    settings = BrokerSettings(url="nats://a:1, nats://b:2")
    assert settings.servers == ["nats://a:1", "nats://b:2"]


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping the real environment is read."""
    monkeypatch.setenv("NATS_URL", "nats://from-environ:4222")
    assert load(BrokerSettings, "NATS").url == "nats://from-environ:4222"


KUBERNETES = {
    "GATEWAY_SERVICE_HOST": "10.0.0.1",
    "GATEWAY_SERVICE_PORT": "5001",
    "GATEWAY_SERVICE_PORT_HTTP": "5001",
    "GATEWAY_PORT": "tcp://10.0.0.1:5001",
    "GATEWAY_PORT_5001_TCP": "tcp://10.0.0.1:5001",
    "GATEWAY_PORT_5001_TCP_PROTO": "tcp",
    "GATEWAY_PORT_5001_TCP_PORT": "5001",
    "GATEWAY_PORT_5001_TCP_ADDR": "10.0.0.1",
    "GATEWAY_PUBLIC_PORT": "tcp://[fd00::1]:80",
    "GATEWAY_PUBLIC_SERVICE_HOST": "fd00::1",
    "GATEWAY_PUBLIC_SERVICE_PORT": "80",
    "GATEWAY_PUBLIC_PORT_80_UDP": "udp://[fd00::1]:80",
}
"""What a pod gets when Services called ``gateway`` and ``gateway-public`` exist."""


def test_variables_that_kubernetes_sets_are_ignored() -> None:
    """Its variables are ignored; a setting of ours beside them counts, and so does a mistake."""
    assert load(GatewaySettings, "GATEWAY", KUBERNETES) == GatewaySettings()
    own = {**KUBERNETES, "GATEWAY_PORT": "6001", "GATEWAY_HOST": "0.0.0.0"}
    assert load(GatewaySettings, "GATEWAY", own) == GatewaySettings(port=6001, host="0.0.0.0")
    renamed = {name.replace("GATEWAY", "INFERER"): value for name, value in KUBERNETES.items()}
    assert load(InfererSettings, "INFERER", renamed) == InfererSettings()
    for name, value in (("GATEWAY_PORT", "http://10.0.0.1:5001"), ("GATEWAY_PUBLIC_PORT", "80")):
        with pytest.raises(SettingsError, match=name):
            load(GatewaySettings, "GATEWAY", {name: value})


@pytest.mark.parametrize(
    ("environ", "hours"),
    [
        ({}, 48),
        ({"GATEWAY_HOST": "localhost"}, 48),
        ({"GATEWAY_HOST": "::1"}, 48),
        ({"GATEWAY_HOST": "0.0.0.0"}, 0),
        ({"GATEWAY_HOST": "gateway.example.com"}, 0),
        ({"GATEWAY_HOST": "0.0.0.0", "GATEWAY_KEEP_REQUESTS_H": "24"}, 24),
        ({"GATEWAY_KEEP_REQUESTS_H": "0"}, 0),
    ],
)
def test_requests_are_kept_only_where_no_other_machine_can_read_them(
    environ: dict[str, str], hours: int
) -> None:
    """Unless the operator says so."""
    assert load(GatewaySettings, "GATEWAY", environ).kept_requests_h == hours


@pytest.mark.parametrize(
    ("environ", "is_allowed"),
    [
        ({}, True),
        ({"GATEWAY_HOST": "0.0.0.0"}, False),
        ({"GATEWAY_HOST": "0.0.0.0", "GATEWAY_LIST_JOBS": "true"}, True),
        ({"GATEWAY_LIST_JOBS": "false"}, False),
        ({"GATEWAY_LIST_JOBS": ""}, True),
    ],
)
def test_jobs_are_listed_only_where_no_other_machine_can_connect(
    environ: dict[str, str], is_allowed: bool
) -> None:
    """Unless the operator says so."""
    assert load(GatewaySettings, "GATEWAY", environ).lists_jobs == is_allowed
