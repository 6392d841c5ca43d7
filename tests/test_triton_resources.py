"""The table of Triton kernels is that of these sources, and none of them wants more than there is."""

import hashlib
from operator import itemgetter

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from benchmarks import harness, resources, triton_resources  # noqa: E402
from evakernels import jit, native  # noqa: E402

FACTOR = tl.constexpr(3)


@triton.jit
def helper(x):
    return x + 1


@triton.jit
def other_helper(x):
    return x + 2


@jit.kernel
def product(x_ptr, y_ptr, out_ptr, factor, N: tl.constexpr, STEPS: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)
    total = tl.zeros((N, N), tl.float32)
    for step in range(STEPS):
        total += tl.dot(tl.load(x_ptr + step * N * N + at), tl.load(y_ptr + step * N * N + at))
    tl.store(out_ptr + at, helper(total * factor) * FACTOR)


def launched(n=64, warps=4, stages=3, architecture="sm_80"):
    with jit.recorded() as launches:
        x = torch.ones(n, n, dtype=torch.bfloat16)
        jit.launch(product, (1,), x, x, x.float(), 0.5, N=n, STEPS=8, warps=warps, stages=stages)
    return triton_resources.Compiled(architecture, "here", *launches)


@pytest.fixture
def cuobjdump(compiling):
    if not resources.cuobjdump():
        pytest.skip("cuobjdump is missing; it comes with CUDA and with triton")


def test_what_wants_triton_to_compile_passes_in_a_process_of_its_own(where_triton_compiles):
    assert where_triton_compiles.returncode == 0, where_triton_compiles.stdout
    assert "Triton interprets here" not in where_triton_compiles.stdout


@pytest.fixture
def committed(compiling):
    if not triton_resources.table().exists():
        pytest.skip(f"there is no table of this Triton version ({triton_resources.table().name})")
    return triton_resources.committed()


def test_the_table_is_that_of_these_sources(committed):
    now = [triton_resources.described(one) for one in triton_resources.launched()]
    fields = itemgetter(*now[0])
    assert [*map(fields, committed)] == [*map(fields, now)], "run `python -m benchmarks.resources --of triton`"


def test_no_kernel_of_the_table_wants_too_much(committed):
    assert not triton_resources.too_much(committed)


def test_one_of_each_kernel_compiles_and_as_the_table_says_where_there_is_one(cuobjdump):
    """Which one, a hash says: the next version of its code is compiled for other sizes."""
    chosen = {}
    for one in triton_resources.launched():
        said = "".join(triton_resources.described(one).values())
        hashed = hashlib.sha256(said.encode()).hexdigest()
        chosen[one.launch.kernel] = min(chosen.get(one.launch.kernel, ("~", None)), (hashed, one), key=itemgetter(0))
    table = triton_resources.committed() if triton_resources.table().exists() else None
    for row in triton_resources.rows([one for _, one in chosen.values()]):
        assert table is None or {key: str(row[key]) for key in triton_resources.FIELDS} in table


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_row_has_what_the_compilers_made_of_a_kernel(cuobjdump, architecture):
    (row,) = triton_resources.rows([launched(architecture=architecture)])
    assert row["kernel"] == "product<bf16 bf16 float, N=64, STEPS=8>"
    assert (row["architecture"], row["at"], row["threads"], row["stages"]) == (architecture, "here", "128", "3")
    assert row["HGMMA" if architecture == "sm_90" else "HMMA"] and row["LDGSTS"]
    assert not row["HMMA" if architecture == "sm_90" else "HGMMA"]
    assert 2 * 2 * 64 * 64 * 2 <= row["shared_bytes"] <= 3 * 2 * 64 * 64 * 2 + 1024  # stages of two tiles
    assert row["warps"] == 4 * row["blocks"] > 0
    assert not triton_resources.too_much([row])


def test_what_has_not_changed_is_not_compiled_again(compiling, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(triton_resources, "table", lambda: tmp_path / "table.csv")
    monkeypatch.setattr(triton_resources, "rows", lambda some: compiled.append(some) or [{"new": one} for one in some])
    small, large = launched(16), launched(32)
    assert triton_resources.renewed([small, large]) == [{"new": small}, {"new": large}]
    resources.write(triton_resources.table(), triton_resources.FIELDS, [triton_resources.described(small)])
    kept, new = triton_resources.renewed([small._replace(at="elsewhere"), large])
    assert (kept["kernel"], kept["at"], new) == (small.name, "elsewhere", {"new": large})
    assert triton_resources.renewed([launched(16, warps=8)]) == [{"new": launched(16, warps=8)}]
    monkeypatch.setitem(globals(), "helper", other_helper)
    assert triton_resources.renewed([small]) == [{"new": small}]
    assert len(compiled) == 4


def test_a_kernel_that_wants_too_much_is_named(cuobjdump):
    (row,) = triton_resources.rows([launched(128, warps=2, stages=1)])
    (said,) = triton_resources.too_much([row])
    assert "product<bf16 bf16 float, N=128, STEPS=8> on sm_80 has " in said and said.endswith(" bytes of stack")
    wide = row | {"stack_bytes": 0, "spills": 0, "shared_bytes": (163 << 10) + 1}
    assert triton_resources.too_much([wide]) == [f"{wide['kernel']} on sm_80 wants 163 KiB of shared memory"]
    assert not triton_resources.too_much([wide | {"architecture": "sm_90"}])


def test_the_hash_is_that_of_the_code_and_of_what_it_calls(compiling, monkeypatch):
    before = triton_resources.source(product)
    assert before == triton_resources.source(product)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "helper", other_helper)
        assert triton_resources.source(product) != before
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "FACTOR", tl.constexpr(4))
        assert triton_resources.source(product) != before
    assert before == triton_resources.source(product)


def test_a_card_answers_what_configurations_ask():
    device = torch.device("cpu")
    with triton_resources.card("sm_90"):
        assert jit.capability(device) == (9, 0)
        assert native.shared_memory(device) == 227 << 10
        assert native.multiprocessors(device) == 132
        assert harness.device() == device
    assert jit.capability(device) == (8, 0)
