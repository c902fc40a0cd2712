"""Keys, the envelope, and what a certificate is checked against."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement as InTotoStatement
from securesystemslib.dsse import Envelope as OtherEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

import ccn_deploy
from ccn_deploy.bundle import MANIFEST, Bundle, NewFile, open_bundle, write_bundle
from ccn_deploy.certificates.envelope import LARGEST_ENVELOPE, PAYLOAD_TYPE, opened, pae, seal
from ccn_deploy.certificates.keys import (
    LARGEST,
    PASSPHRASE,
    key_id,
    load_private,
    load_public,
    new_key,
)
from ccn_deploy.certificates.statement import (
    Certificate,
    CertifiedTarget,
    ClaimResult,
    DataFacts,
    EvidenceFile,
    FileDigest,
    Hardware,
    ParityFigures,
    PolicyFacts,
    Proportion,
    Statement,
    Subject,
    WaiverUse,
    moment,
)
from ccn_deploy.certificates.verify import Checked, admit, check, differences
from ccn_deploy.errors import (
    CcnDeployError,
    EnvironmentUnfitError,
    ExitCode,
    GateError,
    IntegrityError,
    RuntimeUnavailableError,
    StorageError,
    UsageError,
)
from ccn_deploy.exporters import export_bundle
from ccn_deploy.machine import Gpu, Machine, instruction_sets, processor, this_machine
from ccn_deploy.records import encode
from ccn_deploy.runtimes.compatibility import Candidate
from ccn_deploy.serving import first_usable
from ccn_deploy.storage import canonical_json, sha256
from ccn_deploy.targets import Role, Target
from ccn_deploy.verdict import Verdict
from tests.cards import a_card
from tests.networks import as_run, random_network
from tests.test_cli import HEAVY, assert_clear_error
from tests.test_cli import ccn_deploy as command

replaced = msgspec.structs.replace

NOW = datetime.now(timezone.utc).replace(microsecond=0)
"""Commands have no other clock than this machine's."""

TARGET = Target("onnxruntime-cpu", "fp32")
FAR = "2100-01-01"
EVIDENCE = {
    "evidence/parity.json": b'{"errors": [0.25, 1e-7]}\n',
    "evidence/attacks/pgd.jsonl": b'{"image": 0}\n{"image": 1}\n',
}


def here() -> Hardware:
    machine = this_machine()
    return Hardware(
        system=machine.system,
        architecture=machine.architecture,
        processor=processor(),
        instruction_sets=instruction_sets(),
    )


def certified(bundle: Bundle, **changes: Any) -> CertifiedTarget:
    record = bundle.program(TARGET)
    share = Proportion(count=90, n=100, ci95=(0.82, 0.95))
    fields: dict[str, Any] = {
        "runtime": TARGET.runtime,
        "precision": TARGET.precision,
        "program": record.path,
        "program_sha256": record.sha256,
        "library": "onnxruntime",
        "library_version": this_machine().packages["onnxruntime"],
        "measured_with": {},
        "hardware": here(),
        "gradient": "native",
        "origin": "All evidence was measured by this run.",
        "verdict": "pass",
        "clean": (share, share),
        "worst": share,
        "worst_attack": "APGD, within Linf 0.1",
        "results": (),
        "parity": ParityFigures(
            verdict="pass",
            checks=3,
            failures=0,
            largest_relative=1e-7,
            largest_units=0.5,
            allowed_relative=1e-5,
            allowed_units=4.0,
            gradients=True,
        ),
        "claims": (ClaimResult(name="robust", verdict="pass", measured="0.9", bound="0.8"),),
        "findings": (),
        **changes,
    }
    return CertifiedTarget(**fields)


def statement_of(
    bundle: Bundle, subjects: tuple[Subject, ...] | None = None, **changes: Any
) -> Statement:
    """Return a statement about a bundle that holds here and now, but for what is changed."""
    program = bundle.program(TARGET)
    manifest = sha256((bundle.path / MANIFEST).read_bytes())
    data = "9" * 64
    fields: dict[str, Any] = {
        "claim": "Certified: it keeps at least 80 % right.",
        "tier": "empirical",
        "verdict": "pass",
        "assumptions": ("The clock was right.",),
        "not_claimed": ("This is no proof.",),
        "network": {"title": bundle.card.title},
        "bundle": bundle.manifest.digest,
        "targets": (certified(bundle),),
        "data": DataFacts(
            name="noise", split="test", sha256=data, samples=100, selection="first", seed=0
        ),
        "policy": PolicyFacts(
            name="release",
            sha256="8" * 64,
            document={"schema": "ccn-deploy/policy/1"},
            committed=moment(NOW - timedelta(days=2)),
            commitment="7" * 64,
            before_results=True,
        ),
        "waivers": (),
        "lineage": (),
        "evidence": tuple(
            EvidenceFile(path=path, bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
            for path, text in EVIDENCE.items()
        ),
        "intended_use": "digits",
        "fallback": "",
        "monitoring": "",
        "tester": "the tests",
        "issued": moment(NOW - timedelta(days=1)),
        "expires": moment(NOW + timedelta(days=30)),
        "versions": {"ccn-deploy": ccn_deploy.__version__},
        **changes,
    }
    about = (
        Subject(name=MANIFEST, digest=FileDigest(sha256=manifest)),
        Subject(name=program.path, digest=FileDigest(sha256=program.sha256)),
        Subject(name="data:noise/test", digest=FileDigest(sha256=data)),
    )
    predicate = Certificate(**fields)
    return Statement(subject=about if subjects is None else subjects, predicate=predicate)


def with_evidence(bundle: Bundle) -> Bundle:
    for path, text in EVIDENCE.items():
        file = bundle.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)
    return bundle


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "signer.pem"
    new_key(path)
    return path


