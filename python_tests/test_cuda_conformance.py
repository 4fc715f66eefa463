"""What each CUDA wrapper does with given bits: on the CPU (cuda_on_host), on a GPU (the golden file), as documented.

`csrc/cuda_on_host/conformance.sh record` writes the golden file on a machine with an sm_90 GPU. Expectations here are
computed with numpy from the documented layouts; docs/cuda_on_host.md says more.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_cuda_on_host import HARNESS, MODES, ROOT, needs_harness

GOLDEN = Path(__file__).parent / "golden" / "cuda_conformance.safetensors"
RECORD = HARNESS / "conformance"
Case = dict[str, np.ndarray]

pytestmark = needs_harness


def cases_of(path: Path) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, array in load_file(path).items():
        case, key = name.rsplit("/", 1)
        cases.setdefault(case, {})[key] = array
    return cases


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The dump of the plain build; the sanitized and the race-checked one ran without complaint and agree."""
    subprocess.run(["sh", HARNESS / "build.sh", ",".join(MODES), "conformance"], check=True)
    folder = tmp_path_factory.mktemp("conformance")
    for mode in MODES:
        program = ROOT / "build" / "cuda_on_host" / mode / "conformance"
        subprocess.run([program, folder / mode], check=True, timeout=120)
    assert len({(folder / mode).read_bytes() for mode in MODES}) == 1, "the three builds differ"
    return cases_of(folder / "plain")


@pytest.fixture(scope="module")
def gpu() -> dict[str, Case]:
    """The golden file, or the dump of the GPU at hand that VICO_CONFORMANCE names."""
    if "VICO_CONFORMANCE" in os.environ:
        return cases_of(Path(os.environ["VICO_CONFORMANCE"]))
    if not GOLDEN.exists():
        pytest.skip("not yet recorded on a GPU: csrc/cuda_on_host/conformance.sh record")
    return cases_of(GOLDEN)


@pytest.fixture(params=["host", "gpu"])
def dump(request: pytest.FixtureRequest) -> dict[str, Case]:
    return request.getfixturevalue(request.param)


def select(dump: dict[str, Case], prefix: str) -> Iterator[tuple[str, Case]]:
    found = [(name, case) for name, case in dump.items() if name == prefix or name.startswith(f"{prefix}.")]
    assert found, f"no case {prefix}"
    return iter(found)


def numbers(bits: np.ndarray, half: bool) -> np.ndarray:
    if half:
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


LANE = np.arange(32)


def test_vector_accesses(dump: dict[str, Case]) -> None:
    case = dump["load16"]
    np.testing.assert_array_equal(case["out"], case["in"][::-1])
    np.testing.assert_array_equal(case["streamed"], case["in"][::-1])


def test_conversions(dump: dict[str, Case]) -> None:
    case = dump["pack"]
    x, nan = case["in"], np.isnan(case["in"])
    bits = x.view(np.uint32).astype(np.uint64)
    bfloat16 = np.where(nan, 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint32)
    np.testing.assert_array_equal(case["bfloat16"], bfloat16[:, 0] | bfloat16[:, 1] << 16)
    with np.errstate(over="ignore", invalid="ignore"):
        half = np.where(nan, 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint32)
    np.testing.assert_array_equal(case["half"], half[:, 0] | half[:, 1] << 16)
    case = dump["half_to_float"]
    np.testing.assert_array_equal(case["out"], case["in"].view(np.float16).astype(np.float32))


def test_cp_async(dump: dict[str, Case]) -> None:
    for width in (8, 16):
        case, at = dump[f"cp_async.{width}"], np.arange(16)
        copied = np.where(at < case["bytes"][..., None], case["in"], 0)
        np.testing.assert_array_equal(case["out"], np.where(at < width, copied, 0xAB)[:, ::-1])


