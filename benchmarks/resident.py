"""The memory of a process that answers batches: by ``ccn_deploy.load``, or by a bare session.

A program of its own, which imports what such a process would import and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

GRAPH = "graphs/forward-fp32.onnx"


def main(how: str, bundle: str, *shape: str) -> int:
    """Answer five batches of ``shape`` on one thread and return what is held then, in KiB."""
    images = np.zeros([int(size) for size in shape], np.float32)
    if how == "load":
        import ccn_deploy
        from ccn_deploy.runtimes import RuntimeOptions

        predict = ccn_deploy.load(bundle, options=RuntimeOptions(threads=1)).predict
        for _ in range(5):
            predict(images)
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            f"{bundle}/{GRAPH}", options, providers=["CPUExecutionProvider"]
        )
        for _ in range(5):
            session.run(["logits"], {"images": images})
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
