"""The loop on a static cache samples what the growing one does, and never waits for the device between two looks."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lit_ppo.generation import capture, compiled, static
from lit_ppo.generation import transformers as engine
from lit_ppo.generation.batch import CACHE, Batch
from lit_ppo.generation.buffers import LayerBuffer
from lit_ppo.generation.config import checked_generation, generation_config, neutral
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm, load_tokenizer
from lit_ppo.models.lora import add_adapter
from lit_ppo.parallel.ranks import n_ranks, rank
from tests.helpers.graphs import Graph
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer

SLIDING: dict[str, Any] = {"sliding_window": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {}, "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": SLIDING,
    "gemma3_text": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
STOPS = [1, 20, 24, 28, 32]
LONG = [5, 6, 7, 8, 9, 10, 11, 12, 13]  # longer than the window
PROMPTS = [[5, 6], [7, 8, 9, 10], [5, 6], LONG, [11], LONG, [5, 6], [14, 15]]
ALL = range(len(PROMPTS))
WIDTH = len(LONG) + 1
IDS = torch.tensor([[0] * (WIDTH - len(row)) + row for row in PROMPTS])
MASK = torch.tensor([[False] * (WIDTH - len(row)) + [True] * len(row) for row in PROMPTS])


def make_actor(folder: Path, family: str, lora: bool = False, **shape: Any) -> Actor:
    path = make_causal_lm(folder, family, scale=6.0, **FAMILIES[family], **shape)
    actor = Actor(load_causal_lm("actor", str(path), {}))
    if lora:
        add_adapter("LitPPO(actor_lora", actor.model, {"r": 2, "target_modules": "all-linear"}, 0)
        with torch.no_grad():
            for name, parameter in actor.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3)
    return actor


@pytest.fixture(scope="module", params=[*FAMILIES, "lora"])
def actor(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Actor:
    lora = request.param == "lora"
    return make_actor(tmp_path_factory.mktemp(request.param), "llama" if lora else request.param, lora)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Actor:
    return make_actor(tmp_path_factory.mktemp("llama"), "llama")


def sample(actor: Actor, cache: str = "static", *, seed: int | None = 0, rows: Any = ALL, **generation: Any) -> Any:
    fields = {"max_new_tokens": 40, "eos_token_id": STOPS, "cache_implementation": cache, **generation}
    tokenizer = load_tokenizer("tokenizer", actor.model.name_or_path)
    config = generation_config(checked_generation("LitPPO", fields), 0.8, actor.model, tokenizer)
    seeds = None if seed is None else [(seed, 0, 0, row, 0) for row in rows]
    padding = 0 if rows is ALL else WIDTH - max(len(PROMPTS[row]) for row in rows)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if cache == "static":  # no silent way round
            patch.setattr(engine, "_decode_growing", None)
        return actor.generate(IDS[rows, padding:], MASK[rows, padding:], config, seeds, logprobs=True)


def same(found: Any, expected: Any) -> None:
    assert (found.ids, found.ended) == (expected.ids, expected.ended)
    logprobs = (torch.tensor([x for row in one.logprobs for x in row]) for one in (found, expected))
    torch.testing.assert_close(*logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "suppress_tokens": [6]},
        {"repetition_penalty": 1.5, "bad_words_ids": [[6, 7]], "min_new_tokens": 3, "encoder_no_repeat_ngram_size": 3},
        {"seed": None},
        {"max_new_tokens": 1},
    ],
)
def test_samples_are_those_of_the_growing_cache(actor: Actor, knobs: dict[str, Any]) -> None:
    expected = sample(actor, "dynamic", **knobs)
    same(sample(actor, **knobs), expected)
    assert len({len(row) for row in expected.ids}) > 2 or {"max_new_tokens", "seed"} & set(knobs)


def test_greedy_responses_are_those_of_stock_generate(actor: Actor) -> None:
    stock = actor.model.generate(
        IDS, attention_mask=MASK.long(), do_sample=False, max_new_tokens=40, eos_token_id=STOPS, pad_token_id=0
    )[:, WIDTH:].tolist()
    found = sample(actor, seed=None)
    assert [row[: len(ids)] for row, ids in zip(stock, found.ids, strict=True)] == found.ids
    assert all(not any(row[len(ids) :]) for row, ids in zip(stock, found.ids, strict=True))


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique", "_to_cpu")


class Watch(TorchDispatchMode):
    """Kernels that wait for the device, and the most bytes that one allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.largest = self.kernels = 0
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
        )
        self.waits += [name] if by_mask or name.startswith(WAITS) else []
        output = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        new = [x.untyped_storage() for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.nbytes() for x in new if x.data_ptr() not in held)])
        self.kernels += 1
        met = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)]
        self.devices |= {x.device.type for x in met}
        return output


