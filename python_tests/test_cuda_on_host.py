"""The CUDA kernels, run on the CPU by csrc/cuda_on_host; and that harness itself, with bugs planted for it to catch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "csrc" / "cuda_on_host"
MODES = ("plain", "asan", "race")
SELF_TESTS = ("self_test_memory", "self_test_async")
KERNEL_TESTS = ("test_pixel_shuffle", "test_normalized_shuffle")

# case: what each build must say about the planted bug (a build that is not named need not catch it)
RACE = "races were found"
ASAN = "AddressSanitizer"
EVERYWHERE = dict.fromkeys(MODES, "FAIL")
MEMORY_BUGS = {
    "missing_barrier": {"plain": "element", "asan": "element", "race": RACE},
    "missing_second_barrier": {"plain": "element", "asan": "element", "race": RACE},
    "global_out_of_bounds": {"asan": ASAN},
    "static_shared_out_of_bounds": {"asan": ASAN},
    "dynamic_shared_out_of_bounds": {"asan": ASAN},
    "misaligned_raw_vector": {"asan": "misaligned address"},
    "misaligned_vector": dict.fromkeys(MODES, "is not aligned to 16 bytes"),
    "divergent_shuffle": dict.fromkeys(MODES, "divergent warp"),
    "divergent_ldmatrix": dict.fromkeys(MODES, "divergent warp"),
    "deadlock": dict.fromkeys(MODES, "threads 0-63 wait at barrier 1"),
    "unwritten_output": EVERYWHERE,
    "unset_shared": EVERYWHERE,
    "blocks_write_one_place": {"race": RACE},
    "missing_threadfence": {"race": RACE},
    "plain_beside_atomic": {"race": RACE},
    "endless_spin": dict.fromkeys(MODES, "spins until another block has run"),
}
ASYNC_BUGS = {
    "wait_count": EVERYWHERE,
    "no_barrier_after_wait": {"plain": "element", "asan": "element", "race": RACE},
    "misaligned_copy": dict.fromkeys(MODES, "cp.async: misaligned 16-byte copy"),
    "wrong_parity": EVERYWHERE,
    "wrong_transaction_bytes": EVERYWHERE,
    "missing_proxy_fence": {"race": RACE},
    "missing_empty_wait": EVERYWHERE,
    "missing_wgmma_wait": EVERYWHERE,
    "missing_wgmma_fence": dict.fromkeys(MODES, "no wgmma.fence"),
    "missing_mbarrier_fence": dict.fromkeys(MODES, "made the mbarrier visible"),
    "missing_store_wait": dict.fromkeys(MODES, "without having waited for its TMA stores"),
}
PLANTED = [
    (program, case, mode, message)
    for program, bugs in zip(SELF_TESTS, (MEMORY_BUGS, ASYNC_BUGS), strict=True)
    for case, modes in bugs.items()
    for mode, message in modes.items()
]

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64" or "VICO_SANITIZED" in os.environ,
    reason="cuda_on_host needs g++ on x86-64, and an environment that preloads no sanitizer",
)


def build(mode: str, *programs: str) -> Path:
    done = subprocess.run(["sh", HARNESS / "build.sh", mode, *programs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ROOT / "build" / "cuda_on_host" / mode


@pytest.fixture(scope="session")
def built() -> dict[str, Path]:
    if not (HARNESS / "build.sh").exists():
        pytest.skip("the sources of cuda_on_host are not here")
    return {mode: build(mode, *SELF_TESTS, *KERNEL_TESTS) for mode in MODES}


def run(folder: Path, program: str, *arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [folder / program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("program", "case", "mode", "message"), PLANTED)
def test_planted_bug_is_caught(built: dict[str, Path], program: str, case: str, mode: str, message: str) -> None:
    code, output = run(built[mode], program, "--planted", "--seeds", "10", case)
    assert code != 0, "the bug went unnoticed"
    assert message in output


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("program", SELF_TESTS)
def test_no_false_alarm(built: dict[str, Path], program: str, mode: str) -> None:
    code, output = run(built[mode], program, "--seeds", "10")
    assert code == 0, output
    bugs = MEMORY_BUGS if program == SELF_TESTS[0] else ASYNC_BUGS
    assert output.count("ok ") == len(bugs), "a case has no entry in the tables above, or an entry no case"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("program", KERNEL_TESTS)
def test_kernels(built: dict[str, Path], program: str, mode: str) -> None:
    code, output = run(built[mode], program, "--seeds", "10" if mode == "plain" else "1")
    assert code == 0, output


@pytest.mark.parametrize("schedule", ["fifo", "reverse", "random"])
@pytest.mark.parametrize("program", KERNEL_TESTS)
def test_kernels_under_other_schedules(built: dict[str, Path], program: str, schedule: str) -> None:
    code, output = run(built["plain"], program, VICO_COH_SCHEDULE=schedule)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_compiles_every_kernel(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    command = [nvcc, "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}"]
    command += ["-c", str(HARNESS / "tests" / "compile_kernels.cu"), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
