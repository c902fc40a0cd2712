"""`ccn-deploy bench`: the statistics against their definitions, the command against its contract.

Nothing here judges how fast something is.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ccn_deploy.bench import BenchRequest, bench
from ccn_deploy.bundle import Bundle
from ccn_deploy.data import ModelInput, dataset_from_arrays, load_dataset
from ccn_deploy.errors import ExitCode, RuntimeUnavailableError, UsageError
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.sources.opening import open_source
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.latency import FEWEST_CALLS, Latency, Ratio, take_turns
from ccn_deploy.serving import Model
from tests.foreign_files import classifier
from tests.networks import as_run, random_network
from tests.test_cli import assert_clear_error, ccn_deploy

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


class TestLatency:
    def test_percentiles_of_a_known_series(self) -> None:
        seconds = np.random.default_rng(0).permutation(np.arange(1, 1001) / 1000)
        latency = Latency.of(seconds, batch=4)
        assert latency.calls == 1000
        assert latency.p50 == pytest.approx(0.5005)
        assert latency.p90 == pytest.approx(0.9001)
        assert latency.p99 == pytest.approx(0.99001)
        assert latency.images_per_second == pytest.approx(4 * 1000 / 500.5)

    @given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=300))
    def test_so_many_calls_stay_within(self, times: list[float]) -> None:
        latency = Latency.of(np.array(times), batch=1)
        for share, value in ((0.5, latency.p50), (0.9, latency.p90), (0.99, latency.p99)):
            if value is not None:
                within = sum(time <= value * (1 + 1e-9) for time in times)
                assert within >= math.floor(share * (len(times) - 1)) + 1
                assert min(times) <= value * (1 + 1e-9)
                assert value <= max(times) * (1 + 1e-9)

    def test_a_percentile_that_too_few_calls_cannot_have_is_left_out(self) -> None:
        for calls, p90, p99 in ((9, False, False), (10, True, False), (99, True, False)):
            latency = Latency.of(np.ones(calls), batch=1)
            assert (latency.p90 is not None, latency.p99 is not None) == (p90, p99)
        assert Latency.of(np.ones(100), batch=1).p99 == 1


@dataclass
class Clock:
    """Time that passes only when a program runs, at a pace that may change."""

    now: float = 0.0
    pace: Callable[[float], float] = lambda now: 1.0
    order: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def program(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.now += seconds * self.pace(self.now)

        return run


class TestTakeTurns:
    def test_programs_alternate_in_blocks_after_warming_up(self) -> None:
        clock = Clock()
        programs = [clock.program("a", 0.004), clock.program("b", 0.002)]
        a, b = take_turns(programs, calls=12, warm_up=3, clock=clock)
        # Blocks fill 20 ms of the slower one: 5 calls, each block after one more call.
        blocks = [6, 6, 3]
        turns = "".join("a" * n + "b" * n for n in blocks)
        assert "".join(clock.order) == "aaaa" + "bbbb" + turns
        assert [len(block) for block in a] == [len(block) for block in b] == [5, 5, 2]
        np.testing.assert_allclose(np.concatenate(a), 0.004)
        np.testing.assert_allclose(np.concatenate(b), 0.002)

    def test_each_gets_its_seconds(self) -> None:
        clock = Clock()
        a, b = take_turns(
            [clock.program("a", 0.01), clock.program("b", 0.001)], seconds=0.5, clock=clock
        )
        assert sum(block.sum() for block in a) >= 0.5
        assert sum(block.sum() for block in b) >= 0.5

    def test_slow_programs_are_still_called_a_few_times(self) -> None:
        clock = Clock()
        (a,) = take_turns([clock.program("a", 60.0)], seconds=1, clock=clock)
        assert sum(map(len, a)) == FEWEST_CALLS

    def test_a_slow_minute_does_not_change_a_ratio(self) -> None:
        clock = Clock(pace=lambda now: 1.0 if now < 2 else 5.0)
        programs = [clock.program("a", 0.003), clock.program("b", 0.002)]
        a, b = take_turns(programs, seconds=10, clock=clock)
        ratio = Ratio.of(a, b)
        assert ratio.median == pytest.approx(1.5)
        assert ratio.low == pytest.approx(1.5)
        assert ratio.high == pytest.approx(1.5)
        # One after the other, the minute would have fallen on one of them.
        clock = Clock(pace=lambda now: 1.0 if now < 2 else 5.0)
        (first,) = take_turns([clock.program("a", 0.003)], seconds=1.5, clock=clock)
        (then,) = take_turns([clock.program("b", 0.002)], seconds=10, clock=clock)
        assert np.median(np.concatenate(first)) < np.median(np.concatenate(then))

    def test_an_interrupted_call_does_not_carry_a_round(self) -> None:
        steady = [np.ones(9) for _ in range(5)]
        hiccup = [np.where(np.arange(9) == at, 100.0, 2.0) for at in range(5)]
        assert Ratio.of(hiccup, steady) == Ratio(2.0, 2.0, 2.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    ccn, sm = (
        export_bundle(as_run(random_network("mnist-cnn", defense)), root / defense, gradient=False)
        for defense in ("ccn", "sm")
    )
    return ccn, sm


QUICK = ("--calls", "4", "--warm-up", "1", "--threads", "1")


class TestCommand:
    def test_two_bundles_are_compared(self, pair: tuple[Bundle, Bundle]) -> None:
        done = ccn_deploy("bench", *(b.path for b in pair), *QUICK, "--batch", "1,3", "--json")
        assert done.returncode == ExitCode.PASS, done.stderr
        document = json.loads(done.stdout)
        assert document["schema"] == "ccn-deploy/bench/1"
        assert document["data"] is None
        assert document["setting"] == {"threads": 1, "seconds": None, "calls": 4, "warm_up": 1}
        assert {name: n["digest"] for name, n in document["networks"].items()} == {
            bundle.card.defense: bundle.manifest.digest for bundle in pair
        }
        rows = [row for row in document["rows"] if row["runtime"] == "onnxruntime-cpu"]
        assert [(r["latency"]["batch"], r["network"], r["precision"]) for r in rows] == [
            (1, "ccn", "fp32"),
            (1, "sm", "fp32"),
            (3, "ccn", "fp32"),
            (3, "sm", "fp32"),
        ]
        for row in rows:
            latency = row["latency"]
            assert latency["calls"] == 4
            assert latency["p50"] > 0
            assert latency["p90"] is None
            assert latency["p99"] is None
            assert latency["images_per_second"] > 0
            assert (row["ratio"] is None) == (row["network"] == "ccn")
            assert row["graph"] == "graphs/forward-fp32.onnx"
        assert rows[1]["ratio"]["low"] <= rows[1]["ratio"]["median"] <= rows[1]["ratio"]["high"]
        assert document["versions"]["onnxruntime"] == onnxruntime.__version__

    def test_the_table_has_what_the_document_has(self, pair: tuple[Bundle, Bundle]) -> None:
        done = ccn_deploy(
            "bench", *(b.path for b in pair), *QUICK, "--batch", "2",
            "--runtime", "onnxruntime-cpu", "--runtime", "torch", COLUMNS="80",
        )  # fmt: skip
        assert done.returncode == ExitCode.PASS, done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 80 or "/tmp" in done.stdout
        rows = [line.split() for line in done.stdout.splitlines() if "-fp32" in line]
        assert [row[:3] for row in rows] == [
            ["onnxruntime-cpu-fp32", "ccn", "2"],
            ["onnxruntime-cpu-fp32", "sm", "2"],
            ["torch-fp32", "ccn", "2"],
            ["torch-fp32", "sm", "2"],
            ["onnxruntime-cpu-fp32", "sm", "2"],
            ["torch-fp32", "sm", "2"],
        ]

    def test_images_of_a_users_own_are_timed_and_said(
        self, pair: tuple[Bundle, Bundle], tmp_path: Path
    ) -> None:
        images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
        np.savez(tmp_path / "five.npz", images=images, labels=np.arange(5))
        request = ("bench", pair[0].path, *QUICK, "--runtime", "onnxruntime-cpu")
        given = (*request, "--dataset", tmp_path / "five.npz")
        done = ccn_deploy(*given, "--batch", "1,8")
        assert done.returncode == ExitCode.PASS, done.stderr
        assert "images: 5 of five.npz, test split, repeated to 8\n" in done.stdout
        assert "numbers" in done.stderr  # what else is to be known of the data
        data = json.loads(ccn_deploy(*given, "--batch", "2", "--json").stdout)["data"]
        own = load_dataset(tmp_path / "five.npz", "test", like=ModelInput((1, 28, 28)))
        assert data == own.identity
        noise = ccn_deploy(*request, "--batch", "2")
        assert "images: noise\n" in noise.stdout

    @pytest.mark.skipif(HAS_CUDA, reason="ONNX Runtime has a CUDA provider here")
    def test_what_does_not_work_here_is_listed_with_the_reason(
        self, pair: tuple[Bundle, Bundle]
    ) -> None:
        done = ccn_deploy("bench", pair[0].path, *QUICK, "--batch", "1")
        assert done.returncode == ExitCode.PASS, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("Not measured")]
        assert "onnxruntime-cuda-fp32 (ccn)" in line
        assert "onnxruntime-gpu" in line

    @pytest.mark.skipif(HAS_CUDA, reason="ONNX Runtime has a CUDA provider here")
    def test_a_runtime_that_was_named_is_measured_or_the_command_fails(
        self, pair: tuple[Bundle, Bundle]
    ) -> None:
        arguments = ("--runtime", "onnxruntime-cpu", "--runtime", "onnxruntime-cuda")
        assert_clear_error(
            ccn_deploy("bench", pair[0].path, *QUICK, *arguments),
            ExitCode.ENVIRONMENT,
            "onnxruntime-cuda",
        )

    def test_a_plot_names_what_it_shows(self, pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
        request = ("bench", *(b.path for b in pair), *QUICK, "--batch", "1", "--plot")
        assert ccn_deploy(*request, tmp_path / "p.png").returncode == ExitCode.PASS
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        assert ccn_deploy(*request, tmp_path / "p.svg").returncode == ExitCode.PASS
        svg = (tmp_path / "p.svg").read_text()
        for words in ("ccn, onnxruntime-cpu-fp32", "sm, onnxruntime-cpu-fp32", "in ms", "batch"):
            assert words in svg

    @pytest.mark.parametrize(
        ("arguments", "code", "word"),
        [
            (["--runtime", "onnxruntime_cpu"], ExitCode.USAGE, "Did you mean 'onnxruntime-cpu'"),
            (["--precision", "int8"], ExitCode.ENVIRONMENT, "in int8"),
            (["--batch", "1,x"], ExitCode.USAGE, "--batch is '1,x'"),
            (["--batch", "0"], ExitCode.USAGE, "at least 1"),
            (["--plot", "p.jpeg"], ExitCode.USAGE, ".svg"),
            (["--dataset", "cifar11"], ExitCode.USAGE, "cifar10"),
            (["--resize", "stretch"], ExitCode.USAGE, "--resize is for"),
            (["--data-dir", "."], ExitCode.USAGE, "--dataset NAME"),
        ],
    )
    def test_a_wrong_option_is_named(
        self, pair: tuple[Bundle, Bundle], arguments: list[str], code: ExitCode, word: str
    ) -> None:
        assert_clear_error(ccn_deploy("bench", pair[0].path, *arguments), code, word)

    def test_different_networks_are_not_compared(
        self, pair: tuple[Bundle, Bundle], tmp_path: Path
    ) -> None:
        run = as_run(random_network("vgg11-cifar10", "sm"))
        other = export_bundle(run, tmp_path / "vgg", gradient=False)
        assert_clear_error(
            ccn_deploy("bench", pair[0].path, other.path), ExitCode.USAGE, "vgg11-cifar10"
        )
        assert_clear_error(
            ccn_deploy("bench", pair[0].path, pair[0].path), ExitCode.USAGE, "given twice"
        )

    def test_a_damaged_bundle_is_not_measured(
        self, pair: tuple[Bundle, Bundle], tmp_path: Path
    ) -> None:
        bundle = shutil.copytree(pair[0].path, tmp_path / "copy")
        graph = bundle / "graphs/forward-fp32.onnx"
        data = bytearray(graph.read_bytes())
        data[len(data) // 2] ^= 1
        graph.write_bytes(data)
        assert_clear_error(ccn_deploy("bench", bundle), ExitCode.INTEGRITY, "forward-fp32")


class TestBench:
    def test_bundles_of_one_defense_go_by_their_directories(
        self, pair: tuple[Bundle, Bundle], tmp_path: Path
    ) -> None:
        run = as_run(random_network("mnist-cnn", "ccn"))
        other = export_bundle(run, tmp_path / "other", gradient=False)
        request = BenchRequest(("onnxruntime-cpu",), batches=(1,), threads=1, calls=1, warm_up=0)
        result = bench([pair[0], other], request)
        assert [row.network for row in result.rows] == ["ccn", "other"]

    def test_a_foreign_network_goes_by_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "cats.onnx").write_bytes(to_bytes(classifier()))
        source = open_source(str(tmp_path / "cats.onnx"))
        bundle = export_bundle(source, tmp_path / "bundle", gradient=False)
        request = BenchRequest(("onnxruntime-cpu",), batches=(1,), threads=1, calls=1, warm_up=0)
        assert [row.network for row in bench([bundle], request).rows] == ["cats"]

    def test_progress_counts_every_configuration(self, pair: tuple[Bundle, Bundle]) -> None:
        told = []
        request = BenchRequest(
            ("onnxruntime-cpu", "torch"), batches=(1, 2), threads=1, calls=1, warm_up=0
        )
        bench(pair, request, progress=lambda *what: told.append(what))
        assert told == [
            ("onnxruntime-cpu fp32, batch 1", 0, 4),
            ("onnxruntime-cpu fp32, batch 2", 1, 4),
            ("torch fp32, batch 1", 2, 4),
            ("torch fp32, batch 2", 3, 4),
            ("", 4, 4),
        ]

    def test_the_images_of_the_data_are_what_is_run(
        self, pair: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[NDArray[np.float32]] = []
        predict = Model.predict

        def watched(model: Model, images: NDArray[np.float32]) -> NDArray[np.float32]:
            seen.append(images)
            return predict(model, images)

        monkeypatch.setattr(Model, "predict", watched)
        images = np.random.default_rng(0).random((3, 1, 28, 28), np.float32)
        data = dataset_from_arrays("three", images, [0, 1, 2], class_names=tuple("0123456789"))
        request = BenchRequest(
            ("onnxruntime-cpu",), batches=(1, 5), threads=1, calls=1, warm_up=0, dataset=data
        )
        bench(pair[:1], request)
        first, second, third = data.order()
        assert any(np.array_equal(given, data.images([first])) for given in seen)
        np.testing.assert_array_equal(seen[-1], data.images([first, second, third, first, second]))

    def test_data_that_do_not_fit_are_refused(self, pair: tuple[Bundle, Bundle]) -> None:
        images = np.zeros((3, 3, 28, 28), np.uint8)
        data = dataset_from_arrays("colour", images, [0, 1, 2], class_names=tuple("0123456789"))
        with pytest.raises(UsageError, match="colour"):
            bench(pair[:1], BenchRequest(("onnxruntime-cpu",), dataset=data))

    def test_torch_is_measured_in_the_precision_that_was_named(
        self, pair: tuple[Bundle, Bundle]
    ) -> None:
        request = BenchRequest(("torch",), ("fp64",), (1,), threads=1, calls=1, warm_up=0)
        (row,) = bench(pair[:1], request).rows
        assert (row.runtime, row.precision, row.graph) == ("torch", "fp64", "")
        with pytest.raises(RuntimeUnavailableError, match="int8"):
            bench(pair[:1], BenchRequest(("torch",), ("int8",)))
