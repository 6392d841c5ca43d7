"""Puts this package's functions into models of other codebases, and takes them out again.

`evakernels.integrations.<name>.replace(model)` changes a model in place and returns a `Report`; `report.undo()` changes
it back. Parameters, buffers, state-dict keys and hooks stay as they are. Nothing happens at import, and only the
codebase that is asked for is imported.

An integration is a module with a function `replace`, and forwards as plain functions at module level, so that a
replaced model can be pickled:

    def norm_forward(self, x):  # `self` is the module of the other codebase, with its own attributes
        if not bare(self.inner):  # somebody hooked or exchanged what would be bypassed: be what you were
            return original(self).forward(self, x)
        return evakernels.layer_norm(x, self.weight, self.bias, self.eps)

    def replace(model):
        plan = Plan("integrations.name", model)  # refuses what is no module, is on meta or has been replaced before
        for name, module in plan.modules():
            if type(module) is theirs.LayerNorm:  # exactly: a subclass may compute something else
                if module.weight is None:
                    plan.leave(name, "it has no weight")
                else:
                    plan.replace(name, module, "layer_norm", forward=norm_forward)
        return plan.carry_out("a model of theirs with LayerNorm")  # all or nothing

All is decided, and all that may fail done, before `carry_out`. Every module that the integration means to serve is then
in `report.replaced` with what computes it, or in `report.left` with the reason why it could not be.
"""

from evakernels.integrations.patch import Plan, Replaced, Report, original
from evakernels.nn import bare

__all__ = ["Plan", "Replaced", "Report", "bare", "original"]
