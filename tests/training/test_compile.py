"""``run.compile``: one graph for every image size, nothing in eager mode, and checkpoints that know nothing of it.

And ``run.attention_backends``, the other choice of how the same numbers are computed.
"""

import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from composer import Callback, Evaluator, Trainer
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.training.test_train import losses, weights
from vitcomposer import losses as loss_functions
from vitcomposer.algorithms import build_algorithms
from vitcomposer.callbacks import StepSeed
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model
from vitcomposer.schema import Run
from vitcomposer.tasks import ClassificationTask
from vitcomposer.training.execution import ATTENTION_BACKENDS, GRAPH_LIMIT, attention_order, compile_forward

SIZES = (16, 24, 32, 40)
MODELS = {
    "deit_tiny_patch16": {"depth": 1},
    "deit_tiny_distilled_patch16": {"depth": 1},
    "convit_tiny": {"depth": 2, "local_up_to_layer": 1},
}


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Listening to torch's trace of its own compiler takes longer than the compiler.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes become graphs as always and run as such, but are not compiled to machine code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


class GraphsPerStep(Callback):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def batch_end(self, state, logger) -> None:
        self.counts.append(counters["stats"]["unique_graphs"])


def batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(4, 3, size, size, generator=generator),
        "target": torch.softmax(torch.randn(4, 5, generator=generator), dim=1),
        "label": torch.randint(5, (4,), generator=generator),
        "sample_id": torch.arange(4) + seed,
    }


def fit(name: str, sizes: tuple[int, ...], *, compiled: bool, evaluate: bool = False) -> tuple[list[float], list[int]]:
    """One epoch with a batch of each size; returns the losses and the number of graphs after every batch."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_size=32, patch_size=8, drop_path_rate=0.2, **MODELS[name])
    task = ClassificationTask(model, loss=loss_functions.soft_target_cross_entropy, num_classes=5)
    if compiled:
        compile_forward(task)
    graphs, curve = GraphsPerStep(), []
    loader = DataLoader([batch(32, 99)], batch_size=None)
    evaluator = Evaluator(label="eval", dataloader=loader, metric_names=["top1"], device_eval_microbatch_size=4)

    class Curve(Callback):
        def after_loss(self, state, logger) -> None:
            curve.append(float(state.loss))

    algorithms = build_algorithms(
        {"EMA": {"half_life": "2ba"}, "GradientClipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        loss="soft_target_cross_entropy",
        precision="fp32",
        label_smoothing=0.1,
    )
    trainer = Trainer(
        model=task,
        train_dataloader=DataLoader([batch(size, i) for i, size in enumerate(sizes)], batch_size=None),
        eval_dataloader=evaluator if evaluate else None,
        max_duration="1ep",
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        algorithms=algorithms,
        callbacks=[StepSeed(0), graphs, Curve()],
        device="cpu",
        device_train_microbatch_size=4,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return curve, graphs.counts


@pytest.mark.parametrize("name", MODELS)
def test_four_image_sizes_make_four_graphs_and_none_later(name: str, quick_backend: None) -> None:
    curve, graphs = fit(name, SIZES * 2, compiled=True)
    assert graphs == [1, 2, 3, 4] + [4] * 4
    assert not counters["graph_break"] and not counters["unimplemented"]
    # Drop path and dropout draw what they draw in eager mode.
    assert curve == pytest.approx(fit(name, SIZES * 2, compiled=False)[0], rel=1e-5)


def test_evaluation_has_one_graph_of_its_own(quick_backend: None) -> None:
    fit("deit_tiny_patch16", SIZES * 2, compiled=True, evaluate=True)
    assert counters["stats"]["unique_graphs"] == len(SIZES) + 1


def test_more_sizes_than_torch_keeps_graphs_for_are_an_error(quick_backend: None) -> None:
    sizes = tuple(8 * n for n in range(1, GRAPH_LIMIT + 2))
    with pytest.raises(ConfigError, match="run.compile must be false for a network that sees more than 8 shapes"):
        fit("deit_tiny_patch16", sizes, compiled=True)


def test_graph_break_is_an_error(quick_backend: None) -> None:
    class Breaks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            torch._dynamo.graph_break()  # what one version of torch cannot trace, the next one can
            return x + 1

    module = Breaks()
    compile_forward(module)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        module(torch.ones(3))


DEIT = str(ROOT / "yamls/deit_ti.yaml")


def test_run_goes_on_from_eager_to_compiled_and_back(photo_mds: Path, tmp_path: Path, quick_backend: None) -> None:
    """``run`` may change on a resume: the weights keep their names, the losses differ by rounding only."""
    stages = ((1, "false"), (2, "true"), (3, "false"))
    for name, choices in (("eager", stages[2:]), ("mixed", stages)):
        for stop, compiled in choices:
            overrides = [
                *tiny_photo_overrides(photo_mds, tmp_path, name),
                "schedule.alpha_f=1",
                "run.eval_interval=5ba",
            ]
            overrides += ["schedule.t_warmup=0ba", f"max_duration={2 * stop}ba", f"run.compile={compiled}"]
            assert run_train([DEIT, *overrides]) == 0
            assert bool(counters["stats"]["unique_graphs"]) == (name == "mixed" and stop > 1)
    assert weights(tmp_path / "mixed").keys() == weights(tmp_path / "eager").keys()
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler and the headers of Python on a CPU")
def test_compiled_network_has_the_outputs_and_gradients_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real compiler, which takes a minute or two unless it did the same before."""
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool, whose start takes longer
    torch.manual_seed(0)
    model = build_model("deit_tiny_patch16", num_classes=5, image_size=16, patch_size=8, depth=1, drop_path_rate=0)
    model.requires_grad_(True)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    eager = step()
    compile_forward(model)
    compiled = step()
    assert counters["stats"]["unique_graphs"] == 1
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert eager["patch_embed.proj.weight"].abs().max() > 1e-4


def test_microbatches_of_two_sizes_are_refused(
    photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "micro"), "run.compile=true"]
    assert run_train([DEIT, *overrides, "run.device_train_microbatch_size=5"]) == 2
    assert "run.device_train_microbatch_size must be a divisor of the 16 images" in capsys.readouterr().err


def test_attention_backends_are_allowed_and_ordered_as_listed() -> None:
    before = torch._C._get_sdp_priority_order()
    with attention_order(["efficient", "math"]):
        assert torch._C._get_sdp_priority_order()[:2] == [
            ATTENTION_BACKENDS[name].value for name in ("efficient", "math")
        ]
        assert not torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    with attention_order(None):
        assert torch._C._get_sdp_priority_order() == before and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has backends to choose from")
def test_attention_backends_are_refused_on_a_cpu(
    photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "backends"), "run.attention_backends=[flash]"]
    assert run_train([DEIT, *overrides]) == 2
    assert "run.attention_backends must be null on a CPU" in capsys.readouterr().err


def test_an_attention_backend_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="run.attention_backends must be one or more names, each once"):
        Run(name="x", attention_backends=["flash", "flash"])
