"""What a user types and sees: help, exit codes, and errors of one or two lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import ExitCode

HEAVY = ("torch", "onnx", "onnxruntime", "foolbox", "scipy", "matplotlib", "lightning_fabric")


def ccn_deploy(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ccn_deploy.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
        check=False,
    )


def assert_clear_error(
    result: subprocess.CompletedProcess[str], code: ExitCode, *words: str
) -> None:
    """The code is right, the error is one or two lines and says the words, stdout is empty."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("error:") :].strip()
    assert 1 <= len(message.splitlines()) <= 2, message
    for word in words:
        assert word in message, message
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["export"],
        ["verify-parity"],
        ["verify-robustness"],
        ["bench"],
        ["doctor"],
        ["quickstart"],
    ],
)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from ccn_deploy.cli.main import app\n"
        f"app({[*arguments, '--help']!r}, standalone_mode=False)\n"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_is_frozen() -> None:
    """A change of any command or option is a change of this test, on purpose."""
    from typer.main import get_command

    from ccn_deploy.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: " ".join(sorted(o for p in command.params for o in p.opts))
        for name, command in commands.items()
    }
    frozen = json.loads((Path(__file__).parent / "command_line.json").read_text())
    assert found == frozen


@pytest.mark.parametrize("command", ["verify-parity", "verify-robustness"])
class TestBundleErrors:
    def test_missing(self, command: str, tmp_path: Path) -> None:
        assert_clear_error(
            ccn_deploy(command, tmp_path / "nowhere"),
            ExitCode.USAGE,
            "nowhere",
            "ccn-deploy export",
        )

    def test_no_bundle(self, command: str, tmp_path: Path) -> None:
        assert_clear_error(ccn_deploy(command, tmp_path), ExitCode.USAGE, "manifest.json")

    def test_flipped_byte(self, command: str, ccn_bundle: Bundle) -> None:
        for file in sorted(p for p in ccn_bundle.path.rglob("*") if p.is_file()):
            healthy = file.read_bytes()
            middle = len(healthy) // 2
            file.write_bytes(
                healthy[:middle] + bytes([healthy[middle] ^ 1]) + healthy[middle + 1 :]
            )
            assert_clear_error(ccn_deploy(command, ccn_bundle.path), ExitCode.INTEGRITY, file.name)
            file.write_bytes(healthy)

    def test_link_out_of_the_bundle(self, command: str, ccn_bundle: Bundle, tmp_path: Path) -> None:
        weights = ccn_bundle.path / "weights.safetensors"
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
        assert_clear_error(
            ccn_deploy(command, ccn_bundle.path), ExitCode.INTEGRITY, "symbolic link"
        )

    def test_unknown_runtime_suggests_the_nearest(self, command: str, ccn_bundle: Bundle) -> None:
        assert_clear_error(
            ccn_deploy(command, ccn_bundle.path, "--runtime", "onnxruntime-cp"),
            ExitCode.USAGE,
            "'onnxruntime-cpu'",
        )

    def test_cuda_without_a_gpu_is_an_error(self, command: str, ccn_bundle: Bundle) -> None:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime here has the CUDA provider")
        assert_clear_error(
            ccn_deploy(command, ccn_bundle.path, "--runtime", "onnxruntime-cuda"),
            ExitCode.ENVIRONMENT,
            "NVIDIA GPU",
        )

    def test_unknown_precision(self, command: str, ccn_bundle: Bundle) -> None:
        result = ccn_deploy(command, ccn_bundle.path, "--precision", "fp17")
        assert_clear_error(result, ExitCode(result.returncode), "fp17")
        assert result.returncode in (ExitCode.USAGE, ExitCode.ENVIRONMENT)

    def test_missing_data_set(self, command: str, ccn_bundle: Bundle, tmp_path: Path) -> None:
        assert_clear_error(
            ccn_deploy(command, ccn_bundle.path, "--dataset", "mnist", "--data-dir", tmp_path),
            ExitCode.USAGE,
            str(tmp_path),
            "mnist5k",
        )


