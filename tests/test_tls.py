"""TLS in both directions, with DCMTK and with peers that have no business here."""

import dataclasses
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import doors
import make
import pytest
from certificates import Authority, Pair
from daemon import command
from doors import connect, dcmtk, listening
from peers import free_port, need, wait_until
from structlog.testing import capture_logs
from studies import bench
from test_sending import Site, until_nothing_is_due

from dicomai import tls
from dicomai.deliver import sender
from dicomai.errors import Misuse, PeerUnreachable
from dicomai.settings import Destination, Receive
from dicomai.store.database import Database


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """What is tested here is the same on both databases."""
    return f"sqlite:///{tmp_path}/dicomai.db"


@dataclasses.dataclass(frozen=True)
class Hospital:
    """Who signs, who is signed, and who is not."""

    ca: Path
    ours: Pair
    theirs: Pair
    expired: Pair
    elsewhere: Path
    stranger: Pair

    def receive(self, **more: Any) -> dict[str, Any]:
        """Settings of a listener with TLS that demands certificates."""
        files = {"tls_certificate": self.ours.certificate, "tls_key": self.ours.key}
        return {**files, "tls_ca": self.ca, **more}


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """Certificates for the whole run."""
    here = Authority(tmp_path_factory.mktemp("hospital"), "Hospital")
    elsewhere = Authority(tmp_path_factory.mktemp("elsewhere"), "Elsewhere")
    return Hospital(
        here.certificate,
        here.sign("dicomai", "IP:127.0.0.1,DNS:dicomai.test"),
        here.sign("pacs", "IP:127.0.0.1,DNS:pacs.test"),
        here.sign("expired", days=-1),
        elsewhere.certificate,
        elsewhere.sign("stranger"),
    )


def encrypted(pair: Pair, ca: Path) -> list[str]:
    """DCMTK's options for TLS with a certificate."""
    return ["+tls", str(pair.key), str(pair.certificate), "+cf", str(ca)]


# The listener


def test_dcmtk_stores_over_tls_with_its_certificate(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    files = make.save(tmp_path / "sent", [make.chest_radiograph(), make.large_radiograph()])
    with listening(database, tmp_path, **hospital.receive()) as port:
        done = dcmtk("storescu", port, *encrypted(hospital.theirs, hospital.ca), *files)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("inbox/*/*.dcm"))) == 2


def test_dcmtk_needs_no_certificate_where_none_is_demanded(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    with listening(database, tmp_path, **hospital.receive(tls_ca=None)) as port:
        done = dcmtk("echoscu", port, "+tla", "+cf", str(hospital.ca))
    assert done.returncode == 0, done.stderr


def test_a_sender_in_plain_text_is_refused(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    with listening(database, tmp_path, **hospital.receive()) as port:
        assert not doors.is_served(port)
        alert = doors.wait_for_alert(database)
        assert dcmtk("echoscu", port, *encrypted(hospital.theirs, hospital.ca)).returncode == 0
    assert (alert["detail"], alert["type"]) == ("TLS: the peer speaks no TLS", "110126")


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("stranger", "certificate verify failed"),
        ("expired", "certificate has expired"),
        (None, "the peer sent no certificate"),
    ],
)
def test_a_sender_without_a_good_certificate_is_refused(
    database: Database, tmp_path: Path, hospital: Hospital, who: str | None, reason: str
) -> None:
    options = ["+tla", "+cf", str(hospital.ca)]
    if who is not None:
        options = encrypted(getattr(hospital, who), hospital.ca)
    with listening(database, tmp_path, **hospital.receive()) as port:
        assert dcmtk("echoscu", port, *options).returncode != 0
        assert reason in doors.wait_for_alert(database)["detail"]


