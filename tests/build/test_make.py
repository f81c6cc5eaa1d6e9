"""Whole builds by the real command line in processes of its own: the contract, resuming, and what can go wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.export.synth import synthesize
from fluxkiln.files import digest_file
from tests.ran import Run

ROOT = Path(__file__).resolve().parents[2]
# Generous: a hanging build must fail the test, a busy machine must not.
PATIENCE = 600
# Kinds whose compiles are taken from a copied store, so that there is something to interrupt.
FORGOTTEN = ("tail", "t5_final")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fluxkiln", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLUXKILN_STORE")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **changes}


def fluxkiln(*arguments: object, **variables: str) -> Run:
    """Run a command to its end."""
    done = subprocess.run(
        command(*arguments), env=environment(**variables), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return Run(done.returncode, done.stdout, done.stderr)


def build(target: str, folder: Path, *arguments: object, **variables: str) -> Run:
    """Build into `folder` with `--json`, which never speaks for people on stdout."""
    return fluxkiln("build", target, *of_model(arguments), "--build-dir", folder, "--json", **variables)


def of_model(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """The arguments; those of tiny-dev where they name no model."""
    return arguments if "--model" in arguments else ("--model", "tiny-dev", *arguments)


@contextmanager
def started(*arguments: object, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs in the background, its output in `folder`; gone at the end, whatever happens."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(command(*arguments), env=environment(), stdout=out, stderr=err)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes], what: str) -> Any:
    """Poll until `found` says something; fail when the process ends first."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if value := found():
            return value
        assert process.poll() is None, f"it ended with {process.returncode} before {what}"
        time.sleep(0.01)
    raise AssertionError(f"no {what}")


def compilers_of(process: subprocess.Popen[bytes], name: str = "") -> list[psutil.Process]:
    """Running tools of a build, and what they started; a build without verification starts nothing else."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            # A shell that starts the tool has its name in an argument.
            if name in (child.name() if name.startswith("tpuc") else " ".join(child.cmdline())):
                found.append(child)
    return found


def stopped(processes: list[psutil.Process]) -> psutil.Process | None:
    """One of them, halted: one that has just ended cannot be killed in the middle."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
            time.sleep(0.02)
            if process.status() == psutil.STATUS_STOPPED:
                return process
    return None


