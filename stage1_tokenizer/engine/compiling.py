"""torch.compile in training, by Accelerate's own switch: nothing here turns it on.

    accelerate launch --dynamo_backend inductor [--dynamo_mode reduce-overhead] stage1_tokenizer/train.py
    accelerate launch --dynamo_backend inductor --dynamo_use_regional_compilation stage2_prior/train.py
    ACCELERATE_DYNAMO_BACKEND=inductor [ACCELERATE_DYNAMO_MODE=reduce-overhead] python stage2_prior/train.py

Compiled by regions, a prior's equal layers are compiled once: the first step takes a fraction of the time.
`accelerator.prepare` compiles what is trained; what is validated, saved and sampled from is the module itself, so that
checkpoints know nothing of it. With `reduce-overhead` a GPU replays CUDA graphs, whose outputs lie in fixed memory:
they stay as they are until the next step, which `begin_step` announces.
"""

import warnings
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from stage1_tokenizer.engine.errors import ConfigError

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of the backend inductor that record CUDA graphs."""


class Compiling:
    """What the switch asks for, checked. Without it, all of this does nothing."""

    def __init__(self, accelerator: Accelerator, eager: Sequence[nn.Module] = (), keeps_graph: bool = False) -> None:
        """To be made before `accelerator.prepare`. `eager`: submodules to leave as they are, since they learn in other
        ways than by gradient. `keeps_graph`: a step goes back through the same graph several times.

        Raises:
            ConfigError: the switch asks for something that cannot work here.
        """
        plugin = accelerator.state.dynamo_plugin
        backend = plugin.backend.value.lower()
        self._on = backend != "no"
        if not self._on:
            return
        graphs = backend == "cudagraphs" or (backend == "inductor" and plugin.mode in GRAPH_MODES)
        self._graphs = graphs and accelerator.device.type == "cuda"
        _check(accelerator, backend, bool(eager), graphs, keeps_graph)
        # Accelerate turns this on with its switch; but codes are looked up, and guarded, in float32.
        torch.backends.cuda.matmul.allow_tf32 = False
        if keeps_graph:
            torch._functorch.config.donated_buffer = False  # a graph's memory is not free after its first backward pass
        # The compiler itself looks at the gradients of its inputs, which need not be leaves.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        for module in eager:
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
        accelerator.print(f"dynamo={backend} mode={plugin.mode}: the first step takes a while, since it compiles")

    def begin_step(self) -> None:
        """To be called before each optimizer step: what CUDA graphs put out in the last one is not needed any more."""
        if self._on and self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _check(accelerator: Accelerator, backend: str, has_eager: bool, graphs: bool, keeps_graph: bool) -> None:
    plugin = accelerator.state.dynamo_plugin
    if plugin.use_regional_compilation and has_eager:
        raise ConfigError(
            "--dynamo_use_regional_compilation (ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION) is for priors, whose "
            "layers are equal; a tokenizer is compiled whole; leave it out"
        )
    if plugin.fullgraph and has_eager:
        raise ConfigError(
            "--dynamo_use_fullgraph (ACCELERATE_DYNAMO_USE_FULLGRAPH) cannot work here: the bottleneck stays outside "
            "of what is compiled, since codebooks learn in other ways than by gradient; leave it out"
        )
    if graphs and keeps_graph:
        raise ConfigError(
            f"dynamo backend {backend} in mode {plugin.mode} records CUDA graphs, which the adaptive weight of the "
            "adversarial term would have to run backward three times; give --dynamo_mode default, or "
            "--no-adversarial.adaptive"
        )
    if backend == "inductor" and accelerator.device.type == "cpu":
        # Imported here, since it takes seconds.
        from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
        from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ConfigError(
                "dynamo backend inductor compiles C++ on a CPU, and no compiler was found; install g++, name one in "
                "the environment variable CXX, or train without --dynamo_backend (ACCELERATE_DYNAMO_BACKEND)"
            ) from None
