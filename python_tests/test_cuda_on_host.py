"""The CUDA kernels, run on the CPU by csrc/cuda_on_host; and that harness itself, with bugs planted for it to catch."""

from __future__ import annotations

import os
import platform
import re
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

# case: what each build must say about the planted bug, as a regular expression; a build that is not named need not
# catch it
RACE = "race: "
ASAN = "AddressSanitizer"
MEMORY_BUGS = {
    "missing_barrier": {"plain": "element", "asan": "element", "race": RACE},
    "missing_second_barrier": {"plain": "element", "asan": "element", "race": RACE},
    "global_out_of_bounds": {"asan": ASAN},
    "static_shared_out_of_bounds": {"asan": ASAN},
    "dynamic_shared_out_of_bounds": {"asan": ASAN},
    "misaligned_raw_vector": {"asan": "misaligned address"},
    "misaligned_vector": dict.fromkeys(MODES, "is not aligned to 16 bytes"),
    "misaligned_static_shared": dict.fromkeys(MODES, "is not aligned to 16 bytes"),
    "divergent_shuffle": dict.fromkeys(MODES, "divergent warp"),
    "divergent_ldmatrix": dict.fromkeys(MODES, "divergent warp"),
    "deadlock": dict.fromkeys(MODES, "threads 0-63 wait at mbarrier parity 0"),
    "unwritten_output": dict.fromkeys(MODES, r"element 127 is -?nan"),
    "early_kernel_does_not_wait": dict.fromkeys(MODES, "1 of 128 threads of a kernel that was launched early"),
    "unset_shared": dict.fromkeys(MODES, r"element 0 is -?nan"),
    "blocks_write_one_place": {"race": RACE},
    "threads_write_one_byte": {"race": RACE},
    "missing_threadfence": {"race": RACE},
    "plain_beside_atomic": {"race": RACE},
    "endless_spin": dict.fromkeys(MODES, "spins until another block has run"),
}
ASYNC_BUGS = {
    "wait_count": dict.fromkeys(MODES, r"element \(0, 0\) is -?nan"),
    "no_barrier_after_wait": {"plain": "element", "asan": "element", "race": RACE},
    "misaligned_copy": dict.fromkeys(MODES, "cp.async: misaligned 16-byte copy"),
    "wrong_parity": dict.fromkeys(MODES, "deadlock in block .* wait at mbarrier parity 1"),
    "wrong_transaction_bytes": {
        "plain": "bytes still expected by a mbarrier",
        "asan": "bytes still expected by a mbarrier",
        "race": RACE,
    },
    "missing_proxy_fence": {"race": RACE},
    "missing_empty_wait": dict.fromkeys(MODES, "more arrivals in a phase than the count"),
    "missing_wgmma_wait": {"plain": "element", "asan": "element", "race": RACE},
    "missing_wgmma_fence": dict.fromkeys(MODES, "no wgmma.fence"),
    "missing_mbarrier_fence": dict.fromkeys(MODES, "made the mbarrier visible"),
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

needs_harness = [
    pytest.mark.skipif(not (HARNESS / "build.sh").exists(), reason="the sources of cuda_on_host are not here"),
    pytest.mark.skipif(
        shutil.which("g++") is None or shutil.which("make") is None or platform.machine() != "x86_64",
        reason="cuda_on_host needs make and g++ on x86-64",
    ),
    pytest.mark.skipif("VICO_SANITIZED" in os.environ, reason="this environment preloads a sanitizer"),
]
pytestmark = needs_harness


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
    wanted = {run for call in calls for run in (call.get("run"), *call.get("runs", ())) if isinstance(run, Run)}
    runs = sorted(wanted, key=lambda r: (r.program in SELF_TESTS, r.mode != "race"))  # the longest first
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
    assert re.search(message, output), output


@pytest.mark.parametrize("run", CLEAN, ids=str)
def test_no_false_alarm(outcomes: Outcomes, run: Run) -> None:
    code, output = outcomes[run].result()
    assert code == 0, output
    cases = set(re.findall(r"^ok +(\w+)", output, re.MULTILINE))
    assert cases == set(BUGS[run.program]), "a case without an entry in the tables above, or the reverse"


@pytest.mark.parametrize("run", KERNELS, ids=str)
def test_kernels(outcomes: Outcomes, run: Run) -> None:
    code, output = outcomes[run].result()
    assert code == 0, output


def launched_kernels(program: str, output: str) -> set[str]:
    """Names of the kernels whose addresses a run of the plain build has listed."""
    addresses = {int(a, 16) for a in re.findall(r"^kernel (0x[0-9a-f]+)", output, re.MULTILINE)}
    binary = ROOT / "build" / "cuda_on_host" / "plain" / program
    symbols = subprocess.run(["nm", "-C", binary], capture_output=True, text=True, check=True).stdout
    found = (line.split(maxsplit=2) for line in symbols.splitlines() if line[:1] != " ")
    names = (n[2].replace("(anonymous namespace)::", "") for n in found if int(n[0], 16) in addresses)
    return {re.split(r"[<(]", name)[0].split("::")[-1].split()[-1] for name in names}


@pytest.mark.parametrize("runs", [[Run(program, "plain", (), "fifo") for program in KERNEL_TESTS]], ids=["plain"])
def test_every_kernel_is_run(outcomes: Outcomes, runs: list[Run]) -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*.cu*") if "cuda_on_host" not in p.parts]
    declared: set[str] = set()
    for source in sources:
        text = re.sub(r"//[^\n]*|__launch_bounds__\([^)]*\)", "", source.read_text())
        declared |= set(re.findall(r"__global__\s+void\s+(\w+)\s*\(", text))
        assert text.count("__global__") == len(re.findall(r"__global__\s+void\s+\w+\s*\(", text)), source
    assert declared
    launched = set().union(*(launched_kernels(run.program, outcomes[run].result()[1]) for run in runs))
    assert declared <= launched, f"no test_*.cpp launches {sorted(declared - launched)}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_compiles_the_conformance_program(arch: str, tmp_path: Path) -> None:
    """The kernels themselves are compiled by .ci/nvcc.sh, as CMake builds them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    command = [nvcc, "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}"]
    command += ["-DVICO_CONFORMANCE_SM80"] if arch == "80" else []
    command += ["-c", str(HARNESS / "conformance" / "conformance.cu"), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
