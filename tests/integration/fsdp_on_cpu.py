"""The `llmdistill` command with accelerate's FSDP2 on processes without accelerators.

Accelerate shards on accelerators only: on CPUs it takes the same settings and trains under DDP. PyTorch's FSDP2 itself
runs on CPUs, so what is missing there is one assignment, made here; all else is what a GPU node runs.
"""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from llmdistill.cli import main

_init = AcceleratorState.__init__


def _with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _with_fsdp  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
