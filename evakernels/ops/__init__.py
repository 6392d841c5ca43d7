"""One package per family; see `evakernels.dispatch` for how a call finds its implementation."""