@pytest.fixture(scope="module")
def public(pair: Path) -> Path:
    return pair.with_name("signer.pem.pub")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a real network with random weights, and evidence of any bytes."""
    run = as_run(random_network("mnist-cnn", "ccn"))
    path = tmp_path_factory.mktemp("bundle") / "ccn"
    return with_evidence(export_bundle(run, path, gradient=False))


@pytest.fixture
def bundle(pristine: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may spoil."""
    return open_bundle(shutil.copytree(pristine.path, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of few bytes, so that every bit of it can be tried."""
    files = (
        NewFile("graphs/forward.onnx", bytes(range(200, 240)), Role.FORWARD, "fp32"),
        NewFile("weights.safetensors", b"w" * 25, Role.WEIGHTS),
    )
    path = tmp_path_factory.mktemp("small") / "bundle"
    return with_evidence(write_bundle(path, card=a_card(), files=files))


@pytest.fixture
def issue(pair: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function from a bundle and changes of its certificate to the signed file."""

    def issued(bundle: Bundle, signed: bool = True, **changes: Any) -> Path:
        path = tmp_path / "certificate.json"
        key = load_private(str(pair)) if signed else None
        path.write_bytes(seal(statement_of(bundle, **changes), key))
        return path

    return issued


def envelope_of(payload: bytes, pair: Path, payload_type: str = PAYLOAD_TYPE) -> dict[str, Any]:
    """Return an envelope of any payload, made without the package."""
    key = load_pem_private_key(pair.read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    encoded = b" ".join(
        (b"DSSEv1", str(len(payload_type)).encode(), payload_type.encode(),
         str(len(payload)).encode(), payload)
    )  # fmt: skip
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [
            {"keyid": id_of(raw), "sig": base64.b64encode(key.sign(encoded)).decode()},
        ],
    }


def id_of(raw: bytes) -> str:
    """Return the key id by RFC 8410: a fixed head, then the 32 bytes of the key."""
    return hashlib.sha256(bytes.fromhex("302a300506032b6570032100") + raw).hexdigest()


class TestKeys:
    def test_a_new_pair_signs_and_checks(self, tmp_path: Path) -> None:
        path = tmp_path / "k"
        made = new_key(path)
        private, public = load_private(str(path)), load_public(tmp_path / "k.pub")
        public.verify(private.sign(b"text"), b"text")
        raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        assert made == key_id(public) == id_of(raw)
        assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
        assert (tmp_path / "k.pub").read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----")

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
    def test_openssl_reads_both_and_finds_the_same_id(self, tmp_path: Path) -> None:
        made = new_key(tmp_path / "k")

        def openssl(*arguments: str) -> bytes:
            return subprocess.run(
                ["openssl", "pkey", *arguments], cwd=tmp_path, capture_output=True, check=True
            ).stdout

        assert openssl("-in", "k", "-pubout") == (tmp_path / "k.pub").read_bytes()
        assert sha256(openssl("-pubin", "-in", "k.pub", "-outform", "DER")) == made

    @pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
    @pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
    def test_only_the_owner_reads_the_private_one(self, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            new_key(tmp_path / "k")
        finally:
            os.umask(before)
        assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "k.pub").stat().st_mode & 0o777 == 0o644 & ~mask

    @pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
    def test_one_that_others_reach_is_refused(self, tmp_path: Path, mode: int) -> None:
        new_key(tmp_path / "k")
        (tmp_path / "k").chmod(mode)
        with pytest.raises(UsageError, match=f"mode {mode:o}") as error:
            load_private(str(tmp_path / "k"))
        assert "chmod 600" in error.value.hint

    @pytest.mark.parametrize("taken", ["k", "k.pub"])
    def test_nothing_is_written_over(self, tmp_path: Path, taken: str) -> None:
        (tmp_path / taken).write_text("mine")
        with pytest.raises(UsageError, match=r"exists already"):
            new_key(tmp_path / "k")
        assert [file.name for file in tmp_path.iterdir()] == [taken]
        assert (tmp_path / taken).read_text() == "mine"

    def test_nor_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "k").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match="exists already"):
            new_key(tmp_path / "k")
        assert not (tmp_path / "elsewhere").exists()

    def test_without_a_public_key_there_is_no_private_one(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="name too long"):
            new_key(tmp_path / ("k" * 253))  # with .pub it is longer than file systems allow
        assert not list(tmp_path.iterdir())
        with pytest.raises(StorageError):
            new_key(tmp_path / "nowhere" / "k")

    def test_a_passphrase(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        new_key(tmp_path / "k", "öpen")
        assert b"ENCRYPTED PRIVATE KEY" in (tmp_path / "k").read_bytes()
        load_pem_private_key((tmp_path / "k").read_bytes(), "öpen".encode())
        monkeypatch.setenv(PASSPHRASE, "öpen")
        load_public(tmp_path / "k.pub").verify(load_private(str(tmp_path / "k")).sign(b""), b"")
        for wrong in ("open", ""):
            monkeypatch.setenv(PASSPHRASE, wrong)
            with pytest.raises(UsageError, match="passphrase is wrong") as error:
                load_private(str(tmp_path / "k"))
            assert PASSPHRASE in error.value.hint

    def test_without_a_terminal_nobody_is_asked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new_key(tmp_path / "k", "secret")
        monkeypatch.delenv(PASSPHRASE, raising=False)
        with pytest.raises(UsageError, match="no terminal"):
            load_private(str(tmp_path / "k"))

    @pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals")
    def test_at_a_terminal_it_is_asked_for_unseen(self, tmp_path: Path) -> None:
        shown = at_a_terminal(["key", "new", "k", "--passphrase"], ["open sesame"] * 2, tmp_path)
        assert "Once more" in shown and "sesame" not in shown
        load_pem_private_key((tmp_path / "k").read_bytes(), b"open sesame")
        shown = at_a_terminal(["key", "new", "other", "--passphrase"], ["one", "two"], tmp_path)
        assert "The two passphrases differ" in shown
        assert not (tmp_path / "other").exists()

    @pytest.mark.parametrize("passphrase", ["", "x" * 1024])
    def test_passphrases_that_cannot_be(self, tmp_path: Path, passphrase: str) -> None:
        with pytest.raises(UsageError, match=f"{len(passphrase)} bytes"):
            new_key(tmp_path / "k", passphrase)
        assert not list(tmp_path.iterdir())

    def test_from_the_environment(self, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SIGNER", pair.read_text())
        assert load_private("env:SIGNER").sign(b"") == load_private(str(pair)).sign(b"")
        with pytest.raises(UsageError, match="'OTHER'"):
            load_private("env:OTHER")
        monkeypatch.setenv("SIGNER", "no key")
        with pytest.raises(UsageError, match="no PEM"):
            load_private("env:SIGNER")

    def test_other_kinds_are_named(self, tmp_path: Path) -> None:
        kinds: tuple[tuple[str, Any], ...] = (
            ("RSA", rsa.generate_private_key(65537, 1024)),
            ("EC", ec.generate_private_key(ec.SECP256R1())),
            ("Ed448", ed448.Ed448PrivateKey.generate()),
        )
        path = tmp_path / "k"
        for kind, key in kinds:
            forms = [PrivateFormat.PKCS8]
            if kind != "Ed448":
                forms.append(PrivateFormat.TraditionalOpenSSL)
            for form in forms:
                path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
                path.chmod(0o600)
                with pytest.raises(UsageError, match=f"of the kind {kind}; .*Ed25519"):
                    load_private(str(path))
            path.write_bytes(
                key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            )
            with pytest.raises(UsageError, match=f"of the kind {kind}; .*Ed25519"):
                load_public(path)
        ssh = ed25519.Ed25519PrivateKey.generate()
        path.write_bytes(ssh.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        with pytest.raises(UsageError, match="of the kind OPENSSH"):
            load_private(str(path))

    def test_one_in_place_of_the_other(self, pair: Path, public: Path, tmp_path: Path) -> None:
        shutil.copy(public, tmp_path / "k")
        (tmp_path / "k").chmod(0o600)
        with pytest.raises(UsageError, match="is a public key"):
            load_private(str(tmp_path / "k"))
        with pytest.raises(UsageError, match="is a private key"):
            load_public(pair)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (b"", "no PEM"),
            (b"x" * (LARGEST + 1), "more than 16,384 bytes"),
            (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "is damaged"),
            (b"-----BEGIN PUBLIC KEY-----\n-----BEGIN PUBLIC KEY-----\n", "2 PEM blocks"),
            (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "CERTIFICATE"),
        ],
    )
    def test_what_is_no_public_key(self, tmp_path: Path, text: bytes, words: str) -> None:
        (tmp_path / "k").write_bytes(text)
        with pytest.raises(UsageError, match=words):
            load_public(tmp_path / "k")

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is not there"):
            load_public(tmp_path / "k")
        with pytest.raises(UsageError, match=r"is no regular file|is a directory"):
            load_public(tmp_path)
        if hasattr(os, "mkfifo"):
            os.mkfifo(tmp_path / "pipe")  # opening it must not wait for a writer
            with pytest.raises(UsageError, match="no regular file"):
                load_public(tmp_path / "pipe")


def at_a_terminal(arguments: list[str], typed: list[str], directory: Path) -> str:
    """Run a command at a pseudo-terminal, type lines when it asks, and return what it showed."""
    terminal, side = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ccn_deploy.cli.main", *arguments],
        cwd=directory,
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != PASSPHRASE},
    )
    os.close(side)
    limit = threading.Timer(60, process.kill)
    limit.start()
    shown = b""
    try:
        while block := os.read(terminal, 1024):
            shown += block
            if typed and shown.endswith(b": "):
                os.write(terminal, typed.pop(0).encode() + b"\n")
    except OSError:  # what Linux says where others end
        pass
    finally:
        limit.cancel()
        os.close(terminal)
        process.wait()
    return shown.decode()


