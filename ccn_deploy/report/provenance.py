"""Where the numbers come from: versions, machines, digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccn_deploy.bundle import Bundle
from ccn_deploy.report.view import Fact
from ccn_deploy.robustness import Evidence, Measurement
from ccn_deploy.storage import sha256_file


def provenance(bundle: Bundle, measurements: Sequence[Measurement]) -> list[Fact]:
    """Return how the numbers came about; measurements are of the same images."""
    card, first = bundle.card, measurements[0]
    dataset = first.dataset
    headers = [evidence.header for evidence in _evidence(measurements)]
    versions = {
        name: version
        for header in headers
        for name, version in header.get("versions", {}).items()
        if version
    }
    machines = dict.fromkeys(header["machine"] for header in headers if "machine" in header)
    gpus = dict.fromkeys(header["gpu"]["name"] for header in headers if header.get("gpu"))
    sources = {m.precision: m.gradient_source for m in measurements}
    alike = len(set(sources.values())) == 1
    gradients = [sources[first.precision]] if alike else [f"{p}: {s}" for p, s in sources.items()]
    facts = [
        Fact("Network", card.title),
        *(Fact(topic.capitalize(), text) for topic, text in card.source.told().items()),
        Fact("Training", _training(card.training)),
        Fact("Data", f"{dataset['name']}, {dataset['split']} split"),
        Fact(
            "Selection",
            f"the first {first.n} images of the permutation with seed {first.seed}",
        ),
        Fact("Gradients", f"{'; '.join(gradients)}; every verdict is the runtime's own"),
        Fact(
            "Versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        ),
        Fact("Machine", ", ".join([*machines, *gpus])),
        Fact("Manifest", bundle.manifest.digest, code=True),
    ]
    return [fact for fact in facts if fact.value]


def digests(bundle: Bundle, measurements: Sequence[Measurement]) -> list[Fact]:
    """Return the digests of the bundle's files, the data, and every evidence file."""
    found = [Fact(record.path, record.sha256, code=True) for record in bundle.manifest.files]
    data = measurements[0].dataset
    found.append(Fact(f"{data['name']}, {data['split']} split", data["digest"], code=True))
    for evidence in _evidence(measurements):
        if evidence.path is not None and evidence.path.is_file():
            inside = evidence.path.is_relative_to(bundle.path)
            name = evidence.path.relative_to(bundle.path) if inside else evidence.path.name
            found.append(Fact(str(name), sha256_file(evidence.path), code=True))
    return list(dict.fromkeys(found))


def _evidence(measurements: Sequence[Measurement]) -> list[Evidence]:
    pairs = [pair for measurement in measurements for pair in measurement.pairs]
    return [evidence for pair in pairs for evidence in (pair.reference, pair.runtime)]


def _training(training: Mapping[str, Any]) -> str:
    """Return what the manifest says of the training, on a line; digests stand elsewhere."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in training.items()
        if isinstance(value, str | int | float) and not name.endswith("digest")
    )