def client(hospital: Hospital) -> ssl.SSLContext:
    """A client that would take anything, with a good certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(hospital.ca)
    context.load_cert_chain(hospital.theirs.certificate, hospital.theirs.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@contextmanager
def secured(port: int, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """A connection after its handshake."""
    with connect(port) as plain:
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            yield connection


def test_tls_1_3_is_preferred(database: Database, tmp_path: Path, hospital: Hospital) -> None:
    with listening(database, tmp_path, **hospital.receive()) as port:
        with secured(port, client(hospital)) as connection:
            assert connection.version() == "TLSv1.3"


@pytest.mark.parametrize("key", [("rsa:2048",), ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")])
def test_tls_1_2_has_the_cipher_suites_of_bcp_195_and_no_others(
    database: Database, tmp_path: Path, key: tuple[str, ...], hospital: Hospital
) -> None:
    authority = Authority(tmp_path / "ca", "Hospital")
    pair = authority.sign("dicomai", kind=key)
    files = {"tls_certificate": pair.certificate, "tls_key": pair.key}
    kind = "RSA" if key[0].startswith("rsa") else "ECDSA"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ALL:@SECLEVEL=0")
    offered = [c["name"] for c in context.get_ciphers() if not c["name"].startswith("TLS_")]
    taken = set()
    with listening(database, tmp_path, **files) as port:
        for name in offered:
            context.set_ciphers(f"{name}:@SECLEVEL=0")
            with suppress(ssl.SSLError, ConnectionError), secured(port, context) as connection:
                taken.add(connection.cipher()[0])  # type: ignore[index]
    assert len(offered) > 20
    assert taken == {f"ECDHE-{kind}-AES128-GCM-SHA256", f"ECDHE-{kind}-AES256-GCM-SHA384"}


def test_tls_1_1_is_refused(database: Database, tmp_path: Path, hospital: Hospital) -> None:
    context = client(hospital)
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with listening(database, tmp_path, **hospital.receive()) as port:
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            with secured(port, context):
                pass
        assert "nothing newer than TLS 1.1" in doors.wait_for_alert(database)["detail"]


def test_dcmtk_with_the_retired_aes_profile_is_refused(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    with listening(database, tmp_path, **hospital.receive()) as port:
        options = [*encrypted(hospital.theirs, hospital.ca), "--profile-aes"]
        assert dcmtk("echoscu", port, *options).returncode != 0
        assert "no cipher suite in common" in doors.wait_for_alert(database)["detail"]


def test_a_client_that_does_not_begin_its_handshake_holds_up_nobody_and_is_cut_off(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    with listening(database, tmp_path, **hospital.receive(idle_seconds=3.0)) as port:
        with connect(port) as silent, connect(port) as halfway:
            halfway.sendall(b"\x16\x03\x01\x02\x00\x01")
            assert dcmtk("echoscu", port, *encrypted(hospital.theirs, hospital.ca)).returncode == 0
            halfway.settimeout(0.01)
            with pytest.raises(TimeoutError):  # the others were served while this one was waiting
                halfway.recv(100)
            halfway.settimeout(10)
            assert silent.recv(100) == halfway.recv(100) == b""
        assert "handshake in time" in doors.wait_for_alert(database)["detail"]


def test_a_slow_sender_is_cut_off_over_tls_too(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    with listening(database, tmp_path, **hospital.receive(idle_seconds=1.0)) as port:
        with secured(port, client(hospital)) as connection:
            connection.sendall(b"\1\0\0\0\1\0")
            assert doors.is_cut_off(connection)


def serial(port: int, hospital: Hospital) -> str:
    """Of the certificate that the listener shows."""
    with secured(port, client(hospital)) as connection:
        certificate = connection.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"])


def test_certificates_are_read_again_when_they_change_and_broken_ones_are_not_taken(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    certificate, key = tmp_path / "now.pem", tmp_path / "now.key"

    def use(pair: Pair) -> None:
        shutil.copyfile(pair.certificate, certificate)
        shutil.copyfile(pair.key, key)

    use(hospital.ours)
    files = {"tls_certificate": certificate, "tls_key": key}
    with (
        capture_logs() as lines,
        listening(database, tmp_path, **hospital.receive(**files)) as port,
    ):
        first = serial(port, hospital)
        key.write_text("half of a key")
        assert [serial(port, hospital) for _ in range(3)] == [first] * 3
        use(hospital.theirs)
        assert serial(port, hospital) != first
    events = [line["event"] for line in lines if line["event"].startswith("certificates")]
    assert events == ["certificates_not_reloaded", "certificates_reloaded"]


# What is wrong with the files


def broken(hospital: Hospital, folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Settings, and what is said of them."""
    rubbish = folder / "rubbish.pem"
    rubbish.write_text("-----BEGIN RUBBISH-----\n")
    locked = folder / "locked.key"
    locking = ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run([*locking, "-in", str(hospital.ours.key)], check=True, capture_output=True)
    key = {"tls_key": hospital.ours.key}
    return {
        "no certificate file": (
            {"tls_certificate": folder / "none.pem"},
            r"tls_certificate: cannot read .*none\.pem: No such file",
        ),
        "no key file": ({"tls_key": folder / "none.key"}, r"tls_key: cannot read .*none\.key"),
        "no CA file": ({"tls_ca": folder / "none.pem"}, r"tls_ca: cannot read .*none\.pem"),
        "no certificate in it": ({"tls_certificate": rubbish}, "tls_certificate: .*rubbish.pem"),
        "no key in it": ({"tls_key": rubbish}, "tls_key: .*rubbish.pem holds no private key"),
        "no CA in it": ({"tls_ca": rubbish}, "tls_ca: .*rubbish.pem holds no certificate"),
        "another one's key": ({"tls_key": hospital.theirs.key}, "is not the key of"),
        "a key with a password": ({**key, "tls_key": locked}, "without password"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "no certificate file",
        "no key file",
        "no CA file",
        "no certificate in it",
        "no key in it",
        "no CA in it",
        "another one's key",
        "a key with a password",
    ],
)
def test_files_that_cannot_be_used_are_named_with_their_key(
    tmp_path: Path, hospital: Hospital, name: str
) -> None:
    settings, words = broken(hospital, tmp_path)[name]
    files = hospital.receive(**settings)
    with pytest.raises(Misuse, match=f"^receive.{words}" if "tls" in words else words):
        tls.listens(Receive(**files))
    peer = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=1, **files)
    with pytest.raises(Misuse, match=f"^destinations.pacs.{words}" if "tls" in words else words):
        tls.check([peer])


