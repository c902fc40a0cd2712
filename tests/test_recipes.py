"""The recipes in ``examples/ci`` and ``examples/docker``, done as they stand; the auditors' page.

What a recipe installs from PyPI is installed from this checkout, into an environment of its own;
everything else is run to the letter, in directories like those that the recipes describe.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ruamel.yaml import YAML

from ccn_deploy.certificates.keys import new_key
from ccn_deploy.certificates.statement import Statement
from ccn_deploy.certification.policy import Policy
from ccn_deploy.cli.main import app
from ccn_deploy.errors import ExitCode

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / "examples" / "ci" / "certify.yml"
JUDGE, SERVE = (ROOT / "examples" / "docker" / f"Dockerfile.{name}" for name in ("judge", "serve"))
RECIPES = (WORKFLOW, JUDGE, SERVE)
AUDITORS = ROOT / "docs" / "auditors.md"
OWNER = "someone/digits"
SETTINGS = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}

POLICY = """\
schema = "ccn-deploy/policy/1"
name = "digits"
intended-use = "digits"
owner = "the release manager"
[[target]]
runtime = "onnxruntime-cpu"
[data]
samples = 30
parity-samples = 8
[attacks]
names = ["fgsm"]
epsilons = [0.1]
[thresholds]
max-drop = "10%"
min-robust = ["fgsm@0.1=20%"]
"""


def run(
    command: list[str | Path], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )


def scripts(directory: Path, **programs: str) -> Path:
    """Write scripts that run Python with some arguments, as an installation would."""
    directory.mkdir()
    for name, arguments in programs.items():
        path = directory / name.replace("_", "-")
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        path.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine on which everything is installed: this one."""
    bin = scripts(
        tmp_path_factory.mktemp("here") / "bin",
        python="", pytest="-m pytest", ccn_deploy="-m ccn_deploy.cli.main",
    )  # fmt: skip
    path = os.pathsep.join([str(bin), os.environ["PATH"]])
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = {"PATH": path, "PYTHONPATH": modules, "GITHUB_REPOSITORY": OWNER}
    return {**os.environ, **SETTINGS, **found}