def processes_below(folder: Path) -> list[str]:
    """Command lines of processes that work below `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def records(store: Path) -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_bytes()) for path in (store / "actions").glob("*.json")}


def compiles(store: Path) -> int:
    """How many graphs the compiler has finished."""
    return sum(record["stage"] in ("mould", "compile") for record in records(store).values())


def misses(run: Run) -> dict[str, int]:
    """Stage -> jobs that ran, stages without any left out."""
    stages = run.document["cache"]["stages"]
    return {stage: counts["misses"] for stage, counts in stages.items() if counts["misses"]}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """One folder for builds that share a store."""
    return tmp_path_factory.mktemp("builds")


@pytest.fixture(scope="session")
def verified(world) -> Run:
    """A fully verified build of tiny-dev for BM1684X, the only one; it fills the store."""
    run = build("bm1684x", world / "verified", "--store", world / "store")
    assert run.code == 0, run.err
    return run


@pytest.fixture(scope="session")
def undisturbed(verified, world) -> Run:
    """The same without verification, from the store."""
    run = build("bm1684x", world / "undisturbed", "--store", world / "store", "--no-verify")
    assert run.code == 0, run.err
    return run


@pytest.fixture
def unfinished(undisturbed, world, tmp_path) -> Path:
    """A copy of the store that lacks the compiles of two kinds and all that came after."""
    store = tmp_path / "store"
    shutil.copytree(world / "store", store, copy_function=os.link)
    for path, record in records(store).items():
        kind = record["settings"].get("net", "").removesuffix("_00")
        if record["stage"] in ("cast", "file", "proof", "combine", "build") or kind in FORGOTTEN:
            path.unlink()
    return store


@pytest.mark.tpu_mlir
@pytest.mark.slow
def test_output_contract(verified, world):
    document = verified.document
    folder = world / "verified" / "bm1684x" / document["name"]
    assert document["bundle"] == str(folder / "bundle")
    assert document["report"] == str(folder / "report.html")
    assert left_in(folder) == {"bundle", "report.json", "report.html", "logs", "recording"}
    assert (document["nothing_to_do"], document["parity"]["passed"]) == (False, True)
    assert {"patched", "onnxruntime", "simulator"} <= set(document["parity"]["rungs"])
    manifest = read_bundle(folder / "bundle").manifest
    files = {file.path: file.role for file in manifest.files}
    assert {name for name in files if name.endswith(".bmodel")} == {
        "text_encoder.bmodel", "text_encoder_2.bmodel", "modulation.bmodel", "transformer.bmodel",
        "vae_decoder.bmodel",
    }  # fmt: skip
    assert files["host/constants.safetensors"] == "constants"
    assert files["LICENSE"] == "licence"
    report = json.loads((folder / "report.json").read_text())
    assert report["verdict"]["passed"] is True
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "nothing is loaded from elsewhere"
    assert (folder / "logs" / "mould.double_modulated.0.log").is_file()
    assert "truncated" not in verified.err


@pytest.mark.tpu_mlir
def test_every_mould_is_proven_when_it_is_made(verified, world):
    made = [made for made in verified.document["parts"].values() if made == "cast, compiled: identical"]
    proofs = [record for record in records(world / "store").values() if record["stage"] == "proof"]
    kinds = {entry["kind"] for entry in json.loads(Path(verified.document["manifest"]).read_text())["parts"]}
    assert len(made) == len(proofs) == len(kinds)
    assert misses(verified)["mould"] == misses(verified)["compile"] == len(kinds)


@pytest.mark.tpu_mlir
def test_proof_is_repeated_when_asked_for(undisturbed, world):
    arguments = ("bm1684x", world / "undisturbed", "--store", world / "store", "--no-verify")
    assert set(undisturbed.document["parts"].values()) == {"cast"}, "proven when the moulds were made"
    run = build(*arguments, "--prove")
    assert run.code == 0, run.err
    assert list(run.document["parts"].values()).count("cast, compiled: identical") == 13
    assert (run.document["compiler_runs"], run.document["nothing_to_do"]) == (0, False)
    assert run.document["digest"] == undisturbed.document["digest"]


@pytest.mark.tpu_mlir
def test_second_run_does_nothing(verified, world):
    logs = world / "verified" / "bm1684x" / verified.document["name"] / "logs"
    before = {path: path.stat().st_mtime_ns for path in [*logs.iterdir(), *records(world / "store")]}
    assert before
    again = build("bm1684x", world / "verified", "--store", world / "store")
    assert again.code == 0, again.err
    assert again.err == ""
    document = again.document
    assert (document["nothing_to_do"], document["compiler_runs"], misses(again)) == (True, 0, {})
    assert document["digest"] == verified.document["digest"]
    assert {path: path.stat().st_mtime_ns for path in [*logs.iterdir(), *records(world / "store")]} == before


@pytest.mark.tpu_mlir
def test_damaged_bundle_is_made_again_from_the_store(undisturbed, world):
    path = Path(undisturbed.document["bundle"]) / "configs.json"
    path.unlink()
    again = build("bm1684x", world / "undisturbed", "--store", world / "store", "--no-verify")
    assert again.code == 0, again.err
    assert (again.document["nothing_to_do"], again.document["compiler_runs"]) == (False, 0)
    assert again.document["digest"] == undisturbed.document["digest"]
    assert path.is_file()


@pytest.mark.tpu_mlir
@pytest.mark.slow
def test_another_checkpoint_is_cast(verified, world):
    model = synthesize("tiny-dev", world / "other" / "tiny-dev", seed=1)
    run = build("bm1684x", world / "cast", "--store", world / "store", "--model", model, "--no-verify")
    assert run.code == 0, run.err
    parts = run.document["parts"]
    assert set(parts.values()) == {"cast"}
    assert misses(run) == {"cast": len(parts), "file": 5}
    assert "every part was cast from a mould of the store, without a compiler" in run.err
    assert run.document["compiler_runs"] == 0
    assert run.document["digest"] != verified.document["digest"]


@pytest.mark.tpu_mlir
def test_one_changed_tensor_recasts_one_part(undisturbed, world):
    model = synthesize("tiny-dev", world / "changed" / "tiny-dev")
    flip_bit(model, "transformer", "transformer_blocks.1.attn.to_q.weight")
    run = build("bm1684x", world / "changed-build", "--store", world / "store", "--model", model, "--no-verify")
    assert run.code == 0, run.err
    assert misses(run) == {"cast": 1, "file": 1}


@pytest.mark.tpu_mlir
def test_plan_knows_what_the_store_has(undisturbed, world):
    arguments = (
        "plan",
        "bm1684x",
        "--model",
        "tiny-dev",
        "--build-dir",
        world / "undisturbed",
        "--store",
        world / "store",
        "--json",
    )
    done = fluxkiln(*arguments, "--no-verify").document
    assert (done["totals"]["to_do"], done["totals"]["disk_bytes"], done["seconds"]["now"]) == (0, 0, 0)
    other = fluxkiln(*arguments, "--scheme", "BF16").document
    stored = {stage: [job["in_store"] for job in other["jobs"] if job["stage"] == stage] for stage in stages(other)}
    assert all(stored["template"]), "a scheme shares every template"
    of_blocks = {f"mould {kind}" for kind in ("t5_block", "double_modulated", "single_modulated")}
    blocks = [job["in_store"] for job in other["jobs"] if job["what"] in of_blocks]
    assert blocks == [False] * 3, "but no block's mould"
    assert other["totals"]["to_do"] == sum(not job["in_store"] for job in other["jobs"])
    assert other["totals"]["memory_peak_bytes"] > 1e9


def stages(plan: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(job["stage"] for job in plan["jobs"]))


def finish(unfinished: Path, folder: Path, undisturbed: Run) -> Run:
    """The same command again; the result must be that of a build that nobody disturbed."""
    before = {path: path.stat().st_mtime_ns for path in records(unfinished)}
    run = build("bm1684x", folder, "--store", unfinished, "--no-verify")
    assert run.code == 0, run.err
    assert run.document["digest"] == undisturbed.document["digest"]
    assert read_bundle(Path(run.document["bundle"]))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished is not made again"
    assert left_in(unfinished / "tmp") == set()
    assert not list((folder / "bm1684x").rglob("*.partial"))
    return run


def first_compiler(process: subprocess.Popen[bytes], store: Path) -> Any:
    return compilers_of(process)


def first_record(process: subprocess.Popen[bytes], store: Path) -> Any:
    return any(record["what"].startswith(("tail_00", "t5_final_00")) for record in records(store).values())


def bundle_in_progress(process: subprocess.Popen[bytes], store: Path) -> Any:
    return list(store.parent.glob("build/bm1684x/*/.bundle.*.partial"))


@pytest.mark.tpu_mlir
@pytest.mark.slow
@pytest.mark.parametrize("moment", [first_compiler, first_record, bundle_in_progress])
def test_kill_9_and_the_same_command_again(unfinished, undisturbed, tmp_path, moment):
    folder = tmp_path / "build"
    arguments = ("build", "bm1684x", "--model", "tiny-dev", "--build-dir", folder, "--store", unfinished, "--no-verify")
    before = compiles(unfinished)
    with started(*arguments, folder=tmp_path) as process:
        wait_for(lambda: moment(process, unfinished), process, moment.__name__)
        process.send_signal(signal.SIGKILL)
        process.wait()
    made = compiles(unfinished) - before
    ran = misses(finish(unfinished, folder, undisturbed))
    # Two moulds and the parts that prove them: each of them once, before the kill or after it.
    assert made + ran.get("mould", 0) + ran.get("compile", 0) == 4
    if moment is not first_compiler:
        assert made


@pytest.mark.tpu_mlir
@pytest.mark.slow
def test_interrupt_stops_compilers_and_resumes(unfinished, undisturbed, tmp_path):
    folder = tmp_path / "build"
    arguments = ("build", "bm1684x", "--model", "tiny-dev", "--build-dir", folder, "--store", unfinished, "--no-verify")
    with started(*arguments, folder=tmp_path) as process:
        wait_for(lambda: compilers_of(process), process, "compiler")
        # Meanwhile the same build cannot be started again.
        second = build("bm1684x", folder, "--store", unfinished, "--no-verify")
        assert second.code == 1
        assert f"is being built by process {process.pid} since" in second.error
        assert second.document["error"]["kind"] == "ResourceError"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    assert (tmp_path / "err").read_text().splitlines()[-1].startswith("error: interrupted; finished work is kept")
    assert processes_below(unfinished) == []
    assert left_in(unfinished / "tmp") == set()
    finish(unfinished, folder, undisturbed)


@pytest.mark.tpu_mlir
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["tpuc-opt", "model_deploy"])
def test_compiler_killed_for_memory(unfinished, undisturbed, tmp_path, tool):
    folder = tmp_path / "build"
    arguments = (
        "build",
        "bm1684x",
        "--model",
        "tiny-dev",
        "--build-dir",
        folder,
        "--store",
        unfinished,
        "--no-verify",
        "--jobs",
        "1",
    )
    with started(*arguments, folder=tmp_path) as process:
        wait_for(lambda: stopped(compilers_of(process, tool)), process, tool).kill()
        assert process.wait(PATIENCE) == 1
    run = Run(1, "", (tmp_path / "err").read_text())
    assert "was killed (signal 9), which is how the system ends a process when memory runs out" in run.error
    assert processes_below(unfinished) == []
    finish(unfinished, folder, undisturbed)


@pytest.fixture(scope="session")
def linked(world, tiny_checkpoint) -> Run:
    """An ONNX Runtime build without verification: no compiler, a few seconds."""
    run = build("cpu", world / "linked", "--model", tiny_checkpoint().root, "--no-verify")
    assert run.code == 0, run.err
    return run


def test_build_without_a_compiler(linked, tiny_checkpoint, world):
    document = linked.document
    assert (document["compiler_runs"], document["report"], document["nothing_to_do"]) == (0, None, False)
    manifest = read_bundle(Path(document["bundle"])).manifest
    assert {part.file for part in manifest.parts} == {f"onnx/{name}.onnx" for name in document["parts"]}
    again = build("cpu", world / "linked", "--model", tiny_checkpoint().root, "--no-verify")
    assert again.code == 0
    assert again.document["nothing_to_do"] is True
    assert (again.document["digest"], misses(again), again.err) == (document["digest"], {}, "")


FULL_DISK = """
mount -t tmpfs -o size=$SIZE tmpfs "$DISK" || exit 77
"$@" --build-dir "$DISK/build" > "$LOGS/out" 2> "$LOGS/err" & pid=$!
if [ -n "$FILL" ]; then
    while kill -0 $pid 2> /dev/null && [ "$(ls "$DISK/build/store/actions" 2> /dev/null | wc -l)" -lt 3 ]; do
        sleep 0.02
    done
    cat /dev/zero > "$DISK/filler" 2> /dev/null