@pytest.mark.parametrize("section", ["receive", "destinations.pacs"])
def test_config_check_names_a_file_that_cannot_be_used(
    tmp_path: Path, hospital: Hospital, section: str
) -> None:
    files = "\n".join(f'{key} = "{file}"' for key, file in hospital.receive().items())
    files = files.replace("ca.pem", "none.pem")
    heading = f"[{section}]\n{files}\n"
    if section != "receive":
        heading = (
            f'[[destinations]]\nname = "pacs"\nae_title = "P"\nhost = "h"\nport = 1\n{files}\n'
        )
    config = tmp_path / "dicomai.toml"
    config.write_text(f'data_dir = "{tmp_path}"\n{heading}')
    done = command(config, "config", "check")
    assert done.returncode == 2
    assert f"{section}.tls_ca: cannot read" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# Destinations


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[int]:
    """DCMTK as PACS; what it receives lies in the folder."""
    need("/usr/bin/storescp")
    port = free_port()
    folder.mkdir()
    process = subprocess.Popen(
        ["/usr/bin/storescp", "-od", str(folder), *options, str(port)], stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: is_listening(port), 10, "storescp listens")
        yield port
    finally:
        process.terminate()
        process.wait()


def is_listening(port: int) -> bool:
    """Without a connection, which storescp would take for an attempt at TLS."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows)


def destination(port: int, hospital: Hospital, **more: Any) -> Destination:
    """A PACS with TLS that the hospital's authority has signed."""
    ours = {"tls_certificate": hospital.ours.certificate, "tls_key": hospital.ours.key}
    files = {"tls_ca": hospital.ca, **ours, **more}
    return Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=port, **files)


def echo(peer: Destination) -> None:
    """C-ECHO, as `dicomai echo` does."""
    sender.echo(peer.host, peer.port, peer.ae_title, "DICOMAI", 5, tls.channel(peer))


