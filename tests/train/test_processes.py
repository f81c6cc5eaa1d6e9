"""Trainings as processes: two equal one, killed ones go on; by torchrun and `kill -9`."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytestmark = [pytest.mark.thorough, pytest.mark.slow]
ALONE = (sys.executable,)
TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29571")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("processes")
    pictures = made / "pictures"
    pictures.mkdir()
    chance, lines = np.random.default_rng(0), []
    for number in range(3):
        Image.fromarray(chance.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": f"a photo of sks kiln {number}"}))
    (pictures / "train.jsonl").write_text("\n".join(lines) + "\n")
    return made


def start(folder, launcher, output, iterations, accumulate, every=50):
    command = [
        *launcher, "-m", "fluxkiln", "train", "lora", "tiny-dev", str(folder / "pictures"), "--json",
        "--iterations", str(iterations), "--grad-accumulate", str(accumulate), "--checkpoint-every", str(every),
        "--warmup-steps", "1", "--learning-rate", "1e-3", "--output-dir", str(folder / output),
        "--build-dir", str(folder / "build"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=900)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def train(folder, launcher, output, iterations, accumulate):
    code, out, err = finish(start(folder, launcher, output, iterations, accumulate))
    assert code == 0, err
    return json.loads(out[out.index("{") :])


def adapters(folder, output):
    return load_file(folder / output / "adapters.safetensors")


@pytest.fixture(scope="module")
def alone(folder):
    return train(folder, ALONE, "alone", 32, 4)


def test_two_processes_equal_one(folder, alone):
    both = train(folder, TWO, "both", 16, 2)
    assert both["processes"] == 2
    assert alone["processes"] == 1
    assert len(both["losses"]) == len(alone["losses"])
    # the same numbers, summed in another order
    np.testing.assert_allclose(both["losses"], alone["losses"], rtol=0, atol=1e-4)
    one, other = adapters(folder, "alone"), adapters(folder, "both")
    assert one.keys() == other.keys()
    assert max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name) > 3e-3
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-3)


def wait_for_state(process, folder, output):
    """Until a state is on disk."""
    deadline = time.monotonic() + 600
    while not any((folder / output / "state").glob("[0-9]*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_training_goes_on_to_the_same_bytes(folder, alone):
    process = start(folder, ALONE, "killed", 32, 4, every=4)
    wait_for_state(process, folder, "killed")
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    again = start(folder, ALONE, "killed", 32, 4, every=4)
    code, out, err = finish(again)
    assert code == 0, err
    document = json.loads(out)
    assert 0 < document["resumed_after"] < 32
    assert document["losses"] == alone["losses"]
    for name, value in adapters(folder, "alone").items():
        assert torch.equal(adapters(folder, "killed")[name], value)


def test_one_killed_process_of_two_ends_the_other_and_both_go_on(folder, alone):
    process = start(folder, TWO, "half", 16, 2, every=2)
    wait_for_state(process, folder, "half")
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if "lora" in one.cmdline()]
    workers[-1].kill()
    code, _, err = finish(process)
    assert code != 0
    assert "error: " in err
    document = train(folder, TWO, "half", 16, 2)
    assert document["resumed_after"] > 0
    np.testing.assert_allclose(document["losses"], alone["losses"], rtol=0, atol=1e-4)
