"""The CUDA kernels, run on the CPU by csrc/cuda_on_host; and that harness itself, with bugs planted for it to catch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "csrc" / "cuda_on_host"
MODES = ("plain", "asan", "race")
SELF_TESTS = ("self_test_memory", "self_test_async")
KERNEL_TESTS = sorted(source.stem for source in (HARNESS / "tests").glob("test_*.cpp"))

# case: what each build must say about the planted bug (a build that is not named need not catch it)
RACE = "race: "
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
BUGS = dict(zip(SELF_TESTS, (MEMORY_BUGS, ASYNC_BUGS), strict=True))


@dataclass(frozen=True)
class Run:
    """One run of one program: what the tests below are made of."""

    program: str
    mode: str
    arguments: tuple[str, ...] = ()
    schedule: str = "pct"

    def __str__(self) -> str:
        return "-".join((self.program, self.mode, *self.arguments, self.schedule))


Outcomes = Mapping[Run, Future[tuple[int, str]]]
PLANTED = [
    (Run(program, mode, ("--planted", "--seeds", "10", case)), message)
    for program, bugs in BUGS.items()
    for case, modes in bugs.items()
    for mode, message in modes.items()
]
CLEAN = [Run(program, mode, ("--seeds", "10")) for program in SELF_TESTS for mode in MODES]
KERNELS = [
    Run(program, mode, ("--seeds", "10" if mode == "plain" else "1")) for program in KERNEL_TESTS for mode in MODES
] + [Run(program, "plain", (), schedule) for program in KERNEL_TESTS for schedule in ("fifo", "reverse", "random")]

pytestmark = [
    pytest.mark.skipif(not (HARNESS / "build.sh").exists(), reason="the sources of cuda_on_host are not here"),
    pytest.mark.skipif(
        shutil.which("g++") is None or shutil.which("make") is None or platform.machine() != "x86_64",
        reason="cuda_on_host needs make and g++ on x86-64",
    ),
    pytest.mark.skipif("VICO_SANITIZED" in os.environ, reason="this environment preloads a sanitizer"),
]


def execute(run: Run) -> tuple[int, str]:
    done = subprocess.run(
        [ROOT / "build" / "cuda_on_host" / run.mode / run.program, *run.arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "VICO_COH_SCHEDULE": run.schedule},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    """Builds what the selected tests of this file need, and has all of their runs under way on every core."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    runs = sorted(
        {c["run"] for c in calls if isinstance(c.get("run"), Run)}, key=lambda r: (r.program, r.mode != "race")
    )
    modes = ",".join(sorted({r.mode for r in runs}))
    command = ["sh", str(HARNESS / "build.sh"), modes, *sorted({r.program for r in runs})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {run: pool.submit(execute, run) for run in runs}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("run", "message"), PLANTED, ids=str)
def test_planted_bug_is_caught(outcomes: Outcomes, run: Run, message: str) -> None:
    code, output = outcomes[run].result()
    assert code != 0, "the bug went unnoticed"
    assert message in output


@pytest.mark.parametrize("run", CLEAN, ids=str)
def test_no_false_alarm(outcomes: Outcomes, run: Run) -> None:
    code, output = outcomes[run].result()
    assert code == 0, output
    assert output.count("ok ") == len(BUGS[run.program]), "a case without an entry in the tables above, or the reverse"


@pytest.mark.parametrize("run", KERNELS, ids=str)
def test_kernels(outcomes: Outcomes, run: Run) -> None:
    code, output = outcomes[run].result()
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