def test_results_are_delivered_to_dcmtk_over_tls(
    database: Database, tmp_path: Path, hospital: Hospital
) -> None:
    site = Site(bench(database), tmp_path)
    site.analyze()
    peer = destination(1, hospital)
    files = {key: getattr(peer, key) for key in ("tls_ca", "tls_certificate", "tls_key")}
    with storescp(tmp_path / "pacs", *encrypted(hospital.theirs, hospital.ca)) as port:
        until_nothing_is_due(site.sending(port, **files))
    assert site.states() == ["delivered", "delivered"]
    assert len(list((tmp_path / "pacs").iterdir())) == 2


@pytest.mark.parametrize("name", ["127.0.0.1", "pacs.test"])
def test_a_destination_is_known_by_its_host_or_by_the_name_in_the_settings(
    tmp_path: Path, hospital: Hospital, name: str
) -> None:
    with storescp(tmp_path / "pacs", *encrypted(hospital.theirs, hospital.ca)) as port:
        echo(destination(port, hospital, tls_name=name))
        echo(destination(port, hospital))
        with pytest.raises(PeerUnreachable, match=r"certificate is not valid for 'other\.test'"):
            echo(destination(port, hospital, tls_name="other.test"))


@pytest.mark.parametrize(
    ("who", "trusted", "reason"),
    [
        ("theirs", "elsewhere", "certificate verify failed: self-signed certificate"),
        ("stranger", "ca", "certificate verify failed: unable to get local issuer"),
        ("expired", "ca", "certificate verify failed: certificate has expired"),
    ],
)
def test_a_destination_without_a_good_certificate_is_not_sent_to(
    tmp_path: Path, hospital: Hospital, who: str, trusted: str, reason: str
) -> None:
    options = encrypted(getattr(hospital, who), hospital.ca)
    with storescp(tmp_path / "pacs", *options) as port:
        with pytest.raises(PeerUnreachable, match=reason):
            echo(destination(port, hospital, tls_ca=getattr(hospital, trusted)))


def test_a_destination_in_plain_text_is_not_sent_to(tmp_path: Path, hospital: Hospital) -> None:
    with storescp(tmp_path / "pacs") as port:
        with pytest.raises(PeerUnreachable, match="TLS: the peer"):
            echo(destination(port, hospital))


@pytest.mark.parametrize(
    ("who", "reason"),
    [(None, "demands a certificate"), ("stranger", "does not know who signed our certificate")],
)
def test_a_destination_that_refuses_our_certificate_is_unreachable_with_its_reason(
    tmp_path: Path, hospital: Hospital, who: str | None, reason: str
) -> None:
    pair = getattr(hospital, who) if who else Pair(None, None)  # type: ignore[arg-type]
    files = {"tls_certificate": pair.certificate, "tls_key": pair.key}
    with storescp(tmp_path / "pacs", *encrypted(hospital.theirs, hospital.ca)) as port:
        with pytest.raises(PeerUnreachable, match=reason):
            echo(destination(port, hospital, **files))


def test_a_destination_that_does_not_answer_the_handshake_is_given_up_in_time(
    hospital: Hospital,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = destination(silent.getsockname()[1], hospital)
        begun = time.monotonic()
        with pytest.raises(PeerUnreachable, match="TLS: the peer does not answer"):
            sender.echo(peer.host, peer.port, "PACS", "DICOMAI", 0.5, tls.channel(peer))
        assert time.monotonic() - begun < 5


def test_files_that_break_while_running_put_the_delivery_off(
    tmp_path: Path, hospital: Hospital
) -> None:
    peer = destination(1, hospital, tls_ca=tmp_path / "none.pem")
    with pytest.raises(PeerUnreachable, match=r"destinations\.pacs\.tls_ca: cannot read"):
        echo(peer)


def test_the_echo_command_uses_the_destinations_tls(tmp_path: Path, hospital: Hospital) -> None:
    config = tmp_path / "dicomai.toml"
    with storescp(tmp_path / "pacs", *encrypted(hospital.theirs, hospital.ca), "-ic") as port:
        config.write_text(
            f'[[destinations]]\nname = "pacs"\nae_title = "P"\nhost = "127.0.0.1"\nport = {port}\n'
            f'tls_ca = "{hospital.ca}"\n'
        )
        done = command(config, "echo", "pacs")
    assert done.returncode == 0, done.stderr