@pytest.mark.parametrize("knobs", [{}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9}, {"seed": None}])
def test_no_step_waits_for_the_device_or_allocates_a_cache(
    actor: Actor, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, layer, call = Watch(), [], static.Step.__call__

    def watched(step: static.Step, *choose: Any) -> None:
        layer.append(step.cache.layers[0].keys.untyped_storage().nbytes())
        with watch:
            call(step, *choose)

    monkeypatch.setattr(static.Step, "__call__", watched)
    sample(actor, **knobs)
    assert watch.kernels > 20 * len(layer) > 200
    assert not watch.waits
    assert 0 < watch.largest < min(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_reads_a_value_or_moves_a_tensor_between_host_and_device(family: str, tmp_path: Path) -> None:
    """On the meta device nothing can be read, and each tensor of the host shows."""
    path = make_causal_lm(tmp_path, family, **FAMILIES[family])
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()
        ids, mask = torch.zeros(8, 16, dtype=torch.long), torch.ones(8, 16, dtype=torch.bool)
        draws, stops = torch.zeros(8, 32, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
        processors = LogitsProcessorList(
            [TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)]
        )
        config = neutral(max_new_tokens=32, temperature=0.7)
        model.config.pad_token_id = None  # GPT-2 looks for padding where it is given no mask
        cache = DynamicCache(config=model.config)
        logits = model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[:, -1]
        batch = Batch(model, ids, mask, processors, config, draws, stops, True, None)
        step = static.Step(batch, cache, torch.arange(8), {"use_cache": True})
        step.choose(logits)
        step.show(4, 20)
    with torch.no_grad(), static.heads_in_groups(model), Watch() as watch:
        step()
    assert watch.kernels > 200
    assert watch.devices == {"meta"}


def test_the_batch_shrinks_by_halves_and_attention_reads_a_few_lengths(
    llama: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 tokens in looks of 16: the 210 places are held as 256, of which 64, 128, 192 or all are read."""
    shapes, show = [], static.Step.show

    def noted(step: static.Step, *args: int) -> tuple[int, int]:
        shapes.append(show(step, *args))
        return shapes[-1]

    sample(llama)  # the first on a static cache also checks the model
    monkeypatch.setattr(static.Step, "show", noted)
    found = sample(llama, max_new_tokens=200, eos_token_id=[1])
    assert len(shapes) <= 1 + 13  # the first is that of the full buffers
    assert {n for n, _ in shapes} <= {8, 4, 2, 1}
    assert {length for _, length in shapes} <= {64, 128, 192, 256}
    assert shapes[1][0] == 8 > shapes[-1][0]
    monkeypatch.undo()
    same(found, sample(llama, "dynamic", max_new_tokens=200, eos_token_id=[1]))


@pytest.mark.parametrize("knobs", [{}, {"repetition_penalty": 1.5}])
def test_replayed_kernels_sample_the_same(actor: Actor, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph would do: all that changes from token to token must lie in tensors that stay in place."""
    expected = sample(actor, **knobs)
    monkeypatch.setattr(capture, "KINDS", ("cpu",))
    for name in ("Stream", "current_stream", "stream", "default_generators"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(Graph, "replays", 0)
    same(sample(actor, **knobs), expected)
    assert 1 <= Graph.made < 8
    assert Graph.replays > 2 * Graph.made
    assert sample(actor, disable_compile=True, **knobs).ids == expected.ids


def test_where_nothing_can_be_recorded_the_steps_run_as_they_are(
    llama: Actor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    expected = sample(llama)
    monkeypatch.setattr(capture, "KINDS", ("cpu",))
    for name in ("Stream", "current_stream", "stream", "default_generators"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    broken = MagicMock(side_effect=RuntimeError("operation not permitted when stream is capturing"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", broken)
    same(sample(llama), expected)
    same(sample(llama), expected)
    assert broken.call_count == 2
    assert caplog.text.count("without CUDA graphs: operation not permitted when stream is capturing") == 1


def test_which_attention_fits(llama: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    sample(llama)  # the first on a static cache also checks the model
    cache = DynamicCache(config=llama.model.config)
    cache.update(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), 0)
    cache.update(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), 1)
    for attention, fits in (("eager", True), ("flash_attention_2", True), ("flex_attention", False)):
        monkeypatch.setattr(llama.model.config, "_attn_implementation", attention)
        assert static.fits(llama.model, cache, {}) == fits


@pytest.mark.parametrize("why", ["family", "logits"])
def test_a_model_that_does_not_fit_samples_with_the_growing_cache_and_says_so_once(
    llama: Actor, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    capture.say_once.cache_clear()
    expected = sample(llama, "dynamic")
    if why == "family":
        monkeypatch.setattr(llama.model, "_can_compile_fullgraph", False)
        said = "since transformers does not run it on a static cache"
    else:
        static._AGREEING.clear()
        monkeypatch.setattr(LayerBuffer, "update", lambda buffer, keys, values, *_, **__: (buffer.keys, buffer.values))
        said = "since its logits differ with a static cache"
    config = generation_config(
        {"max_new_tokens": 40, "eos_token_id": STOPS, "cache_implementation": "static"}, 0.8, llama.model,
        load_tokenizer("tokenizer", llama.model.name_or_path),
    )  # fmt: skip
    seeds = [(0, 0, 0, row, 0) for row in range(len(PROMPTS))]
    with torch.no_grad():
        found = [llama.generate(IDS, MASK, config, seeds, logprobs=True) for _ in range(2)]
    static._AGREEING.clear()
    same(found[0], expected)
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_distinct_prompts_are_read_once(actor: Actor, cache: str) -> None:
    """Five of the eight are distinct; each row still has its own samples."""
    sample(actor, cache)  # the first on a static cache also checks the model
    read: list[tuple[int, ...]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.append(tuple(kwargs["input_ids"].shape))

    with actor.model.register_forward_pre_hook(note, with_kwargs=True):
        together = sample(actor, cache)
    assert read[0] == (5, WIDTH)
    assert all(length == 1 for _, length in read[1:])
    assert together.ids[0] != together.ids[2]
    alone = [row for i in range(len(PROMPTS)) for row in sample(actor, cache, rows=[i]).ids]
    assert alone == together.ids


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_graph_serves_all_blocks_tokens_rows_and_lengths(family: str, tmp_path: Path) -> None:
    """Blocks and the choice of a token, twice each, since a mask that is read in full is another layout of memory."""
    llama = make_actor(tmp_path, family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 5})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling = {"compile_config": {"backend": "aot_eager", "fullgraph": True}}
    shapes: list[dict[str, Any]] = [{}, {"rows": [0, 1, 3]}, {"max_new_tokens": 70}, {"rows": [0, 2], "seed": 1}]
    for shape in shapes:
        same(sample(llama, **compiling, **shape), sample(llama, **shape))
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()


def test_compiled_blocks_with_windows_sample_the_same_and_a_model_without_numbers_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    actor = make_actor(tmp_path, "gemma3_text")
    compiling = {"compile_config": {"backend": "eager"}, "max_new_tokens": 20}
    same(sample(actor, **compiling), sample(actor, max_new_tokens=20))
    assert "is compiled" not in caplog.text
    actor.model._no_split_modules = actor.model.base_model._no_split_modules = None
    same(sample(actor, **compiling), sample(actor, max_new_tokens=20))
    assert caplog.text.count("only the choice of a token is compiled") == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_compiled_code_finds_the_weights_in_the_dtype_of_autocast(family: str, tmp_path: Path) -> None:
    model = make_actor(tmp_path, family).model
    before = {name: (p, p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    config = neutral(max_new_tokens=4, compile_config={})
    with torch.autocast("cpu", torch.bfloat16), compiled.cast_for_compiled_code(model, config, torch.device("cpu")):
        found = {name: p.dtype for name, p in model.named_parameters()}
    halved = {name.rpartition(".")[0].rpartition(".")[2] for name, kind in found.items() if kind == torch.bfloat16}
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name, kind in found.items() if kind == torch.float32}
    layers = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "llama": {*"qkvo", "gate", "up", "down"}}[family]
    assert {name.removesuffix("_proj") for name in halved} == {name.removesuffix("_proj") for name in layers}
    assert kept & {"wte", "embed_tokens"}
    assert not kept & halved
    assert {name: (p, p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before


def sample_sharded(folder: Path) -> None:
    """On each rank: an update on each cache."""
    for cache in ("dynamic", "static"):
        generation = {"max_new_tokens": 8, "cache_implementation": cache}
        module = make_module(folder / "llama", samples_per_prompt=2, generation=generation)
        trainer = make_trainer(folder, devices=n_ranks(), strategy="fsdp2", max_steps=1)
        trainer.fit(module, make_data(folder))
        if rank() == 0:
            torch.save(logged(trainer)[0], folder / f"{cache}.pt")


def test_sharded_models_sample_on_a_static_cache(tmp_path: Path) -> None:
    make_actor(tmp_path / "llama", "llama")
    on_ranks(2, sample_sharded, tmp_path, folder=tmp_path)
    dynamic, found = (torch.load(tmp_path / f"{cache}.pt") for cache in ("dynamic", "static"))
    for name in ("response/length", "objective/score", "policy/loss", "objective/kl"):
        assert float(found[name]) == pytest.approx(float(dynamic[name]), rel=1e-4, abs=1e-5)
