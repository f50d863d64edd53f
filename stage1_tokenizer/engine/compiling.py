"""torch.compile in training: turned on by Accelerate's options, or for a prior by --compile (`wish`), which decides by
the rule of `pays`. The run's states record whether it is on, and a resumed run goes on alike: another order of sums
would make it another run.

    python stage2_prior/train.py --compile always
    accelerate launch --dynamo_backend inductor [--dynamo_mode reduce-overhead] stage1_tokenizer/train.py
    accelerate launch --dynamo_backend inductor --dynamo_use_regional_compilation stage2_prior/train.py
    ACCELERATE_DYNAMO_BACKEND=inductor [ACCELERATE_DYNAMO_MODE=reduce-overhead] python stage2_prior/train.py

With regional compilation the equal layers of a prior are compiled once, so the first step takes a fraction of the time.
`accelerator.prepare` compiles the training step only. Validation, saving and sampling use the module itself, so
weights files do not depend on compilation. With `reduce-overhead` a GPU replays CUDA graphs. Their outputs lie in fixed
memory and are valid until `begin_step` announces the next step.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.precision import is_compiled

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of the inductor backend that record CUDA graphs."""


Wish = Literal["auto", "always", "never"]
"""Compile where it pays, always, or not at all."""
BACKEND = DynamoBackend.INDUCTOR
"""The backend that `wish` turns on."""
LEAST_STEPS = 500
"""Fewest steps of a training that `auto` compiles. Compiling takes 8 to 30 seconds, and a step of a GPT in bfloat16
takes 0.7 to 0.9 times as long afterwards (two cores with AVX-512 BF16, 4 layers of 128 to 6 of 256)."""


def pays(accelerator: Accelerator, steps: int) -> bool:
    """Return True if `auto` compiles the training of a GPT of so many steps: in bfloat16, where compiling works.

    In float32 on a CPU a compiled step was no faster. The rule does not depend on measured times.
    """
    return steps >= LEAST_STEPS and accelerator.mixed_precision == "bf16" and compiles(accelerator.device)


def compiles(device: torch.device) -> bool:
    """Return True if torch.compile works here, by trying it: a compiler may be there and its headers missing."""
    keep_results()
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except (RuntimeError, OSError, ImportError):
        return False
    finally:
        torch.compiler.reset()
    return True


def keep_results() -> None:
    """Keep the compiler's results in the user's folder, so that a second start with the same model takes seconds.

    torch's own place is a temporary folder. TORCHINDUCTOR_CACHE_DIR names another one.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path.home() / ".cache" / "tessera" / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):  # the user has no home folder, or cannot write there
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


class Compiling:
    """The settings of torch.compile, checked. Without torch.compile, this class does nothing."""

    def __init__(
        self,
        accelerator: Accelerator,
        eager: Sequence[nn.Module] = (),
        keeps_graph: bool = False,
        wish: Wish = "never",
        steps: int = 0,
        was_on: bool | None = None,
    ) -> None:
        """Check the settings and prepare torch. Call it before `accelerator.prepare`.

        eager: submodules that stay uncompiled, since they do not learn by gradients alone.
        keeps_graph: a step runs backward through the same graph several times.
        wish: what to do if Accelerate's switch is off. The equal layers of the model are then compiled once.
        steps: steps of the whole training, for the wish `auto`.
        was_on: True or False if a run is resumed that was compiled or not; `auto` does the same.

        Raises:
            ConfigError: the settings cannot work with this training.
        """
        plugin = accelerator.state.dynamo_plugin
        # `pays` comes last: it tries a compiler, which takes seconds.
        if not is_compiled(accelerator) and (
            wish == "always" or (wish == "auto" and (pays(accelerator, steps) if was_on is None else was_on))
        ):
            plugin.backend, plugin.use_regional_compilation = BACKEND, True
        backend = plugin.backend.value.lower()
        self._is_on = is_compiled(accelerator)
        if not self._is_on:
            return
        uses_graphs = backend == "cudagraphs" or (backend == "inductor" and plugin.mode in GRAPH_MODES)
        self._uses_graphs = uses_graphs and accelerator.device.type == "cuda"
        _check(accelerator, backend, bool(eager), uses_graphs, keeps_graph)
        # Accelerate turns TF32 on together with torch.compile, but codes are looked up in float32.
        torch.backends.cuda.matmul.allow_tf32 = False
        if keeps_graph:
            torch._functorch.config.donated_buffer = (
                False  # the memory of a graph is needed after its first backward pass
            )
        # The compiler reads the gradients of its inputs, which need not be leaves.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        for module in eager:
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
        keep_results()
        accelerator.print(f"dynamo={backend} mode={plugin.mode}: the first step compiles and takes longer")

    def begin_step(self) -> None:
        """Tell CUDA graphs that the outputs of the last step are free. Call it before each optimizer step."""
        if self._is_on and self._uses_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _check(accelerator: Accelerator, backend: str, has_eager: bool, uses_graphs: bool, keeps_graph: bool) -> None:
    plugin = accelerator.state.dynamo_plugin
    if plugin.use_regional_compilation and has_eager:
        raise ConfigError(
            "--dynamo_use_regional_compilation (ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION) works for priors only, "
            "whose layers are equal. Leave it out: a tokenizer is compiled as a whole"
        )
    if plugin.fullgraph and has_eager:
        raise ConfigError(
            "--dynamo_use_fullgraph (ACCELERATE_DYNAMO_USE_FULLGRAPH) cannot work here, since the bottleneck is not "
            "compiled (codebooks do not learn by gradients alone). Leave it out"
        )
    if uses_graphs and keeps_graph:
        raise ConfigError(
            f"dynamo backend {backend} in mode {plugin.mode} records CUDA graphs, but the adaptive weight of the "
            "adversarial term runs backward three times through one graph. Give --dynamo_mode default, or "
            "--no-adversarial.adaptive"
        )
    if backend == "inductor" and accelerator.device.type == "cpu":
        # These imports take seconds.
        from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
        from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ConfigError(
                "dynamo backend inductor needs a C++ compiler on a CPU, and none was found. Install g++, name a "
                "compiler in the environment variable CXX, or train with --compile never and without "
                "--dynamo_backend (ACCELERATE_DYNAMO_BACKEND)"
            ) from None
