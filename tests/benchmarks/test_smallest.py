"""What compute-sanitizer watches is every family that has compiled kernels."""

from importlib.util import find_spec
from pkgutil import iter_modules

from benchmarks import smallest
from evakernels import ops


def test_every_compiled_family_is_run():
    families = {module.name for module in iter_modules(ops.__path__) if module.ispkg}
    compiled = {family for family in families if find_spec(f"evakernels.ops.{family}.cuda")}
    assert compiled == smallest.FAMILIES.keys()