class TestEnvelope:
    def test_the_encoding_that_is_signed_is_that_of_the_specification(self) -> None:
        assert pae(b"hello world", "http://example.com/HelloWorld") == (
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        )

    def test_what_is_sealed_is_what_is_opened(self, small: Bundle, pair: Path) -> None:
        key, said = load_private(str(pair)), statement_of(small)
        data = seal(said, key)
        assert opened(data, key.public_key()) == (said, key_id(key.public_key()))
        assert opened(data, None) == (said, None)  # a signature that nobody checked says nothing
        assert seal(said, key) == data

    def test_without_a_key_it_is_unsigned(self, small: Bundle, pair: Path) -> None:
        data = seal(statement_of(small), None)
        assert json.loads(data)["signatures"] == []
        assert opened(data, None) == (statement_of(small), None)
        with pytest.raises(IntegrityError, match="no signature"):
            opened(data, load_private(str(pair)).public_key())

    def test_securesystemslib_and_in_toto_read_it(self, small: Bundle, pair: Path) -> None:
        key = load_private(str(pair))
        envelope = OtherEnvelope.from_dict(json.loads(seal(statement_of(small), key)))
        own = SSlibKey.from_crypto(key.public_key(), keyid=key_id(key.public_key()))
        assert envelope.verify([own], 1) == {own.keyid: own}
        another = SSlibKey.from_crypto(
            ed25519.Ed25519PrivateKey.generate().public_key(), keyid=own.keyid
        )
        with pytest.raises(VerificationError):
            envelope.verify([another], 1)
        assert envelope.payload_type == PAYLOAD_TYPE
        read = InTotoStatement.copy_from_pb(
            ParseDict(json.loads(envelope.payload), statement_pb2.Statement())
        )
        read.validate()
        assert read.pb.predicate_type == "urn:ccn-deploy:certificate:1"
        assert read.pb.predicate["bundle"] == small.manifest.digest
        assert {s.name: dict(s.digest) for s in read.pb.subject} == {
            subject.name: {"sha256": subject.digest.sha256}
            for subject in statement_of(small).subject
        }

    def test_what_securesystemslib_signs_is_the_same_file(self, small: Bundle, pair: Path) -> None:
        key, said = load_private(str(pair)), statement_of(small)
        public = key.public_key()
        own = SSlibKey.from_crypto(public, keyid=key_id(public))
        envelope = OtherEnvelope(encode(said), PAYLOAD_TYPE, {})
        envelope.sign(CryptoSigner(key, own))
        assert canonical_json(envelope.to_dict()) == seal(said, key)  # Ed25519 has no randomness
        foreign = OtherEnvelope(encode(said), PAYLOAD_TYPE, {})
        foreign.sign(CryptoSigner(key))  # with an id that securesystemslib makes its own way
        with pytest.raises(IntegrityError, match="is signed with the key"):
            opened(canonical_json(foreign.to_dict()), public)

    def test_every_flipped_bit_is_seen(self, small: Bundle, pair: Path) -> None:
        key = load_private(str(pair))
        public = key.public_key()
        said = statement_of(small, targets=(certified(small, claims=(), worst=None),), evidence=())
        data = seal(replaced(said, subject=said.subject[:1]), key)
        for at in range(8 * len(data)):
            with pytest.raises(IntegrityError):
                opened(flipped(data, at), public)

    def test_every_cut_is_seen(self, small: Bundle, pair: Path) -> None:
        key = load_private(str(pair))
        data = seal(statement_of(small), key)
        for end in range(len(data)):
            with pytest.raises(IntegrityError):
                opened(data[:end], key.public_key())
        for longer in (data + b"\n", b" " + data, data + data):
            with pytest.raises(IntegrityError):
                opened(longer, key.public_key())

    def test_another_key_is_named(self, small: Bundle, pair: Path) -> None:
        key, other = load_private(str(pair)), ed25519.Ed25519PrivateKey.generate()
        data = seal(statement_of(small), key)
        with pytest.raises(IntegrityError, match="signed with the key") as error:
            opened(data, other.public_key())
        assert key_id(key.public_key()) in str(error.value)
        assert key_id(other.public_key()) in str(error.value)
        forged = json.loads(seal(statement_of(small), other))  # under the name of the first
        forged["signatures"][0]["keyid"] = key_id(key.public_key())
        with pytest.raises(IntegrityError, match="does not hold"):
            opened(canonical_json(forged), key.public_key())

    @pytest.mark.parametrize(
        "change",
        [
            lambda e: e | {"signatures": e["signatures"] * 2},
            lambda e: e | {"payload": e["payload"].rstrip("=")},
            lambda e: e | {"payload": e["payload"] + "\n"},
            lambda e: e | {"payload": ""},
            lambda e: e | {"payloadType": "application/json"},
            lambda e: e | {"more": 1},
            lambda e: {k: v for k, v in e.items() if k != "payloadType"},
        ],
    )
    def test_an_envelope_of_another_form(
        self, small: Bundle, pair: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        key = load_private(str(pair)).public_key()
        # A payload whose base64 is padded: what may follow a sign of padding is the encoder's.
        said = statement_of(small)
        while len(encode(said)) % 3 != 1:
            said = replaced(
                said, predicate=replaced(said.predicate, tester=said.predicate.tester + "x")
            )
        envelope = envelope_of(encode(said), pair)
        assert opened(canonical_json(envelope), key) == (said, key_id(key))
        with pytest.raises(IntegrityError):
            opened(canonical_json(change(envelope)), key)
        with pytest.raises(IntegrityError):
            opened(json.dumps(envelope).encode(), key)  # another layout

    def test_spare_bits_of_base64_have_to_be_the_encoders(self, small: Bundle, pair: Path) -> None:
        key = load_private(str(pair)).public_key()
        envelope = json.loads(seal(statement_of(small), load_private(str(pair))))
        signature = envelope["signatures"][0]["sig"]  # 64 bytes leave four bits to spare
        assert signature.endswith("==")
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        other = signature[:-3] + alphabet[alphabet.index(signature[-3]) + 1] + "=="
        assert base64.b64decode(other) == base64.b64decode(signature)
        envelope["signatures"][0]["sig"] = other
        with pytest.raises(IntegrityError, match="base64"):
            opened(canonical_json(envelope), key)

    def test_a_signed_payload_has_to_be_in_the_form_that_is_written(
        self, small: Bundle, pair: Path
    ) -> None:
        key = load_private(str(pair)).public_key()
        plain = json.loads(encode(statement_of(small)))
        wrong_types = plain | {"predicate": plain["predicate"] | {"issued": "yesterday"}}
        for payload in (
            json.dumps(plain).encode(),
            canonical_json(plain | {"more": 1}),
            canonical_json(wrong_types),
            b"[]",
            b"\xff",
        ):
            with pytest.raises(IntegrityError):
                opened(canonical_json(envelope_of(payload, pair)), key)

    @pytest.mark.parametrize(
        ("field", "value", "kind"),
        [
            ("predicateType", "urn:ccn-deploy:certificate:2", EnvironmentUnfitError),
            ("_type", "https://in-toto.io/Statement/v2", EnvironmentUnfitError),
            ("predicateType", "https://slsa.dev/provenance/v1", UsageError),
            ("predicateType", None, UsageError),
        ],
    )
    def test_other_statements_are_told_from_damage(
        self, small: Bundle, pair: Path, field: str, value: Any, kind: type[CcnDeployError]
    ) -> None:
        """Before the content is read, which may be of any form, and after the signature."""
        key = load_private(str(pair)).public_key()
        plain = json.loads(encode(statement_of(small))) | {field: value, "predicate": {"new": 1}}
        envelope = envelope_of(canonical_json(plain), pair)
        with pytest.raises(kind) as error:
            opened(canonical_json(envelope), key)
        if kind is EnvironmentUnfitError:
            assert "pip install --upgrade" in error.value.hint
        envelope["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
        with pytest.raises(IntegrityError):
            opened(canonical_json(envelope), key)


def flipped(data: bytes, bit: int) -> bytes:
    at = bit // 8
    return data[:at] + bytes([data[at] ^ (1 << bit % 8)]) + data[at + 1 :]


def refused_bits(path: Path, bits: Any, attempt: Callable[[], object]) -> None:
    """Flip bits of a file one at a time: each has to be refused with exit code 5."""
    whole = path.read_bytes()
    accepted = []
    with path.open("r+b", buffering=0) as file:
        for bit in bits:
            at = bit // 8
            file.seek(at)
            file.write(bytes([whole[at] ^ (1 << bit % 8)]))
            try:
                attempt()
                accepted.append(bit)
            except CcnDeployError as error:
                if error.exit_code != ExitCode.INTEGRITY:
                    accepted.append(bit)
            file.seek(at)
            file.write(whole[at : at + 1])
    assert not accepted
    attempt()


def files_of(bundle: Bundle) -> list[Path]:
    return [
        bundle.path / MANIFEST,
        *(bundle.path / record.path for record in bundle.manifest.files),
        *(bundle.path / path for path in EVIDENCE),
    ]


class TestBits:
    """Of everything that a certificate covers, on disk."""

    def test_of_small_files_every_one(
        self, small: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        certificate = issue(small)
        for path in files_of(small)[1:]:
            size = 8 * path.stat().st_size
            assert size < 1000
            refused_bits(path, range(size), lambda: check(certificate, small.path, public))

    def test_of_large_ones_some(
        self, bundle: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        certificate = issue(bundle)
        rng = random.Random(11)
        for path in files_of(bundle)[:3]:
            bits = rng.sample(range(8 * path.stat().st_size), 667)
            refused_bits(path, bits, lambda: check(certificate, bundle.path, public))

    @pytest.mark.fakes
    def test_of_the_manifest_and_the_certificate_every_one(
        self, small: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        certificate = issue(small)
        for path in (small.path / MANIFEST, certificate):
            bits = range(8 * path.stat().st_size)
            refused_bits(path, bits, lambda: check(certificate, small.path, public))

    @pytest.mark.fakes
    def test_of_large_ones_many(
        self, bundle: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        certificate = issue(bundle)
        rng = random.Random(12)
        for path in files_of(bundle)[:3]:
            bits = rng.sample(range(8 * path.stat().st_size), 5000)
            refused_bits(path, bits, lambda: check(certificate, bundle.path, public))


def refused(kind: type[CcnDeployError], *words: str, **asked: Any) -> CcnDeployError:
    """Check what must be refused, in one or two lines that say the words."""
    with pytest.raises(kind) as caught:
        check(asked.pop("certificate"), asked.pop("bundle"), asked.pop("key"), **asked)
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 2
    for word in words:
        assert word in str(caught.value)
    return caught.value


class TestWhatHolds:
    def test_a_whole_one(self, pristine: Bundle, issue: Callable[..., Path], public: Path) -> None:
        certificate = issue(pristine)
        checked = check(certificate, pristine.path, public, now=NOW)
        assert checked.verdict is Verdict.PASS
        assert checked.signer == key_id(load_public(public))
        assert [found.target for found in checked.targets] == [TARGET]
        assert checked.certificate == statement_of(pristine).predicate
        assert len(checked.notes) == 1 and "30 more days" in checked.notes[0]
        told = json.loads(json.dumps(checked.document(), allow_nan=False))
        assert told["schema"] == "ccn-deploy/verify/1"
        assert told["certificate"]["bundle"] == pristine.manifest.digest
        assert check(certificate, pristine, public, target=TARGET, now=NOW) == checked

    def test_what_was_appended_to_evidence_is_none_of_its_business(
        self, bundle: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        certificate = issue(bundle)
        with (bundle.path / "evidence/attacks/pgd.jsonl").open("ab") as file:
            file.write(b"more")
        (bundle.path / "evidence/other.json").write_bytes(b"other")
        assert check(certificate, bundle, public).verdict is Verdict.PASS

    def test_an_unsigned_one_says_that_nobody_vouches(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        certificate = issue(pristine, signed=False)
        refused(
            IntegrityError, "no signature", certificate=certificate, bundle=pristine, key=public
        )
        checked = check(certificate, pristine, None)
        assert checked.signer is None and checked.verdict is Verdict.PASS
        assert any("nobody vouches" in note for note in checked.notes)

    @pytest.mark.parametrize("verdict", list(Verdict))
    def test_its_own_verdict_is_the_answer(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path, verdict: Verdict
    ) -> None:
        one = certified(pristine, verdict=verdict.value)
        certificate = issue(pristine, verdict=verdict.value, targets=(one,))
        assert check(certificate, pristine, public).verdict is verdict

    def test_of_several_targets_the_one_that_is_asked_for(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        failed = certified(pristine, runtime="torch", verdict="fail", library="torch",
                           library_version=this_machine().packages["torch"])  # fmt: skip
        certificate = issue(pristine, verdict="fail", targets=(certified(pristine), failed))
        asked = {"target": TARGET}, {"target": Target("torch")}, {}
        found = [check(certificate, pristine, public, **which).verdict for which in asked]
        assert found == [Verdict.PASS, Verdict.FAIL, Verdict.FAIL]
        refused(GateError, "onnxruntime-cuda-fp32", str(TARGET), "torch-fp32",
                certificate=certificate, bundle=pristine, key=public,
                target=Target("onnxruntime-cuda"))  # fmt: skip


class TestOtherBundle:
    def test_of_another_network(
        self, pristine: Bundle, small: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        refused(IntegrityError, pristine.manifest.digest, small.manifest.digest,
                certificate=issue(small), bundle=pristine, key=public)  # fmt: skip

    def test_a_subject_that_is_another_file(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        own = statement_of(pristine).subject
        wrong = (
            Subject(name=MANIFEST, digest=FileDigest(sha256="0" * 64)),
            replaced(own[1], digest=FileDigest(sha256="0" * 64)),
            replaced(own[1], name="graphs/none.onnx"),
            replaced(own[1], name="evidence/parity.json"),
        )
        for subject in wrong:
            certificate = issue(pristine, subjects=(*own, subject))
            refused(
                IntegrityError, subject.name, certificate=certificate, bundle=pristine, key=public
            )

    def test_a_program_that_is_not_what_the_target_executes(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        weights = pristine.file(Role.WEIGHTS)
        for change in (
            {"program": weights.path, "program_sha256": weights.sha256},
            {"program_sha256": weights.sha256},
            {"program": "graphs/none.onnx"},
            {"precision": "fp16"},
            {"runtime": "tensorrt", "library": "tensorrt"},
        ):
            certificate = issue(pristine, targets=(certified(pristine, **change),))
            refused(
                IntegrityError, "executes", certificate=certificate, bundle=pristine, key=public
            )

    def test_a_graph_for_all_where_the_runtime_has_its_own(
        self, tmp_path: Path, issue: Callable[..., Path], public: Path
    ) -> None:
        """Of the two graphs of a precision the one that is served has to be certified."""
        files = (
            NewFile("forward.onnx", b"for all", Role.FORWARD, "fp32"),
            NewFile("cpu.onnx", b"for one", Role.FORWARD, "fp32", TARGET.runtime),
        )
        made = with_evidence(write_bundle(tmp_path / "two", card=a_card(), files=files))
        assert check(issue(made), made, public).verdict is Verdict.PASS
        plain = made.file(Role.FORWARD, "fp32")
        one = certified(made, program=plain.path, program_sha256=plain.sha256)
        refused(IntegrityError, "executes", certificate=issue(made, targets=(one,)), bundle=made,
                key=public)  # fmt: skip


class TestEvidence:
    def test_one_that_has_gone_was_cut_or_became_a_link(
        self, bundle: Bundle, issue: Callable[..., Path], public: Path, tmp_path: Path
    ) -> None:
        certificate = issue(bundle)
        asked: dict[str, Any] = {"certificate": certificate, "bundle": bundle, "key": public}
        path = bundle.path / "evidence/attacks/pgd.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        refused(IntegrityError, "25 bytes, of the 26", **asked)
        path.unlink()
        refused(IntegrityError, "is not there", "--no-evidence", **asked)
        path.mkdir()
        refused(IntegrityError, "directory", **asked)
        path.rmdir()
        (tmp_path / "elsewhere.jsonl").write_bytes(whole)  # the right bytes, in the wrong place
        path.symlink_to(tmp_path / "elsewhere.jsonl")
        refused(IntegrityError, "symbolic link", **asked)
        checked = check(certificate, bundle, public, evidence=False)
        assert checked.verdict is Verdict.PASS
        assert any("evidence was not checked" in note for note in checked.notes)
        path.unlink()
        shutil.move(path.parent, tmp_path / "attacks")
        (tmp_path / "attacks/pgd.jsonl").write_bytes(whole)
        path.parent.symlink_to(tmp_path / "attacks")
        refused(IntegrityError, "symbolic link", **asked)
        if hasattr(os, "mkfifo"):
            path.parent.unlink()
            path.parent.mkdir()
            os.mkfifo(path)
            refused(IntegrityError, "no regular file", **asked)

    @pytest.mark.parametrize(
        "path",
        [
            "manifest.json", "evidence", "/etc/hostname", "evidence/../manifest.json",
            "evidence//x", "", "evidence\\x", "graphs/forward-fp32.onnx", "evidence/a:b",
        ],
    )  # fmt: skip
    def test_outside_the_directory(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path, path: str
    ) -> None:
        file = EvidenceFile(path=path, bytes=0, sha256=sha256(b""))
        refused(IntegrityError, "outside evidence/", certificate=issue(pristine, evidence=(file,)),
                bundle=pristine, key=public)  # fmt: skip


class TestTime:
    def test_before_its_issue(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        issued = NOW - timedelta(days=1)
        early = issued - timedelta(seconds=1)
        refused(EnvironmentUnfitError, moment(issued), moment(early), "clock",
                certificate=issue(pristine), bundle=pristine, key=public, now=early)  # fmt: skip
        assert check(issue(pristine), pristine, public, now=issued).verdict is Verdict.PASS

    @pytest.mark.parametrize(("own", "then"), [("pass", "inconclusive"), ("fail", "fail")])
    def test_after_its_end(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path, own: str, then: str
    ) -> None:
        certificate = issue(pristine, verdict=own, targets=(certified(pristine, verdict=own),))
        end = NOW + timedelta(days=30)
        assert check(certificate, pristine, public, now=end).verdict.value == own
        late = check(certificate, pristine, public, now=end + timedelta(seconds=1))
        assert late.verdict.value == then
        assert late.notes[0].startswith(f"It ended at {moment(end)}")

    def test_in_another_time_zone(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        zone = timezone(timedelta(hours=-11))
        checked = check(issue(pristine), pristine, public, now=NOW.astimezone(zone))
        assert checked.verdict is Verdict.PASS

    def test_a_waiver_lets_it_pass_until_its_last_day(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        name = "robust[apgd@0.1>=0.55]"
        claims = (ClaimResult(name=name, verdict="fail", measured="", bound="", waived=True),)
        last = (NOW + timedelta(days=3)).date()
        waiver = WaiverUse(
            claim=name, reason="A pilot.", owner="R. Owner", expires=last.isoformat(), used=True
        )
        idle = replaced(waiver, claim="accurate", expires="2001-01-01", used=False)
        targets = (certified(pristine, claims=claims),)
        certificate = issue(pristine, targets=targets, waivers=(waiver, idle))
        end = datetime(last.year, last.month, last.day, 23, 59, 59, tzinfo=timezone.utc)
        held = check(certificate, pristine, public, now=end)
        assert held.verdict is Verdict.PASS
        (note,) = [note for note in held.notes if "Waived" in note]
        assert all(word in note for word in (name, "A pilot.", "R. Owner", last.isoformat()))
        ended = check(certificate, pristine, public, now=end + timedelta(seconds=1))
        assert ended.verdict is Verdict.INCONCLUSIVE
        assert "has ended" in ended.notes[0] and "R. Owner" in ended.notes[0]
        broken = issue(pristine, targets=targets, waivers=(replaced(waiver, expires="soon"),))
        refused(IntegrityError, "'soon'", certificate=broken, bundle=pristine, key=public)

    def test_thresholds_that_may_fit_the_results_are_told(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        policy = replaced(statement_of(pristine).predicate.policy, before_results=False)
        checked = check(issue(pristine, policy=policy), pristine, public)
        assert any("not committed before" in note for note in checked.notes)


class TestMachine:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"hardware": {"system": "darwin"}}, ["system darwin there", this_machine().system]),
            ({"hardware": {"architecture": "riscv64"}}, ["riscv64 there"]),
            ({"hardware": {"instruction_sets": (*instruction_sets(), "amx_x")}}, ["amx_x there"]),
            ({"hardware": {"instruction_sets": ()}}, [f"{sorted(instruction_sets())[0]} "]),
            ({"library_version": "1.2.3"}, ["onnxruntime 1.2.3 there",
                                            this_machine().packages["onnxruntime"]]),
            ({"library": "onnxruntime-gpu", "library_version": "1.2"}, ["none here"]),
        ],
    )  # fmt: skip
    def test_another_one_is_refused_and_told_apart(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path,
        change: dict[str, Any], words: list[str],
    ) -> None:  # fmt: skip
        if "hardware" in change:
            change = {"hardware": replaced(here(), **change["hardware"])}
        certificate = issue(pristine, targets=(certified(pristine, **change),))
        refused(EnvironmentUnfitError, str(TARGET), "--any-machine", *words,
                certificate=certificate, bundle=pristine, key=public)  # fmt: skip
        checked = check(certificate, pristine, public, anywhere=True)
        assert checked.verdict is Verdict.PASS
        assert words[0] in checked.notes[0]

    def test_everything_that_differs_is_told_at_once(self, pristine: Bundle) -> None:
        hardware = replaced(here(), system="darwin", architecture="riscv64")
        other = certified(pristine, hardware=hardware, library_version="1")
        assert len(differences(other, this_machine())) == 3
        assert differences(certified(pristine), this_machine()) == ()

    def test_another_processor_is_a_note(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        one = certified(pristine, hardware=replaced(here(), processor="Some CPU"))
        checked = check(issue(pristine, targets=(one,)), pristine, public)
        assert checked.verdict is Verdict.PASS
        assert any("Some CPU" in note and processor() in note for note in checked.notes)

    def test_of_a_gpu_name_capability_driver_and_library_count(self, pristine: Bundle) -> None:
        gpu = Gpu(0, "NVIDIA L4", "8.9", 24 << 30)
        machine = Machine("linux", "x86_64", "3.11.7", {"onnxruntime-gpu": "1.20.1"},
                          "580.95.05 (CUDA 13.0)", "", (gpu,))  # fmt: skip
        hardware = Hardware(
            system="linux", architecture="x86_64", processor="any", instruction_sets=("none",),
            gpu="NVIDIA L4", compute_capability="8.9", driver="580.95.05 (CUDA 13.0)",
        )  # fmt: skip
        target = certified(pristine, runtime="onnxruntime-cuda", library="onnxruntime-gpu",
                           library_version="1.20.1", hardware=hardware)  # fmt: skip
        assert differences(target, machine) == ()  # the processor's instructions do not count
        h100 = Gpu(1, "NVIDIA H100", "9.0", 80 << 30)
        others = {
            "GPU": dataclasses.replace(machine, gpus=(dataclasses.replace(gpu, name="NVIDIA T4"),)),
            "compute capability": dataclasses.replace(
                machine, gpus=(dataclasses.replace(gpu, compute_capability="7.5"),)
            ),
            "driver": dataclasses.replace(machine, driver="550.1 (CUDA 12.4)"),
            "onnxruntime-gpu": dataclasses.replace(machine, packages={"onnxruntime-gpu": "1.21.0"}),
        }
        for what, other in others.items():
            (difference,) = differences(target, other)
            assert difference.startswith(f"{what} ")
        two = dataclasses.replace(machine, gpus=(gpu, h100))
        assert differences(target, two) == ()
        assert len(differences(target, two, device=1)) == 2
        assert len(differences(target, two, device=2)) == 2
        none = dataclasses.replace(machine, gpus=(), driver=None, no_gpu_reason="no NVIDIA driver")
        assert len(differences(target, none)) == 3


class TestServing:
    def test_what_is_certified_serves(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        said = statement_of(pristine).predicate
        for runtime in ("auto", "onnxruntime-cpu"):
            with ccn_deploy.load(
                pristine.path, runtime, certificate=issue(pristine), key=public
            ) as model:
                assert model.certificate == said
                assert model.spec.graph == said.targets[0].program
        with ccn_deploy.load(pristine) as model:
            assert model.certificate is None

    def test_what_is_not_certified_does_not(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        with pytest.raises(GateError, match="nothing of torch-fp32"):
            ccn_deploy.load(pristine, "torch", certificate=issue(pristine), key=public)
        torch = this_machine().packages["torch"]
        one = certified(pristine, runtime="torch", library="torch", library_version=torch)
        certificate = issue(pristine, targets=(one,))
        with pytest.raises(RuntimeUnavailableError, match="certifies torch-fp32"):
            ccn_deploy.load(pristine, certificate=certificate, key=public)
        with ccn_deploy.load(pristine, "torch", certificate=certificate, key=public) as model:
            assert model.certificate is not None

    @pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
    def test_nor_what_did_not_pass(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path, verdict: str
    ) -> None:
        one = certified(pristine, verdict=verdict)
        certificate = issue(pristine, verdict=verdict, targets=(one,))
        with pytest.raises(GateError, match=verdict):
            ccn_deploy.load(pristine, "onnxruntime-cpu", certificate=certificate, key=public)
        with pytest.raises(RuntimeUnavailableError, match=verdict):
            ccn_deploy.load(pristine, certificate=certificate, key=public)

    def test_nor_what_has_ended_or_not_begun(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        ended = issue(pristine, expires=moment(NOW - timedelta(hours=1)))
        with pytest.raises(GateError, match=r"inconclusive\. It ended"):
            ccn_deploy.load(pristine, "onnxruntime-cpu", certificate=ended, key=public)
        later = issue(pristine, issued=moment(NOW + timedelta(days=1)))
        with pytest.raises(EnvironmentUnfitError, match="clock"):
            ccn_deploy.load(pristine, "onnxruntime-cpu", certificate=later, key=public)

    def test_nor_what_was_certified_elsewhere(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        certificate = issue(pristine, targets=(certified(pristine, library_version="1.2.3"),))
        with pytest.raises(EnvironmentUnfitError, match=r"onnxruntime 1\.2\.3 there"):
            ccn_deploy.load(pristine, "onnxruntime-cpu", certificate=certificate, key=public)
        with pytest.raises(RuntimeUnavailableError, match="not set up"):
            ccn_deploy.load(pristine, certificate=certificate, key=public)

    def test_a_certificate_and_its_key_come_together(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        with pytest.raises(UsageError, match="key"):
            ccn_deploy.load(pristine, certificate=issue(pristine))
        with pytest.raises(UsageError, match="key"):
            ccn_deploy.load(pristine, key=public)
        with pytest.raises(IntegrityError, match="no signature"):
            ccn_deploy.load(pristine, certificate=issue(pristine, signed=False), key=public)

    def test_of_another_bundle(
        self, pristine: Bundle, small: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        with pytest.raises(IntegrityError, match="is of the bundle"):
            ccn_deploy.load(pristine, certificate=issue(small), key=public)

    def test_a_runtime_that_chose_another_program_is_closed_again(self, pristine: Bundle) -> None:
        """Of several engines in a bundle the library's choice has to be the certified one."""
        said = statement_of(pristine, targets=(certified(pristine, program="another"),)).predicate
        record = pristine.program(TARGET)
        with pytest.raises(GateError, match=f"executes {record.path}.*another"):
            first_usable(pristine, [Candidate(TARGET, record, None)], certificate=said)

    def test_admit_has_its_own_clock(self, pristine: Bundle) -> None:
        said = statement_of(pristine).predicate
        assert admit(said, TARGET, this_machine(), now=NOW) == said.targets[0]
        with pytest.raises(GateError, match="It ended"):
            admit(said, TARGET, this_machine(), now=NOW + timedelta(days=31))


LEFT_OUT = (*HEAVY, "tensorrt", "tensorrt_rtx", "sklearn", "PIL", "jinja2", "safetensors")
WITHOUT = """
import sys, time
for name in {names!r}:
    sys.modules[name] = None
from ccn_deploy.cli.main import main
try:
    main()
except SystemExit as end:
    if not end.code:
        print(time.process_time(), file=sys.stderr)
    raise
"""


def without(names: tuple[str, ...], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that cannot import some packages."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )


class TestCommand:
    def test_it_needs_the_base_install_and_cryptography_and_a_moment(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path
    ) -> None:
        asked = ("verify", issue(pristine), "--bundle", pristine.path, "--key", public)
        done = without(LEFT_OUT, *asked)
        assert done.returncode == ExitCode.PASS, done.stderr
        assert float(done.stderr.split()[-1]) < 1.0  # seconds of this process alone
        lines = done.stdout.splitlines()
        assert lines[0] == "Certified: it keeps at least 80 % right."
        assert key_id(load_public(public)) in lines[1]
        assert lines[2].startswith("onnxruntime-cpu-fp32: onnxruntime") and "pass" in lines[2]
        assert "90.0 %" in lines[3] and "82.0 to 95.0" in lines[3]
        assert "before the results" in lines[4]
        assert lines[-1].startswith("PASS: onnxruntime-cpu-fp32")

    def test_without_cryptography_the_extra_is_named(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path, tmp_path: Path
    ) -> None:
        blocked = ("cryptography",)
        certificate = issue(pristine)
        bundle = ("--bundle", pristine.path)
        done = without(blocked, "verify", certificate, *bundle, "--key", public)
        assert_clear_error(done, ExitCode.ENVIRONMENT, "cryptography", "ccn-deploy[certify]")
        done = without(blocked, "key", "new", tmp_path / "k")
        assert_clear_error(done, ExitCode.ENVIRONMENT, "cryptography", "ccn-deploy[certify]")
        assert not (tmp_path / "k").exists()
        done = without(blocked, "verify", certificate, *bundle, "--unsigned")
        assert done.returncode == ExitCode.PASS, done.stderr
        assert "Not signed" in done.stdout and "nobody vouches" in done.stdout

    def test_json(self, pristine: Bundle, issue: Callable[..., Path], public: Path) -> None:
        asked = ("verify", issue(pristine), "--bundle", pristine.path, "--key", public, "--json")
        done = command(*asked, "--no-evidence", "--runtime", "onnxruntime-cpu")
        assert done.returncode == ExitCode.PASS, done.stderr
        told = json.loads(done.stdout)
        assert (told["schema"], told["verdict"]) == ("ccn-deploy/verify/1", "pass")
        assert told["targets"] == ["onnxruntime-cpu-fp32"]
        assert "The evidence was not checked." in told["notes"]
        assert told["signed_by"] == key_id(load_public(public))

    def test_exit_codes(
        self, pristine: Bundle, issue: Callable[..., Path], public: Path, tmp_path: Path
    ) -> None:
        signed = ("--bundle", pristine.path, "--key", public)
        failed = certified(pristine, verdict="fail")
        elsewhere = certified(pristine, library_version="1.2.3")
        ended = issue(pristine, expires=moment(NOW - timedelta(hours=1)))
        done = command("verify", ended, *signed)
        assert done.returncode == ExitCode.INCONCLUSIVE
        assert "It ended at" in done.stdout and "INCONCLUSIVE" in done.stdout
        done = command("verify", issue(pristine, verdict="fail", targets=(failed,)), *signed)
        assert done.returncode == ExitCode.GATE_FAILED and "FAIL" in done.stdout
        other = issue(pristine, targets=(elsewhere,))
        assert_clear_error(command("verify", other, *signed), ExitCode.ENVIRONMENT, "1.2.3 there")
        assert command("verify", other, *signed, "--any-machine").returncode == ExitCode.PASS
        whole = issue(pristine)
        asked = command("verify", whole, *signed, "--runtime", "onnxruntime-cuda")
        assert_clear_error(asked, ExitCode.GATE_FAILED, "onnxruntime-cuda-fp32")
        whole.write_bytes(whole.read_bytes()[:-1])
        assert_clear_error(command("verify", whole, *signed), ExitCode.INTEGRITY)

    def test_slips(self, pristine: Bundle, issue: Callable[..., Path], public: Path) -> None:
        certificate, bundle = issue(pristine), ("--bundle", pristine.path)
        for options, words in (
            ((), ("--key", "--unsigned")),
            (("--key", public, "--unsigned"), ("--key", "--unsigned")),
            (("--key", public, "--precision", "fp16"), ("--runtime",)),
            (("--key", public, "--runtime", "onnxruntime_cpu"), ("Did you mean",)),
            (("--key", public.with_name("none")), ("is not there",)),
        ):
            done = command("verify", certificate, *bundle, *options)
            assert_clear_error(done, ExitCode.USAGE, *words)
        done = command("verify", certificate.with_name("none"), *bundle, "--unsigned")
        assert_clear_error(done, ExitCode.USAGE, "is not there")

    def test_a_file_without_end_is_not_read(
        self, pristine: Bundle, public: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "large.json"
        with path.open("wb") as file:
            file.truncate(LARGEST_ENVELOPE + 1)
        refused(IntegrityError, "more than", certificate=path, bundle=pristine, key=public)

    def test_key_new(self, tmp_path: Path) -> None:
        done = command("key", "new", tmp_path / "k")
        assert done.returncode == 0, done.stderr
        assert key_id(load_public(tmp_path / "k.pub")) in done.stdout
        assert str(tmp_path / "k.pub") in done.stdout
        assert_clear_error(command("key", "new", tmp_path / "k"), ExitCode.USAGE, "exists already")
        done = command("key", "new", tmp_path / "q", "--passphrase", **{PASSPHRASE: "open sesame"})
        assert done.returncode == 0, done.stderr
        assert b"ENCRYPTED" in (tmp_path / "q").read_bytes()
        assert "sesame" not in done.stdout + done.stderr


def test_a_checked_certificate_is_immutable(
    pristine: Bundle, issue: Callable[..., Path], public: Path
) -> None:
    checked: Checked = check(issue(pristine), pristine, public)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checked.verdict = Verdict.FAIL  # type: ignore[misc]
