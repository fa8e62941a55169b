"""The kron_factor kernels on the CUDA-on-CPU harness: results, sanitizers, planted faults, plans."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import kron_factor_on_cpu as program_module
import numpy as np
import pytest
from contract_on_cpu import place_nowhere
from harness_tools import (
    ADDRESS,
    OUT_OF_BOUNDS,
    PLAIN,
    RACE,
    REPORTED,
    SEEDS,
    THREAD,
    WRONG,
    Fault,
    FaultyLibraries,
    check_fault,
    check_under_sanitizer,
    harness_build,
    needs_harness,
    program,
)
from kron_factor_on_cpu import CHANNELS, ELEMENTS, LAGS, LOADERS, PATCHES, POSITIONS, Case

PRECISIONS = ["tf32", "tf32x3", "bfloat16", "float16"]
KERNEL, TABLES, FINISH, PLAN = (
    f"cuda/kron_factor/{name}"
    for name in ("kron_factor.cuh", "kron_tables.cuh", "kron_factor_finish.cu", "kron_factor_plan.cpp")
)
# Fewer instantiations, for libraries that see small tiles only.
SMALL_TILE = (KERNEL, "if constexpr (kPrecision != ContractPrecision::kTf32x3 &&", "if constexpr (false &&")

run_kron_factor = program("kron_factor")


def build(precision, loaders, **options):
    sources = ["plan.cpp", "launch.cpp", "finish.cu", *(f"{precision}_{loader}.cu" for loader in loaders)]
    others = [f"harness/tests/kron_factor_{name}.cpp" for name in ("entry", "launchers")]
    return harness_build.build([*(f"cuda/kron_factor/kron_factor_{source}" for source in sources), *others], **options)


@needs_harness
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kron_factor(precision):
    """Both ways, every loader, tile and kind of split, borders of all kinds; the same bits on every schedule."""
    library = build(precision, LOADERS)

    def run(job):
        loaders, size, seed = job
        done = run_kron_factor(library, precision, ",".join(loaders), size, CUDA_ON_CPU_SEED=seed)
        assert done.returncode == 0, f"{job}\n{done.stdout}{done.stderr}"
        return done.stdout

    full = [([loader], "full", 0) for loader in LOADERS] if precision in ("tf32", "bfloat16") else []
    small = [(LOADERS, "small", seed) for seed in SEEDS[:3]] + [(LOADERS, "faults", 0)]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(run, full + small))
    assert len(set(outputs[len(full) : -1])) == 1, outputs


@needs_harness
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("precision", ["tf32x3", "bfloat16"])
def test_kron_factor_under_sanitizers(precision, sanitizer):
    library = build(precision, LOADERS, sanitizer=sanitizer, patches=[SMALL_TILE])
    check_under_sanitizer(run_kron_factor, sanitizer, library, precision, ",".join(LOADERS), "small", "--small-tile")


# ---- plans ----

SMS = 132


@pytest.fixture(scope="module")
def plan():
    """plan(case, precision): the automatic choices, for 132 multiprocessors."""
    library = ctypes.CDLL(str(build("tf32", [])))
    library.cuda_on_cpu_last_error.restype = ctypes.c_char_p

    def call(case, precision):
        case.sm_count = SMS
        operand = place_nowhere((case.N, case.groups * case.C, *case.size), case.layout)
        return program_module.plan_of(library, case, precision, operand)

    return call


def conv(N, C, edge, kernel, layout="channels_last", **more):
    padding = (0, kernel // 2, kernel // 2)
    return Case(N, C, (1, edge, edge), (1, kernel, kernel), padding=padding, layout=layout, **more)


def linear(rows, D, **more):
    return Case(1, D, (1, 1, rows), **more)


@needs_harness
@pytest.mark.parametrize(
    "case, precision, expected",
    [
        # 13 lags instead of 45 pairs of places
        (conv(128, 64, 56, 3), "tf32x3", {"way": LAGS, "loader": CHANNELS, "tile": 1}),
        (conv(128, 64, 56, 3, "channels_first"), "tf32x3", {"way": LAGS, "loader": POSITIONS}),
        (conv(128, 256, 14, 3), "bfloat16", {"way": LAGS, "tile": 2}),
        (conv(128, 512, 7, 3), "tf32x3", {"way": LAGS}),
        (conv(128, 256, 14, 3, step=(1, 2, 2)), "tf32x3", {"way": LAGS}),
        (conv(32, 64, 56, 3, dilation=(1, 2, 2)), "tf32", {"way": LAGS}),
        (conv(32, 64, 28, 5), "tf32x3", {"way": LAGS}),
        # few channels: a tile of one lag would be empty, one of patches is not
        (conv(128, 3, 224, 7, "channels_first", step=(1, 2, 2)), "tf32x3", {"way": PATCHES, "loader": POSITIONS}),
        (conv(128, 16, 32, 3), "tf32x3", {"way": PATCHES}),
        (conv(128, 1, 14, 3, "channels_first", groups=512), "tf32x3", {"way": PATCHES, "groups_per_tile": 7}),
        # 1x1: no lags, whole copies where the positions allow them
        (conv(128, 256, 56, 1, "channels_first"), "tf32", {"way": PATCHES, "whole_copies": 1, "tile": 2}),
        (conv(128, 256, 7, 1, "channels_first"), "tf32", {"whole_copies": 0}),
        # Linear layers: many tiles are written once, few are split
        (linear(8192, 4096), "bfloat16", {"final": 1, "tile": 2, "items": 32 * 33 // 2, "workspace_bytes": 0}),
        (linear(8192, 768), "tf32x3", {"final": 0, "items": 5 * 78}),
        (linear(8192, 769), "tf32", {"loader": ELEMENTS, "tile": 1}),
    ],
)
def test_plan(plan, case, precision, expected):
    chosen = plan(case, precision)
    assert {name: chosen[name] for name in expected} == expected, chosen


@needs_harness
def test_lags_multiply_what_they_should(plan):
    """A 3x3 kernel of stride 1: 13 products of all positions but for borders, the first one of half of the tiles."""
    case = conv(16, 256, 32, 3)
    case.options = {"way": LAGS, "tile": 1}
    tiles = 12 * 16 + 10  # of 64 x 64
    rows = 16 * 32 * 32 / 16
    assert 0.92 * tiles * rows < plan(case, "tf32")["slabs"] < 1.01 * tiles * rows
    case.options = {"way": PATCHES, "tile": 1}
    assert plan(case, "tf32")["slabs"] == 36 * 37 / 2 * rows


@needs_harness
def test_workspace_is_bounded(plan):
    """By the bounds in kron_factor.h, whatever the shape."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        N, edge, C = (int(2 ** rng.uniform(0, most)) for most in (13, 7, 9))
        groups, kernel = int(2 ** rng.uniform(0, 4)), int(rng.integers(1, 6))
        case = conv(N, C, max(edge, kernel), kernel, groups=groups)
        case.options = {"way": int(rng.integers(1, 3)), "tile": int(rng.integers(1, 3))}
        chosen = plan(case, str(rng.choice(PRECISIONS)))
        blocks, side = (3 * SMS, 64) if chosen["tile"] == 1 else (SMS, 128)
        across = -(-(C if chosen["way"] == LAGS else case.D) // side)
        products = (4 * kernel - 3 + 2 * kernel) ** 2 if chosen["way"] == LAGS else 1
        bound = 2 * blocks + products * groups * across**2
        assert chosen["items"] <= bound, (case, chosen)
        assert chosen["workspace_bytes"] in (0, chosen["items"] * side * (side + 1) * 4), (case, chosen)


# ---- planted faults ----


def wrong(*patches):
    return Fault(PLAIN, WRONG, "got", [*patches])


def race(*patches):
    return Fault(THREAD, RACE, "data race", [*patches])


def outside(*patches):  # of an operand: copies are the harness' own
    return Fault(ADDRESS, REPORTED, "reads out of bounds", [*patches])


def outside_at_store(*patches):
    return Fault(ADDRESS, OUT_OF_BOUNDS, "heap-buffer-overflow", [*patches])


SLAB_BARRIER = "__syncthreads();  // this slab has landed for all, and all have left the last one, refilled now"
SWAP = "if (k[0] > k[1]) {  // this lag's transpose is there"
PAST_THE_END = "if (j >= job_.columns || channel >= job_.total_channels) column.at[1] = kKronNowhere;"
MIRROR = "if (i < j && j < size) out[j * size + i] = sums[r * job.ways][c];"
SECOND_HALF = "if (threadIdx.x >= kEdge) *half_sum += row_sum;"
RESIDUE = "return (corner(k) % step + step) % step;"
WHOLE = "return divides(elements, extent) && divides(16,"
# name: (precision, loader, fault)
FAULTS = {
    # the pipeline
    "no wait for the copies": ("bfloat16", "channels", wrong((KERNEL, "cp_async_wait<kKronStages - 2>();", ""))),
    "a wait for one slab too few": (
        "tf32",
        "channels",
        wrong((KERNEL, "cp_async_wait<kKronStages - 2>();", "cp_async_wait<kKronStages - 1>();")),
    ),
    "no barrier between slabs": ("tf32", "channels", wrong((KERNEL, SLAB_BARRIER, ""))),
    "the same, under ThreadSanitizer": ("bfloat16", "elements", race((KERNEL, SLAB_BARRIER, ""))),
    "no barrier after the tables": ("tf32", "elements", race((KERNEL, "__syncthreads();  // tables", ""))),
    "the table of a slab in use": (
        "tf32",
        "elements",
        wrong((KERNEL, "prepare(stage, slab + kKronStages)", "prepare((stage + 1) % kKronStages, slab + kKronStages)")),
    ),
    "the tile overtakes the last products": (
        "tf32",
        "channels",
        race((KERNEL, "__syncthreads();  // the ring is free: the tile takes its place", "")),
    ),
    "no barrier before the mirror": (
        "tf32",
        "elements",
        race((KERNEL, "__syncthreads();  // all values that will be mirrored", "//")),
    ),
    # what is loaded
    "rows past the end": ("tf32", "channels", wrong((KERNEL, "if (row >= shared_.rows_left)", "if (false)"))),
    "columns past the end": ("tf32", "elements", outside((KERNEL, PAST_THE_END, ""))),
    "channels past the last group": ("tf32", "positions", outside((KERNEL, " || channel >= job_.total_channels", ""))),
    "entries before the border": (
        "tf32",
        "channels",
        wrong((KERNEL, "row.at[1] + column.at[1] < static_cast<uint32_t>(job_.size[1])", "true")),
    ),
    "copies of two samples' positions": (
        "tf32",
        "positions",
        Fault(PLAIN, REPORTED, "misaligned", [(PLAN, WHOLE, "return divides(16,")]),
    ),
    # sums
    "sums are added twice": ("tf32", "channels", wrong((KERNEL, ", terms[m][n][r] = 0;", ";"))),
    "long sums inside of the tensor cores": ("tf32", "elements", wrong((KERNEL, "? 16 : 4;", "? 16 : 1 << 30;"))),
    "a product of three left out": (
        "tf32x3",
        "channels",
        wrong(("cuda/contract/fragments.cuh", "mma_tf32(product[m], b_hi[m], a_lo);", "")),
    ),
    "half of the homogeneous column": ("tf32", "channels", wrong((KERNEL, SECOND_HALF, ""))),
    "a split left out": ("tf32", "channels", wrong((FINISH, "int s = way; s < splits", "int s = way + 1; s < splits"))),
    "all splits write the same part": (
        "bfloat16",
        "channels",
        race((KERNEL, "shared.item = item;", "shared.item = item * 0;")),
    ),
    "a way of adding splits is left out": (
        "tf32",
        "elements",
        wrong((FINISH, "int way = 1; way < job.ways", "int way = 2; way < job.ways")),
    ),
    "no barrier before ways are added": ("tf32", "elements", race((FINISH, "__syncthreads();  // the sums", ""))),
    # lags
    "both operands at the same place": (
        "tf32",
        "channels",
        wrong((KERNEL, "(operand ? job_.axes[d].lag[shared_.segment[d]] : 0)", "0")),
    ),
    "lags are not transposed": ("tf32", "channels", wrong((FINISH, SWAP, "if (false) {"))),
    "a cell is left out": ("tf32", "positions", wrong((FINISH, "int cell = 0;", "int cell = 1;"))),
    "one position too many": (
        "tf32",
        "channels",
        wrong((PLAN, "first + p.positions[d], up(end))", "first + p.positions[d] + 1, up(end))")),
    ),
    "residues are mixed": ("tf32", "positions", wrong((PLAN, RESIDUE, "return 0 * corner(k) * step;"))),
    # results
    "one factor's columns for all": (
        "tf32",
        "positions",
        wrong((FINISH, "member * job.layer_channels + c[e]", "0 * member + c[e]")),
    ),
    "results without decay read the old ones": ("tf32", "channels", wrong((TABLES, "job.decay == 0 ? value : ", ""))),
    "below the diagonal is read": (
        "tf32",
        "channels",
        wrong((TABLES, "(group * size + i) * size + j", "(group * size + j) * size + i")),
    ),
    "no mirror": ("tf32", "channels", wrong((FINISH, MIRROR, ""))),
    "columns of results past the end": ("tf32", "elements", outside_at_store((KERNEL, " && j < job.columns;", ";"))),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    def build_fault(entry):
        precision, loader, fault = entry
        return build(precision, [loader], sanitizer=fault.sanitizer, patches=[*fault.patches, SMALL_TILE])

    return FaultyLibraries(FAULTS, build_fault)


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_kron_factor_is_caught(faulty_libraries, name):
    precision, loader, fault = FAULTS[name]
    flags = ["--small-tile", *(["--exact"] if fault.sanitizer else [])]
    resident = 3 if fault.sanitizer == THREAD else 1

    def run(seed):
        environment = {"CUDA_ON_CPU_SEED": seed, "CUDA_ON_CPU_RESIDENT": resident}
        library = faulty_libraries[name]
        return run_kron_factor(library, precision, loader, "faults", *flags, sanitizer=fault.sanitizer, **environment)

    check_fault(fault, run, SEEDS[:3])