@pytest.mark.parametrize("name", ["ldmatrix", "ldmatrix_transposed"])
def test_matrix_loads(dump: dict[str, Case], name: str) -> None:
    for label, case in select(dump, name):
        rows = case["in"].reshape(4, 8, 8)[: int(label[-1])]
        matrices = rows.transpose(0, 2, 1) if name.endswith("transposed") else rows
        first, second = (matrices[:, LANE // 4, LANE % 4 * 2 + i].astype(np.uint32) for i in (0, 1))
        np.testing.assert_array_equal(case["out"], (first | second << 16).T, err_msg=label)


def products_close(got: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, whole: bool, name: str) -> None:
    """D = A B + C: exact where every sum is a small whole number, else within 17 truncated additions' rounding."""
    expected = a @ b + c
    if whole:
        np.testing.assert_array_equal(got, expected, err_msg=name)
    else:
        bound = 2.0**-22 * 17 * (np.abs(a) @ np.abs(b) + np.abs(c))
        assert (np.abs(got - expected) <= bound).all(), name
        assert (got != 0).any()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma(dump: dict[str, Case], kind: str) -> None:
    for name, case in select(dump, f"mma_m16n8k16_{kind}"):
        g, t = LANE[:, None] // 4, LANE[:, None] % 4 * 2
        i = np.arange(8)  # of 16-bit elements in registers
        row_a, column_a = g + 8 * (i // 2 % 2), t + i % 2 + 8 * (i // 4)
        i = np.arange(4)
        row_b, column_b = t + i % 2 + 8 * (i // 2), np.broadcast_to(g, (32, 4))
        row_d, column_d = g + 8 * (i // 2), t + i % 2
        for warp in range(len(case["a"])):
            a, b, c, d = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8)), np.zeros((16, 8))
            a[row_a, column_a] = numbers(case["a"][warp], kind == "f16")
            b[row_b, column_b] = numbers(case["b"][warp], kind == "f16")
            c[row_d, column_d] = case["c"][warp]
            d[row_d, column_d] = case["out"][warp]
            products_close(d, a, b, c, name.endswith("whole"), name)


def test_barriers(dump: dict[str, Case]) -> None:
    case = dump["barrier"]
    np.testing.assert_array_equal(case["out"], case["in"][::-1])
    np.testing.assert_array_equal(case["addresses"], np.arange(128) * 4)
    bits = case["in"] >> 7 & 1
    expected = [bits.any(), bits.all(), 0, 1, bits.sum()]
    np.testing.assert_array_equal(case["votes"], np.tile(np.array(expected, np.int32), (128, 1)))


def test_shuffles_and_votes(dump: dict[str, Case]) -> None:
    case = dump["shuffle"]
    x = case["in"]

    def clamped(source: np.ndarray, width: int) -> np.ndarray:
        """Lanes whose source is outside their segment keep their own value."""
        return x[np.where(source // width == LANE // width, source, LANE)]

    expected = [
        x[(LANE * 7 + 3) % 32],
        x[LANE // 8 * 8 + 13 % 8],
        x[LANE ^ 5],
        x[LANE ^ 3],
        # The exclusive or may lead into a segment below, which is read, but not into one above.
        x[np.where((LANE ^ 12) > (LANE | 7), LANE, LANE ^ 12)],
        clamped(LANE + 3, 32),
        clamped(LANE + 3, 8),
        clamped(LANE - 3, 32),
        clamped(LANE - 3, 16),
        np.where(LANE < 16, x[LANE ^ 9], 0),
        np.where(LANE % 2 == 1, x[np.where(LANE + 2 < 32, LANE + 2, LANE)], 0),
    ]
    np.testing.assert_array_equal(case["out"], np.stack(expected, 1))
    doubles = x.astype(np.float64) * 2.0**-40 + x
    np.testing.assert_array_equal(case["doubles"], doubles[LANE ^ 17])
    ballot = int((((x >> 11) & 1).astype(np.uint64) << LANE.astype(np.uint64)).sum())
    np.testing.assert_array_equal(case["votes"], np.tile(np.array([ballot, 1, 0, 0, 1], np.uint32), (32, 1)))


def test_atomics(dump: dict[str, Case]) -> None:
    case = dump["atomic"]
    old, operand = case["in"], case["operands"]
    np.testing.assert_array_equal(case["old"], old)
    with np.errstate(over="ignore"):
        added = old[:, 0] + operand
    swapped = np.where((np.arange(64) % 2 == 1) | (old[:, 6] == operand), operand, old[:, 6])
    columns = [added, np.maximum(old[:, 1], operand), np.minimum(old[:, 2], operand), operand]
    columns += [old[:, 4] | operand, old[:, 5] & operand, swapped]
    np.testing.assert_array_equal(case["out"], np.stack(columns, 1))
    np.testing.assert_array_equal(case["float_old"], case["float_in"])
    np.testing.assert_array_equal(case["float_out"], case["float_in"] + np.float32(0.1))
    np.testing.assert_array_equal(case["counter"], [256])
    np.testing.assert_array_equal(case["tickets"], np.arange(256))


def test_arithmetic(dump: dict[str, Case]) -> None:
    case = dump["arithmetic"]
    bits, x = case["bits"], case["x"].astype(np.float64)
    lengths = np.array([int(b).bit_length() for b in bits])
    expected = [
        np.array([int(b).bit_count() for b in bits]),
        np.array([(int(b) & -int(b)).bit_length() for b in bits]),
        32 - lengths,
        case["x"][:, 0].copy().view(np.uint32),
        bits & np.uint32(0x7F7FFFFF),
    ]
    np.testing.assert_array_equal(case["integers"], np.stack([e.astype(np.uint32) for e in expected], 1))
    floats = case["floats"]
    # The product is exact in double; its sum with x[2] is rounded twice, which rarely shows and never by more.
    fma = x[:, 0] * x[:, 1] + x[:, 2]
    assert (np.abs(floats[:, 0] - fma) <= np.spacing(np.abs(fma).astype(np.float32)) * 0.5001).all()
    single = case["x"]
    np.testing.assert_array_equal(floats[:, 4], single[:, 0] * single[:, 1] + single[:, 2])
    np.testing.assert_array_equal(case["doubles"], (x[:, 0] / 3) * (x[:, 1] / 7) + x[:, 2])
    # The CUDA programming guide's bounds: 2 ulp, 2 + |1.173 x| ulp, 2 ulp.
    for column, exact, ulp in (
        (1, 1 / np.sqrt(np.abs(x[:, 0].astype(np.float32)) + np.float32(0.001)), 2),
        (2, np.exp(x[:, 1]), 2 + np.abs(1.173 * x[:, 1])),
        (3, x[:, 2] / x[:, 1], 2),
        (5, np.exp2(x[:, 1]), 2),  # these two by the PTX manual: 2 ulp, 1 ulp
        (6, 1 / x[:, 2], 1),
    ):
        error = np.abs(floats[:, column] - exact) / np.spacing(np.abs(exact).astype(np.float32))
        assert (error <= ulp + 1).all(), f"column {column}: {error.max()} ulp"


def test_exp2(dump: dict[str, Case]) -> None:
    x = dump["exp2"]["x"].astype(np.float64)
    exact = np.exp2(x)
    exact[exact < np.finfo(np.float32).tiny] = 0
    exact[exact > np.finfo(np.float32).max] = np.inf
    floats = dump["exp2"]["floats"].astype(np.float64)
    regular = np.isfinite(exact) & (exact != 0)
    np.testing.assert_array_equal(floats[~regular], exact[~regular])
    assert (np.abs(floats / np.where(regular, exact, 1) - 1)[regular] <= 2.0**-22).all()


def test_mbarrier(dump: dict[str, Case]) -> None:
    case = dump["mbarrier"]
    np.testing.assert_array_equal(case["out"], case["in"][:, ::-1])


def test_registers(dump: dict[str, Case]) -> None:
    case = dump["registers"]
    total = np.zeros(384, np.uint32)
    for row in case["in"]:
        total = total * np.uint32(3) + row
    np.testing.assert_array_equal(case["out"], total)


def test_overlap(dump: dict[str, Case]) -> None:
    case = dump["overlap"]
    words = case["in"]
    for _ in range(9):
        words = np.roll(words, -12345) * np.uint32(3) + np.uint32(1)
    np.testing.assert_array_equal(case["out"], words)


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Where the byte at `address` of a tile lies: 16-byte units change places within 8 rows of `span` bytes."""
    return address ^ ((address // 128) % (max(span, 16) // 16)) * 16


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tma(dump: dict[str, Case], rank: int) -> None:
    sizes, at = (72, 5, 3, 2, 2)[:rank], (0, 3, -1, 1, -1)[:rank]
    for name, case in select(dump, f"tma.{rank}d"):
        width = 4 if ".f32." in name else 2
        swizzle = int(name.rsplit("swizzle", 1)[1])
        box = (*((swizzle or 32) // width, 3, 2, 2, 2)[:rank],)
        strides = [width]
        extent = sizes[0] * width
        for d in range(1, rank):
            strides.append((extent + 31) // 16 * 16)
            extent = strides[-1] * sizes[d]
        places = np.indices(box[::-1])[::-1]  # coordinates in the box, innermost first

        def bytes_of(start: tuple[int, ...], places: np.ndarray = places, strides: list[int] = strides) -> np.ndarray:
            return sum((places[d] + start[d]) * strides[d] for d in range(rank)).ravel()  # type: ignore[union-attr]

        def inside(start: tuple[int, ...], places: np.ndarray = places) -> np.ndarray:
            return np.all(
                [(p + s >= 0) & (p + s < n) for p, s, n in zip(places, start, sizes, strict=False)], 0
            ).ravel()

        slots = swizzled(np.arange(np.prod(box)) * width, swizzle)
        within = np.arange(width)
        start = (72 - box[0] // 2, *at[1:])
        loaded = np.zeros(slots.size * width, np.uint8)
        source, ok = bytes_of(start), inside(start)
        assert ok.any()
        assert not ok.all()
        loaded[slots[ok, None] + within] = case["tensor"][source[ok, None] + within]
        np.testing.assert_array_equal(case["loaded"].view(np.uint8), loaded, err_msg=name)


def operand(memory: np.ndarray, rows: int, mn_major: bool, swizzle: int) -> np.ndarray:
    """[rows, 16] out of shared memory (16-bit elements): the canonical layouts of the PTX ISA for wgmma."""
    if swizzle == 0:  # 8 x 8 core matrices, two along K side by side
        core = memory.reshape(rows // 8, 2, 8, 8)  # row blocks, K blocks, then (row, k) or (k, row)
        if mn_major:
            core = core.transpose(0, 1, 3, 2)
        return core.transpose(0, 2, 1, 3).reshape(rows, 16)
    span = swizzle // 2
    plain = np.empty_like(memory)
    address = np.arange(memory.size) * 2
    plain[address // 2] = memory[swizzled(address, swizzle) // 2]
    if not mn_major:
        return plain.reshape(rows, span)[:, -16:]
    atoms = plain.reshape(rows // span, 2, 8, span)  # along M or N, along K, k, row
    return atoms.transpose(0, 3, 1, 2).reshape(rows, 16)


def test_wgmma(dump: dict[str, Case]) -> None:
    lane = np.arange(128)[:, None]
    for name, case in select(dump, "wgmma_m64k16"):
        _, n_label, kind, order, swizzle_label, *_rest = name.split(".")
        n, swizzle, half = int(n_label[1:]), int(swizzle_label.removeprefix("swizzle")), kind == "f16"
        a = operand(numbers(case["a"], half), 64, order[0] == "m", swizzle)
        b = operand(numbers(case["b"], half), n, order[1] == "n", swizzle)
        i = np.arange(n // 2)
        row, column = lane // 32 * 16 + lane % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2
        c, d = np.zeros((64, n)), np.zeros((64, n))
        if not name.endswith("overwrite"):
            c[row, column] = case["c"]
        d[row, column] = case["out"]
        products_close(d, a, b.T, c, ".whole" in name, name)
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
        for words, mn_major in zip(case["descriptors"], (order[0] == "m", order[1] == "n"), strict=True):
            leading, stride = (128, 256) if swizzle == 0 else (16 * swizzle if mn_major else 16, 8 * swizzle)
            assert int(words[0]) == leading // 16 << 16, name
            assert int(words[1]) == stride // 16 | mode << 30, name


# Sums whose order or rounding the hardware keeps to itself, and approximations: held to the bounds above on both sides.
BOUNDED = re.compile(r"(mma_m16n8k16_\w+|wgmma_m64k16\..*)\.fractions/out|(arithmetic|exp2)/floats")


def test_host_bodies_do_what_the_gpu_does(host: dict[str, Case], gpu: dict[str, Case]) -> None:
    assert {(c, k) for c in host for k in host[c]} == {(c, k) for c in gpu for k in gpu[c]}
    for name, case in host.items():
        for key, array in case.items():
            if BOUNDED.fullmatch(f"{name}/{key}"):
                continue
            assert array.dtype == gpu[name][key].dtype
            np.testing.assert_array_equal(array, gpu[name][key], err_msg=f"{name}/{key}")


def test_the_gpu_at_hand_is_as_recorded() -> None:
    if "VICO_CONFORMANCE" not in os.environ:
        pytest.skip("no GPU at hand: csrc/cuda_on_host/conformance.sh check runs this")
    at_hand, recorded = load_file(os.environ["VICO_CONFORMANCE"]), load_file(GOLDEN)
    assert at_hand.keys() == recorded.keys()
    for name, array in recorded.items():
        if not BOUNDED.fullmatch(name):
            np.testing.assert_array_equal(at_hand[name], array, err_msg=name)


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def test_every_wrapper_has_a_conformance_kernel() -> None:
    common = ROOT / "csrc" / "common"
    declaration = re.compile(r"^(?:VICO_DEVICE|VICO_INLINE|inline) [\w:&*<> ]+?(\w+)\(", re.MULTILINE)
    wrappers: set[str] = set()
    for header in (*common.glob("ptx*.cuh"), common / "tensor_map.cuh"):
        names = set(declaration.findall(without_comments(header.read_text())))
        assert names, f"no wrapper found in {header.name}"
        wrappers |= names
    shim = without_comments((HARNESS / "shim.h").read_text())
    wrappers |= set(re.findall(r"^(?:inline \w+|T) (__\w+|rsqrtf)\(", shim, re.MULTILINE))
    wrappers |= set(re.findall(r"^COH_ATOMIC\((\w+),", shim, re.MULTILINE)) | {"atomicCAS"}
    wrappers -= {"__trap"}  # it ends the program
    kernels = without_comments("".join(path.read_text() for path in RECORD.glob("*.cu*")))
    missing = {name for name in wrappers if not re.search(rf"\b{name}(<[^;()]*>)?\(", kernels)}
    assert not missing, f"no kernel of csrc/cuda_on_host/conformance calls {sorted(missing)}"
    assert len(wrappers) > 50