@dataclass(frozen=True)
class Installer:
    """Runs what a recipe installs with, into a new environment."""

    directory: Path

    def install(self, command: str, **arguments: str) -> dict[str, str]:
        """Run ``pip install ...`` with this checkout for ccn-deploy; return how to use it."""
        directory = self.directory
        checkout = directory / "checkout"
        checkout.mkdir(parents=True)
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("ccn_deploy", "exporters", "trainers", "cli"):
            shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, checkout)
        venv.create(directory / "venv", symlinks=True)
        there = directory / "venv" / "bin"
        pip = scripts(directory / "bin", pip=f"-m pip --python {there / 'python'}")
        environment = {
            **os.environ,
            **arguments,
            "PATH": os.pathsep.join([str(pip), os.environ["PATH"]]),
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
            "PIP_RETRIES": "0",  # the second index need not be reachable
        }
        assert command.startswith("pip install ") and "ccn-deploy[" in command
        done = run(
            ["sh", "-c", command.replace("ccn-deploy[", f"{checkout}[")], directory, environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return {**kept, **SETTINGS, "PATH": os.pathsep.join([str(there), "/usr/bin", "/bin"])}


def requirements(text: str) -> list[set[str]]:
    """Return the extras of each installation of ccn-deploy in a recipe."""
    return [set(found.split(",")) for found in re.findall(r"""["']ccn-deploy\[(.*?)\]["']""", text)]


# The workflow.


@dataclass(frozen=True)
class Released:
    """What a release leaves: the repository's files, and the artifact of the first job."""

    repository: Path
    artifact: Path
    private: str


def workflow() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(WORKFLOW)
    return found


def steps(job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = workflow()["jobs"][job]["steps"]
    return found


def commands(job: str, *, installing: bool = False) -> Iterator[dict[str, Any]]:
    for step in steps(job):
        if "run" in step and step["run"].startswith("pip install ") is installing:
            yield step


def do(step: dict[str, Any], cwd: Path, environment: dict[str, str], **secrets: str) -> str:
    """Run a step as a runner does, and return what it printed; it must end with 0."""
    assert "${{" not in step["run"]  # what a runner puts there, a shell would run
    given = dict(step.get("env", {}))
    for name, value in given.items():
        secret = re.fullmatch(r"\$\{\{ secrets\.(\w+) \}\}", value)
        assert secret, value
        given[name] = secrets[secret.group(1)]
    everywhere = {name: str(value) for name, value in workflow()["env"].items()}
    done = run(["bash", "-e", "-c", step["run"]], cwd, {**environment, **everywhere, **given})
    assert done.returncode == 0, (step["run"], done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def repository(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the head of the workflow says that it needs; the private key beside it."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(exported("ccn"), root / "repository" / "bundle")
    (root / "repository" / "policy.toml").write_text(POLICY)
    new_key(root / "release")
    shutil.copy(root / "release.pub", root / "repository")
    return root / "repository"


@pytest.fixture(scope="module")
def released(repository: Path, here: dict[str, str]) -> Released:
    """The first job, run step by step in a checkout."""
    private = (repository.parent / "release").read_text()
    checkout, artifact = repository.parent / "checkout", repository.parent / "artifact"
    shutil.copytree(repository, checkout)
    for step in commands("certify"):
        do(step, checkout, here, CCN_DEPLOY_SIGNING_KEY=private)
    uploads = [step for step in steps("certify") if "upload-artifact" in step.get("uses", "")]
    artifact.mkdir()
    for path in uploads[0]["with"]["path"].split():  # paths stay relative to what they share
        source, target = checkout / path, artifact / path
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return Released(repository, artifact, private)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The machine of the second job: a new environment, with what the job installs."""
    (step,) = commands("verify", installing=True)
    return Installer(tmp_path_factory.mktemp("fresh") / "machine").install(step["run"])


def downloaded(released: Released, path: Path) -> Path:
    """The second job's checkout, after the artifact came."""
    shutil.copytree(released.repository, path)
    shutil.copytree(released.artifact, path, dirs_exist_ok=True)
    return path


def test_the_workflow_is_what_github_takes(tmp_path: Path) -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
               "vendor.github-workflows"]  # fmt: skip
    done = run([*checker, WORKFLOW], tmp_path, dict(os.environ))
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOW.read_text().replace("runs-on:", "runs-in:"))
    assert run([*checker, broken], tmp_path, dict(os.environ)).returncode == 1


def test_the_first_job_certifies(released: Released) -> None:
    files = sorted(path.name for path in released.artifact.iterdir())
    assert files == ["bundle", "certificate.html", "certificate.json", "claims.xml"]
    assert 'failures="0"' in (released.artifact / "claims.xml").read_text()
    found = statement(released.artifact / "certificate.json")["predicate"]
    assert (found["verdict"], found["tester"]) == ("pass", OWNER)
    assert found["policy"]["before_results"]  # it was committed before the claims were judged
    everything = [path for path in released.artifact.rglob("*") if path.is_file()]
    secret = released.private.splitlines()[1].encode()
    assert not any(secret in path.read_bytes() for path in everything)
    assert not any(path.name.startswith(".") for path in everything)  # hidden files are left out


def test_the_second_job_lets_it_pass_without_torch(
    released: Released, fresh: dict[str, str], tmp_path: Path
) -> None:
    checkout = downloaded(released, tmp_path / "checkout")
    for heavy in ("torch", "onnx", "onnxruntime", "pytest"):
        assert run(["python", "-c", f"import {heavy}"], tmp_path, fresh).returncode == 1
    (step,) = commands("verify")
    said = do(step, checkout, fresh)
    assert said.splitlines()[-1].startswith("PASS"), said


def swapped(checkout: Path) -> None:
    graph = checkout / "bundle" / "graphs" / "forward-fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")


def shortened(checkout: Path) -> None:
    rows = next((checkout / "bundle" / "evidence").rglob("linf-*.jsonl"))
    rows.write_bytes(rows.read_bytes()[:-1])


def signed_by_another(checkout: Path) -> None:
    new_key(checkout / "other")
    (checkout / "other.pub").replace(checkout / "release.pub")


@pytest.mark.parametrize("change", [swapped, shortened, signed_by_another])
def test_the_second_job_stops_what_was_changed(
    released: Released, here: dict[str, str], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    checkout = downloaded(released, tmp_path / "checkout")
    change(checkout)
    (step,) = commands("verify")
    done = run(["bash", "-e", "-c", step["run"]], checkout, here)
    assert done.returncode == ExitCode.INTEGRITY, done.stdout + done.stderr


def test_the_key_is_given_to_one_step_only_and_the_second_job_waits() -> None:
    found = workflow()
    assert found["permissions"] == {"contents": "read"}
    assert found["jobs"]["verify"]["needs"] == "certify"
    with_secret = [step["name"] for step in steps("certify") if "secrets." in str(step)]
    assert with_secret == ["Certify, from the same evidence"]
    assert "secrets." not in str(steps("verify")) and "secrets." not in str(found["env"])


# What all three install.


def test_what_is_installed_is_there() -> None:
    extras = metadata("ccn-deploy").get_all("Provides-Extra") or []
    judging, verifying = requirements(WORKFLOW.read_text())
    assert judging == {"cpu", "train", "certify", "test"} and verifying == {"certify"}
    assert requirements(JUDGE.read_text()) == [judging]
    assert requirements(SERVE.read_text()) == [{"cpu", "certify"}]
    assert judging <= set(extras)


def test_all_of_them_run_one_version_of_the_runtime() -> None:
    """A certificate counts for the version that it names, so judges and servers have the same."""
    pinned = re.search(r"^onnxruntime==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    for recipe in RECIPES:
        found = re.findall(r"(?:onnxruntime==|ONNXRUNTIME=)([\d.]+)", recipe.read_text())
        assert found == [pinned.group(1)], recipe.name


# The images.


@dataclass(frozen=True)
class Dockerfile:
    """A Dockerfile: its head, and its instructions in order."""

    head: str
    instructions: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        text = path.read_text()
        lines = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
        words = [line.split(maxsplit=1) for line in lines if line.strip()]
        return cls(text.partition("\nFROM")[0], tuple((name, rest) for name, rest in words))

    def all(self, name: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == name]

    def one(self, name: str) -> str:
        (rest,) = self.all(name)
        return rest

    @property
    def arguments(self) -> dict[str, str]:
        return dict(rest.split("=", 1) for rest in self.all("ARG"))

    @property
    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for rest in self.all("ENV") for word in rest.split())

    @property
    def command(self) -> list[str]:
        found: list[str] = json.loads(self.one("CMD"))
        return found

    def image(self, directory: Path, here: dict[str, str], fresh: bool) -> dict[str, str]:
        """The environment in the image: what its RUN installs, or else what is here."""
        base = here
        if fresh:
            base = Installer(directory / "image").install(self.one("RUN"), **self.arguments)
        return {**base, **self.environment}


# All of torch is installed into a new environment: minutes.
FRESH = [False, pytest.param(True, marks=[pytest.mark.wide, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("path", [JUDGE, SERVE])
def test_an_image_is_small_and_runs_as_nobody(path: Path) -> None:
    found = Dockerfile.read(path)
    assert found.one("FROM") == "python:3.12-slim"
    assert "--no-cache-dir" in found.one("RUN")
    user = found.one("USER").split(":")[0]
    assert user.isdigit() and int(user) > 0  # by number: Kubernetes checks runAsNonRoot by it
    assert "--read-only" in found.head
    names = [name for name, _ in found.instructions]
    assert names.index("RUN") < names.index("USER") < names.index("CMD")


def test_the_context_has_what_is_copied() -> None:
    found = Dockerfile.read(SERVE)
    *copied, where = found.one("COPY").split()
    context = re.findall(r"^#   (\S+\.\S+) +\S", found.head, re.M)
    assert copied == context == ["serve.py", "release.pub"]
    assert where.rstrip("/") == found.one("WORKDIR")
    assert (ROOT / "examples" / "serve.py").is_file()
    assert Dockerfile.read(JUDGE).all("COPY") == []


@pytest.fixture
def without_git(tmp_path: Path, here: dict[str, str]) -> dict[str, str]:
    """This machine with no more programs than a slim image has: no git."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "env", "uname"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    bin = here["PATH"].split(os.pathsep)[0]
    return {**here, "PATH": os.pathsep.join([bin, str(programs)])}


@pytest.mark.parametrize("fresh", FRESH)
def test_the_image_that_judges_certifies_what_is_mounted(
    released: Released, without_git: dict[str, str], tmp_path: Path, fresh: bool
) -> None:
    found = Dockerfile.read(JUDGE)
    work = tmp_path / "work"
    shutil.copytree(released.repository, work)
    # It goes on from evidence that is there, which is asked again about in part.
    shutil.copytree(released.artifact / "bundle", work / "bundle", dirs_exist_ok=True)
    image = found.image(tmp_path, without_git, fresh)
    image["PATH"] = os.pathsep.join(
        [image["PATH"].split(os.pathsep)[0], str(tmp_path / "programs")]
    )
    assert found.environment["HOME"] == "/tmp"  # the tmpfs
    (tmp_path / "tmpfs").mkdir()
    image |= {"HOME": str(tmp_path / "tmpfs"), "TMPDIR": str(tmp_path / "tmpfs")}
    image["CCN_DEPLOY_SIGNING_KEY"] = released.private
    before = set(work.iterdir())
    done = run([*found.command, "--threads", "1"], work, image)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "tmpfs").rglob("*onnxruntime*"))  # its telemetry
    written = {path.name for path in set(work.iterdir()) - before}
    assert written == {"certificate.json", "certificate.html"}
    assert statement(work / "certificate.json")["predicate"]["verdict"] == "pass"


def served_directory(released: Released, path: Path) -> Path:
    """What is in the image and what is mounted, as the head of its Dockerfile says."""
    context = {"serve.py": ROOT / "examples" / "serve.py"}
    path.mkdir()
    for name in Dockerfile.read(SERVE).one("COPY").split()[:-1]:
        shutil.copy(context.get(name, released.repository / name), path / name)
    shutil.copytree(released.repository / "bundle", path / "bundle")  # without evidence
    shutil.copy(released.artifact / "certificate.json", path)
    return path


@pytest.mark.parametrize("fresh", FRESH)
def test_the_image_that_serves_answers_by_its_certificate(
    released: Released, here: dict[str, str], tmp_path: Path, fresh: bool
) -> None:
    found = Dockerfile.read(SERVE)
    (tmp_path / "home").mkdir()
    image = {**found.image(tmp_path, here, fresh), "HOME": str(tmp_path / "home")}
    directory = served_directory(released, tmp_path / "srv")
    before = sorted(directory.rglob("*"))
    with subprocess.Popen(
        [*found.command, "--port", "0"],
        cwd=directory, env=image, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(" ")[0].replace("0.0.0.0", "127.0.0.1")
            with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
                health = json.load(answer)
        finally:
            server.terminate()
        assert server.wait(60) == 0
    certificate = statement(directory / "certificate.json")["predicate"]
    assert health["certified_until"] == certificate["expires"]
    assert health["bundle"] == certificate["bundle"]
    assert (health["runtime"], health["precision"]) == ("onnxruntime-cpu", "fp32")
    assert sorted(directory.rglob("*")) == before  # it runs where nothing can be written
    assert not any((tmp_path / "home").iterdir())  # and keeps no telemetry
    assert found.one("EXPOSE") == "8080"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (swapped, ExitCode.INTEGRITY),
        (signed_by_another, ExitCode.INTEGRITY),
        (lambda path: (path / "release.pub").unlink(), ExitCode.USAGE),
    ],
)
def test_the_image_that_serves_refuses_everything_else(
    released: Released,
    here: dict[str, str],
    tmp_path: Path,
    change: Callable[[Path], None],
    code: ExitCode,
) -> None:
    directory = served_directory(released, tmp_path / "srv")
    change(directory)
    done = run([*Dockerfile.read(SERVE).command, "--port", "0"], directory, here)
    assert done.returncode == code and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr


def test_the_server_takes_a_certificate_with_its_key_only(
    released: Released, here: dict[str, str], tmp_path: Path
) -> None:
    directory = served_directory(released, tmp_path / "srv")
    command = ["python", "serve.py", "bundle", "--certificate", "certificate.json"]
    done = run([*command, "--port", "0"], directory, here)
    assert done.returncode == ExitCode.USAGE and "key" in done.stderr


# The page for auditors.


def statement(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(path.read_bytes())["payload"]))
    return found


def paths_on_the_page() -> list[str]:
    return re.findall(r"`((?:predicate|subject)[\w.\[\]-]*)`", AUDITORS.read_text())


def in_types(path: str) -> None:
    """Follow a path through the types of a statement, and of the policy in it."""
    kind: Any = msgspec.inspect.type_info(Statement)
    for name in path.split("."):
        fields = {field.encode_name: field.type for field in kind.fields}
        assert name.removesuffix("[]") in fields, f"{path}: no {name}"
        kind = fields[name.removesuffix("[]")]
        if isinstance(kind, msgspec.inspect.UnionType):
            (kind,) = [one for one in kind.types if not isinstance(one, msgspec.inspect.NoneType)]
        if name.endswith("[]"):
            kind = kind.item_type
        if name == "document":
            kind = msgspec.inspect.type_info(Policy)
        if isinstance(kind, msgspec.inspect.DictType):
            return  # of keys of its own: those of a certificate


def in_document(path: str, found: Any) -> None:
    """Follow a path through a certificate, to each of its values."""
    name, _, rest = path.partition(".")
    assert name.removesuffix("[]") in found, f"no {name}"
    value = found[name.removesuffix("[]")]
    for one in value if name.endswith("[]") else [value]:
        if rest:
            in_document(rest, one)


@pytest.mark.parametrize("path", sorted(set(paths_on_the_page())))
def test_what_the_page_points_to_is_in_the_type(path: str) -> None:
    in_types(path)


def test_a_path_that_is_nowhere_is_found_out() -> None:
    assert len(set(paths_on_the_page())) > 40
    with pytest.raises(AssertionError, match="comitted"):
        in_types("predicate.policy.comitted")
    with pytest.raises(AssertionError, match="min-robustness"):
        in_types("predicate.policy.document.thresholds.min-robustness")


def test_what_the_page_points_to_is_in_a_certificate(released: Released) -> None:
    found = statement(released.artifact / "certificate.json")
    for path in paths_on_the_page():
        in_document(path, found)


def test_every_part_of_a_certificate_answers_a_question() -> None:
    """A field that the page does not name is one that nobody asked for, or was forgotten."""
    (predicate,) = [
        field.type
        for field in msgspec.inspect.type_info(Statement).fields  # type: ignore[attr-defined]
        if field.name == "predicate"
    ]
    named = " ".join(paths_on_the_page())
    unnamed = [f.name for f in predicate.fields if f"predicate.{f.encode_name}" not in named]
    assert unnamed == ["claim"]  # the sentence that says all of it


def test_the_commands_of_the_page_are_done(
    released: Released, here: dict[str, str], tmp_path: Path
) -> None:
    checkout = downloaded(released, tmp_path / "checkout")
    text = AUDITORS.read_text()
    (block,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    install, *rest = [line.removeprefix("$ ") for line in block.splitlines()]
    assert install == "pip install 'ccn-deploy[certify]'"
    verify, show = (run(["bash", "-c", line], checkout, here) for line in rest)
    assert verify.returncode == 0, verify.stderr
    assert json.loads(show.stdout) == statement(checkout / "certificate.json")
    known = {command.name for command in app.registered_commands}
    assert set(re.findall(r"`ccn-deploy (\w+)", text)) <= known
    for link, anchor in re.findall(r"\]\((\w[\w-]*\.md)(?:#([\w-]+))?\)", text):
        there = (ROOT / "docs" / link).read_text().lower()
        titles = re.findall(r"^#+ (.*)$", there, re.M)
        slugs = [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles]
        assert not anchor or anchor in slugs, f"{link}#{anchor}"
