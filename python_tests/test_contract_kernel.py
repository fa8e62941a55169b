"""The contract kernel on the CUDA-on-CPU harness: results, sanitizers, planted faults, plans."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import contract_on_cpu as program
import numpy as np
import pytest
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
    harness_build,
    needs_harness,
    run_script,
)

PRECISIONS = list(program.DEPTH)
LOADERS = program.LOADERS
FOLDER = "cuda/contract"
KERNEL, EPILOGUE, FRAGMENTS, TABLES, SLAB, LAUNCH, PLAN, JOIN = (
    f"{FOLDER}/{name}"
    for name in (
        "contract.cuh",
        "epilogue.cuh",
        "fragments.cuh",
        "loaders.cuh",
        "slab.cuh",
        "contract_launch.cpp",
        "contract_plan.cpp",
        "contract_join_parts.cu",
    )
)
MOMENTS, REDUCE = "cuda/common/moments.cuh", "cuda/common/reduce.cuh"
# Fewer instantiations, for libraries that see small tiles only.
SMALL_TILE = (KERNEL, "if constexpr (kPrecision != ContractPrecision::kTf32x3) {", "if constexpr (false) {")


def build(precision, loaders, **options):
    sources = ["contract_plan.cpp", "contract_launch.cpp", "contract_join_parts.cu"]
    sources += [f"contract_{precision}_{loader}.cu" for loader in loaders]
    others = ["cuda/merge/merge.cu", "cuda/columns/column_sums.cu"]
    others += ["harness/tests/contract_entry.cpp", "harness/tests/contract_launchers.cpp"]
    return harness_build.build([*(f"{FOLDER}/{source}" for source in sources), *others], **options)


def run(library, precision, loaders, amount, *flags, **options):
    script = Path(__file__).with_name("contract_on_cpu.py")
    return run_script(script, library, precision, ",".join(loaders), amount, *flags, **options)


@needs_harness
@pytest.mark.parametrize("precision", PRECISIONS)
def test_contract(precision):
    """Every loader, epilogue, tile and kind of split; and the same bits on every schedule."""
    library = build(precision, LOADERS)

    def run_one(job):
        loaders, amount, seed = job
        done = run(library, precision, loaders, amount, CUDA_ON_CPU_SEED=seed)
        assert done.returncode == 0, f"{job}\n{done.stdout}{done.stderr}"
        return done.stdout

    full = [([loader], "full", 0) for loader in LOADERS]
    small = [(LOADERS, "small", seed) for seed in SEEDS[:3]]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(run_one, full + small))
    assert all(int(output.split()[0]) > 60 for output in outputs), outputs
    assert len(set(outputs[len(full) :])) == 1, outputs


@needs_harness
# The others differ in arithmetic only, and these two in nothing that threads wait for.
@pytest.mark.parametrize(("precision", "sanitizer"), [("tf32", "thread"), ("tf32", "address"), ("bfloat16", "address")])
def test_contract_under_sanitizers(precision, sanitizer):
    """With several blocks at a time, for races between them, and buffers without slack."""
    library = build(precision, LOADERS, sanitizer=sanitizer, patches=[SMALL_TILE])
    flags = ["--exact", "--small-tile"]
    done = run(library, precision, LOADERS, "small", *flags, sanitizer=sanitizer, CUDA_ON_CPU_RESIDENT=3)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- plans ----

SMS = 132


@pytest.fixture(scope="module")
def plan():
    """plan(case, precision): the automatic choices, for 132 multiprocessors."""
    library = ctypes.CDLL(str(build("tf32", [])))

    def call(case, precision):
        a = program.place_nowhere((case.N, case.groups * case.C, *case.size), case.layout)
        b = program.place_nowhere((case.N, case.groups * case.O, *case.positions), case.layout)
        problem = program.outer_problem(case, precision, a, b)
        outputs = program.StatsOutputs(**dict.fromkeys(case.want, 256))
        chosen = (ctypes.c_int64 * len(program.PLAN))()
        arguments = map(ctypes.byref, (problem, outputs))
        assert library.run_contract_plan(*arguments, SMS, ctypes.byref(program.Options()), chosen) == 0
        return dict(zip(program.PLAN, chosen, strict=True))

    return call


def conv(N, C, O, edge, kernel, **more):  # noqa: E741
    padding = (0, kernel // 2, kernel // 2)
    more = {"size": (1, edge, edge), "kernel": (1, kernel, kernel), "padding": padding, **more}
    return program.Case(N, O, C, want=("grad", "batch_l2", "sum_grad_squared"), **more)


def linear(N, T, O, I, *want):  # noqa: E741
    return program.linear(N, T, O, I, want=want or ("grad", "batch_l2", "sum_grad_squared"))


@needs_harness
@pytest.mark.parametrize(
    "case, precision, expected",
    [
        # many large tiles; no split, so that results are written once
        (linear(8, 1024, 3072, 768), "bfloat16", {"loader": 1, "tile": 2, "splits": 1, "t_splits": 1}),
        # three products: small tiles
        (linear(8, 1024, 3072, 768), "tf32x3", {"loader": 1, "tile": 1, "splits": 1}),
        # short samples: small tiles, two samples per slab
        (linear(4096, 8, 512, 512), "tf32", {"loader": 1, "tile": 1, "packed": 1, "splits": 6}),
        # rows that 16-byte copies cannot take
        (linear(64, 20, 10, 84), "bfloat16", {"loader": 4, "tile": 1}),
        # 2 large tiles or 5 small ones: splits of the samples
        (conv(128, 64, 64, 56, 3), "bfloat16", {"loader": 2, "tile": 1, "splits": 43, "t_splits": 1}),
        (conv(128, 64, 64, 56, 3, layout="channels_first"), "bfloat16", {"loader": 3, "copy_bytes": 16}),
        (conv(128, 64, 64, 7, 3, layout="channels_first"), "bfloat16", {"loader": 3, "copy_bytes": 2}),
        (conv(128, 3, 64, 224, 7, step=(1, 2, 2)), "bfloat16", {"loader": 4}),
        # few samples, few tiles: splits of the positions
        (conv(2, 64, 64, 56, 3), "tf32", {"loader": 2, "splits": 2, "t_splits": 22, "squares": 0}),
    ],
)
def test_plan(plan, case, precision, expected):
    chosen = plan(case, precision)
    assert {name: chosen[name] for name in expected} == expected, chosen


@needs_harness
def test_workspace_is_bounded(plan):
    """By the bounds in contract.h, whatever the shape."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        N, T, O, C = (int(2 ** rng.uniform(0, most)) for most in (13, 13, 13, 11))  # noqa: E741
        groups = int(2 ** rng.uniform(0, 4))
        precision = rng.choice(PRECISIONS)
        want = program.RESULTS
        case = program.Case(N, O, C, groups=groups, size=(1, 1, T + 2), kernel=(1, 1, 3), want=want)
        chosen = plan(case, precision)
        blocks = SMS * (3 if chosen["tile"] == 1 else 1)
        area = (64 if chosen["tile"] == 1 else 128) ** 2
        tiles = groups * -(-O // area**0.5) * -(-3 * C // area**0.5)
        norms = 4 * N * tiles
        if chosen["t_splits"] > 1:
            norms = 4 * N * (groups * O * 3 * C / 32 + 1)
        sums = 4 * blocks * area if chosen["t_splits"] > 1 else 2 * 8 * blocks * area
        assert chosen["workspace_bytes"] <= norms + sums + 3 * 256, (case, chosen)


# ---- planted faults ----

SLAB_BARRIER = "__syncthreads();  // the next slab has landed"
LAST_BARRIER = "__syncthreads();  // the last slab's"
NORM_LEFT = "epilogue.sample(acc, n, &shared->norms[stage % 2]"
NORM_READ = "total += shared->norms[stage % 2][s][w];"


def wrong(*patches, report="wrong, got"):
    return Fault(PLAIN, WRONG, report, list(patches))


def race(*patches):
    return Fault(THREAD, RACE, "data race", list(patches))


def outside(*patches):  # of an operand: copies are the harness' own
    return Fault(ADDRESS, REPORTED, "reads out of bounds", list(patches))


def outside_at_store(*patches):
    return Fault(ADDRESS, OUT_OF_BOUNDS, "heap-buffer-overflow|misaligned address", list(patches))


# name: (precision, loader, fault)
FAULTS = {
    # the pipeline
    "no barrier between slabs": ("tf32", "rows", wrong((KERNEL, SLAB_BARRIER, "//"))),
    "the same, under ThreadSanitizer": ("tf32", "rows", race((KERNEL, SLAB_BARRIER, "//"))),
    "no wait for copies": ("tf32", "rows", wrong((KERNEL, "cp_async_wait<kContractStages - 2>();", ""))),
    "a wait for one slab too few": (
        "tf32",
        "rows",
        wrong((KERNEL, "<kContractStages - 2>();", "<kContractStages - 1>();")),
    ),
    "the refill overtakes its readers": (
        "tf32",
        "rows",
        race((KERNEL, "load(stage);\n        if", "load((stage + 1) % kContractStages);\n        if")),
    ),
    "no barrier after the block's description": (
        "tf32",
        "rows",
        Fault(PLAIN, REPORTED, "", [(KERNEL, "__syncthreads();  // block", "")]),
    ),
    "no barrier after the tables": ("tf32", "elements", race((KERNEL, "__syncthreads();  // tables", ""))),
    "the table of a slab in use": (
        "tf32",
        "elements",
        wrong((KERNEL, "prepare(stage, next);", "prepare((stage + 1) % kContractStages, next);")),
    ),
    "the empty group past the end is left out": (
        "tf32",
        "rows",
        wrong(
            (
                KERNEL,
                "      next.advance<kRows>(block, params.packed);\n    }\n    cp_async_commit();",
                "      next.advance<kRows>(block, params.packed);\n      cp_async_commit();\n    }",
            )
        ),
    ),
    # sample boundaries
    "no reset at a sample boundary": ("tf32", "rows", wrong((KERNEL, "acc[m][c][r] = 0.f;", ";"))),
    "packed samples overlap": (
        "tf32",
        "rows",
        wrong((SLAB, "t = begin.t0 + row - (second ? Slab::kDepth : 0);", "t = begin.t0 + row;")),
    ),
    "a packed sample past the end": ("tf32", "rows", outside((SLAB, "n < block.n_end && t", "t"))),
    "packed samples one at a time": ("tf32", "rows", wrong((SLAB, "n += packed ? 2 : 1;", "n += 1;"))),
    "a position past the end": ("tf32", "rows", wrong((SLAB, "t < block.t_end;", "t <= block.t_end;"))),
    "the same, under AddressSanitizer": ("tf32", "rows", outside((SLAB, "t < block.t_end;", "t <= block.t_end;"))),
    "the second half of the last slab is left out": (
        "tf32",
        "rows",
        wrong((KERNEL, "if (t0 + kDepth < block.t_end) {", "if (t0 + kRows < block.t_end) {")),
    ),
    "the first sample of another split": (
        "tf32",
        "rows",
        wrong(
            (
                KERNEL,
                "(units * (split + 1) / params.splits) * unit",
                "(units * (split + 1) / params.splits) * unit + (split == 0)",
            ),
            report="",
        ),
    ),
    # norms
    "norms without the last barrier": ("tf32", "rows", race((KERNEL, LAST_BARRIER, "//"))),
    "norms in one buffer": (
        "tf32",
        "rows",
        race(
            (KERNEL, NORM_LEFT, NORM_LEFT.replace("stage % 2", "0")),
            (KERNEL, NORM_READ, NORM_READ.replace("stage % 2", "0")),
        ),
    ),
    "a warp's norm is left out": (
        "tf32",
        "rows",
        wrong((KERNEL, "for (int w = 0; w < Traits::kWarps;", "for (int w = 1; w < Traits::kWarps;")),
    ),
    "all tiles' norms in one place": (
        "tf32",
        "rows",
        wrong((KERNEL, "static_cast<int64_t>(n + s) * tiles + tile]", "static_cast<int64_t>(n + s) * tiles]")),
    ),
    "a step of the warp's sum is missing": ("tf32", "rows", wrong((REDUCE, "lanes = 16;", "lanes = 8;"))),
    # fragments
    "halves and rows of a fragment swapped": (
        "tf32",
        "rows",
        wrong((FRAGMENTS, "b_hi[v / 2][v % 2 + 2 * half] = to_tf32", "b_hi[v / 2][v % 2 * 2 + half] = to_tf32")),
    ),
    "the columns of a lane in the wrong order": (
        "tf32",
        "rows",
        wrong((FRAGMENTS, "2 * (lane % 4) + run % 2, run", "lane % 4 + 4 * (run % 2), run")),
    ),
    "columns four apart in column-major slabs": (
        "tf32",
        "positions",
        wrong((FRAGMENTS, "from[Slab::at(0, 8 * j)]", "from[Slab::at(0, 4 * j)]")),
    ),
    "a product of the three is missing": (
        "tf32x3",
        "rows",
        wrong((FRAGMENTS, "mma_tf32(product[m], b_lo[m], a_hi);", ";"), report=""),
    ),
    "matrices of b swapped": (
        "bfloat16",
        "rows",
        wrong((FRAGMENTS, "matrix / 2 * 8, 16 * m + matrix % 2 * 8", "matrix % 2 * 8, 16 * m + matrix / 2 * 8")),
    ),
    "matrices of a swapped": (
        "float16",
        "positions",
        wrong((FRAGMENTS, "matrix % 2 * 8, 16 * n + matrix / 2 * 8", "matrix / 2 * 8, 16 * n + matrix % 2 * 8")),
    ),
    "no transposition": (
        "bfloat16",
        "channels_last",
        wrong((FRAGMENTS, "ldmatrix_x4<!Slab::kAlongT>", "ldmatrix_x4<Slab::kAlongT>")),
    ),
    # loaders
    "vectors past the last column": (
        "tf32",
        "rows",
        wrong(
            (
                TABLES,
                "column < x_.columns ? reinterpret_cast<int64_t>(data + column) : 0",
                "reinterpret_cast<int64_t>(data + column)",
            )
        ),
    ),
    "rows past the end hold the first one": (
        "tf32",
        "rows",
        wrong(
            (
                TABLES,
                "const bool valid = column && valid_rows >> half * Slab::kDepth & 1;",
                "const bool valid = column;",
            )
        ),
    ),
    "one warp prepares the rows of both operands": (
        "tf32",
        "rows",
        race(
            (
                KERNEL,
                "loader_b.prepare(stage, begin, threadIdx.x - 32);",
                "loader_b.prepare(stage, begin, threadIdx.x % 32);",
            )
        ),
    ),
    "columns past the edge": (
        "tf32",
        "elements",
        wrong((TABLES, "if (i >= x.columns) column.delta[1] = kNowhere;", "")),
    ),
    "rows past the edge": ("tf32", "elements", outside((TABLES, "if (!place.valid) row.corner[0] = kNowhere;", ""))),
    "no border above and below": (
        "tf32",
        "channels_last",
        wrong((TABLES, "row.corner[1] + column.delta[1] < static_cast<uint32_t>(x_.size[1]) &&", "")),
    ),
    "padding to the other side": (
        "tf32",
        "positions",
        wrong((TABLES, "x_.step[d] - x_.padding[d]", "x_.step[d] + x_.padding[d]")),
    ),
    "dilation is left out of the border": (
        "tf32",
        "positions",
        wrong((TABLES, "column.delta[d] = k[d] * x.dilation[d];", "column.delta[d] = k[d];")),
    ),
    "the step is left out": ("tf32", "channels_last", wrong((TABLES, "p[d] * x_.step[d]", "p[d]"))),
    "width and height of positions swapped": (
        "tf32",
        "elements",
        wrong((TABLES, "place.t % params_.positions[2]}", "place.t % params_.positions[1]}")),
    ),
    "too wide copies": (
        "tf32",
        "positions",
        Fault(
            PLAIN,
            REPORTED,
            "misaligned global address",
            [(PLAN, "((p.O == 1 && p.groups == 1) || divides(elements, p.b.stride_c))", "true")],
        ),
    ),
    "2-byte zeros are left out": ("bfloat16", "elements", wrong((TABLES, ": uint16_t{0};", ": uint16_t{0x3f80};"))),
    "rows of groups: always the first": ("tf32", "rows", wrong((KERNEL, "group * params.b.stride_group", "0"))),
    # the weight's columns
    "channels and places swapped": (
        "tf32",
        "channels_last",
        wrong((KERNEL, "i % channels * volume + i / channels", "i % volume * channels + i / volume")),
    ),
    "no edge below": ("tf32", "rows", outside_at_store((EPILOGUE, "if (o >= params.O) continue;", ""))),
    "wide stores into odd rows": (
        "tf32",
        "elements",
        outside_at_store((LAUNCH, "params.I % 4 == 0 && aligned(out.grad)", "aligned(out.grad)")),
    ),
    # results
    "the weight of the new sample": (
        "tf32",
        "rows",
        wrong((MOMENTS, "share(static_cast<float>(count) /", "share(static_cast<float>(count + 1) /")),
    ),
    "deviations from the sum": (
        "tf32",
        "rows",
        wrong((MOMENTS, "inverse(count ? 1.f / static_cast<float>(count) : 0.f)", "inverse(count ? 1.f : 0.f)")),
    ),
    "squares stay centered": (
        "tf32",
        "rows",
        wrong((EPILOGUE, "return params_.centered ? uncentered", "return false ? uncentered")),
    ),
    "weights are left out": ("tf32", "rows", wrong((EPILOGUE, "fmaf(weight, g", "fmaf(1.f, g"))),
    "all splits' sums in one place": (
        "tf32",
        "rows",
        wrong((EPILOGUE, "store(params_.partial_sums + part * elements(), sum)", "store(params_.partial_sums, sum)")),
    ),
    "splits of the positions begin at the first": (
        "tf32",
        "rows",
        wrong((KERNEL, "part % params.t_splits * params.t_per_split;", "0;")),
    ),
    "a part is left out": (
        "tf32",
        "rows",
        wrong((JOIN, "int s = 0; s < params.t_splits", "int s = 1; s < params.t_splits")),
    ),
    "norms of the parts": (
        "tf32",
        "rows",
        wrong((JOIN, "params.norms[n * columns + element / 32]", "params.norms[n * columns]")),
    ),
}


@pytest.fixture(scope="module")
def faulty_libraries():
    def build_one(entry):
        precision, loader, fault = entry
        return build(precision, [loader], sanitizer=fault.sanitizer, patches=[SMALL_TILE, *fault.patches])

    return FaultyLibraries(FAULTS, build_one)


@needs_harness
@pytest.mark.parametrize("name", FAULTS)
def test_fault_planted_in_contract_is_caught(faulty_libraries, name):
    precision, loader, fault = FAULTS[name]
    library = faulty_libraries[name]
    flags = ["--small-tile", "--exact"] if fault.sanitizer else ["--small-tile"]

    def run_one(seed):
        options = {"sanitizer": fault.sanitizer, "CUDA_ON_CPU_SEED": seed}
        return run(library, precision, [loader], "small", *flags, **options)

    check_fault(fault, run_one)