def test_unknown_attack_suggests_the_nearest(ccn_bundle: Bundle) -> None:
    assert_clear_error(
        ccn_deploy("verify-robustness", ccn_bundle.path, "--attack", "fsgm"),
        ExitCode.USAGE,
        "'fgsm'",
    )


@pytest.mark.parametrize("epsilons", ["0.1,big", "0.1,,0.2", "-0.1", "nan"])
def test_epsilons_that_are_no_numbers(ccn_bundle: Bundle, epsilons: str) -> None:
    # --epsilons=-0.1: a value that begins with a dash.
    assert_clear_error(
        ccn_deploy("verify-robustness", ccn_bundle.path, f"--epsilons={epsilons}"),
        ExitCode.USAGE,
        "epsilon",
    )


def test_unknown_defense_suggests_the_nearest(tmp_path: Path) -> None:
    assert_clear_error(
        ccn_deploy("train", "--defense", "cnn", "--output", tmp_path / "run"),
        ExitCode.USAGE,
        "'ccn'",
    )
    assert not (tmp_path / "run").exists()


def test_export_of_no_run(tmp_path: Path) -> None:
    assert_clear_error(
        ccn_deploy("export", tmp_path, "--output", tmp_path / "bundle"),
        ExitCode.USAGE,
        "ccn-deploy train",
    )
    assert not (tmp_path / "bundle").exists()


def test_export_does_not_overwrite(trained_run: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("kept")
    assert_clear_error(
        ccn_deploy("export", trained_run("sm"), "--output", tmp_path / "bundle"),
        ExitCode.USAGE,
        "--overwrite",
    )
    assert (tmp_path / "bundle" / "precious").read_text() == "kept"


def test_missing_extra_is_named(ccn_bundle: Bundle, tmp_path: Path) -> None:
    """With torch hidden, as in an install without [train], the error names the extra."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    assert_clear_error(
        ccn_deploy("verify-parity", ccn_bundle.path, PYTHONPATH=str(tmp_path)),
        ExitCode.ENVIRONMENT,
        "ccn-deploy[train]",
    )


def test_version() -> None:
    from ccn_deploy import __version__

    assert ccn_deploy("--version").stdout == f"ccn-deploy {__version__}\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-drop", "1"], ["--max-drop 1 ", "--max-drop 1%", "--max-drop 0.01"]),
        (["--max-drop", "0"], ["--max-drop 0 "]),
        (["--min-robust", "pgd@0.1"], ["'pgd@0.1'", "ATTACK@STRENGTH=SHARE"]),
        (["--min-robust", "pgd@0.1=55"], ["--min-robust pgd@0.1=55%"]),
        (["--min-accuracy", "97"], ["--min-accuracy 97%"]),
        (["--attack", "fgsm", "--steps", "9"], ["--steps", "none of the attacks takes it"]),
        (["--attack", "fgsm", "--step-size", "0.1"], ["--step-size"]),
        (["--attack", "deepfool", "--restarts", "2"], ["--restarts"]),
        (["--attack", "deepfool", "--epsilons", "0.1"], ["--epsilons"]),
        (["--attack", "pgd", "--epsilons-l2", "1"], ["--epsilons-l2"]),
        (["--recheck", "some"], ["--recheck some", "--recheck all"]),
    ],
)
def test_what_is_judged_and_attacked_is_read_before_anything_else(
    options: list[str], words: list[str]
) -> None:
    assert_clear_error(ccn_deploy("verify-robustness", "nowhere", *options), ExitCode.USAGE, *words)


def test_the_quickstart_refuses_a_slip_before_it_trains(tmp_path: Path) -> None:
    given = ("quickstart", "--output", tmp_path / "q", "--max-drop", "1")
    assert_clear_error(ccn_deploy(*given), ExitCode.USAGE, "--max-drop 1%")
    assert not (tmp_path / "q").exists()