fi
wait $pid; echo $? > "$LOGS/code"
rm -f "$DISK/filler"
(cd "$DISK/build" && find . ! -path './store/blobs/*' ! -path './store/actions/*') > "$LOGS/left"
[ -z "$FILL" ] || "$@" --build-dir "$DISK/build" > "$LOGS/again" 2> "$LOGS/again.err"
"""


@pytest.mark.parametrize(("size", "fill"), [("30m", ""), ("300m", "yes")], ids=["small", "filled meanwhile"])
def test_full_disk(linked, tiny_checkpoint, tmp_path, size, fill):
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("a small disk of its own needs root and unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    line = command("build", "cpu", "--model", tiny_checkpoint().root, "--no-verify", "--json")
    places = {"DISK": str(disk), "LOGS": str(tmp_path), "SIZE": size, "FILL": fill}
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", FULL_DISK, "bash", *line],
        env=environment(**places),
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode in (1, 77) and not (tmp_path / "code").exists():
        pytest.skip("mounting is not allowed here")
    run = Run(int((tmp_path / "code").read_text()), (tmp_path / "out").read_text(), (tmp_path / "err").read_text())
    assert run.code == 1
    assert run.document["error"]["kind"] == "ResourceError"
    wanted = "No space left on device|the disk is full" if fill else "0.03 GB are free, this build needs about 0.0"
    assert re.search(wanted, run.error)
    left = (tmp_path / "left").read_text().split()
    assert not [path for path in left if "partial" in path or path.startswith(("./store/tmp/", "./cpu/"))]
    if fill:
        assert json.loads((tmp_path / "again").read_text())["digest"] == linked.document["digest"]


def flip_bit(model: Path, component: str, tensor: str) -> None:
    """Change the last bit of one weight."""
    from fluxkiln.export.checkpoint import open_checkpoint

    ref = open_checkpoint(model).tensors[component][tensor]
    with ref.file.open("r+b") as file:
        file.seek(ref.offset)
        byte = file.read(1)
        file.seek(ref.offset)
        file.write(bytes([byte[0] ^ 1]))
    assert digest_file(ref.file)
