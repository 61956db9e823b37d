"""DyMU beside what other people do to a model: adapters, quantisation, exchanged modules, wrappers, threads, Ctrl-C,
other default types. Each in any order with `apply`, right or refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import dymu
import tiny
import tiny_families
from by_hand import unmerged_by_hand
from dymu.errors import DymuError, UnsupportedModel
from dymu.families.resolve import resolve
from dymu.hooks.versions import going_on
from dymu.pruning import DART, FastV, SkipFFN, SparseVLM
from dymu.reducers import SAINT, AveragePool, CDPruner, FasterVLM, RandomKeep, ThresholdMerge, VScan
from tiny import answer, asked

NOTHING = ThresholdMerge((2.0,) * tiny.LAYERS)
SOME = ThresholdMerge((0.9,) * tiny.LAYERS)

Change = Callable[[Any], None]


@pytest.fixture(
    params=[("clip", "llama"), ("dinov2_with_registers", "qwen3"), ("siglip", "qwen2", "llava_onevision")], ids="-".join
)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.llava(*request.param)


# ------------------------------------------------------------------------------------------------- exchanged modules


class Adapted(nn.Module):
    """A projection with another beside it."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.more = nn.Parameter(0.2 * torch.randn(base.weight.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(x, self.more)


def adapt_the_encoder(model: Any) -> None:
    parts, path = resolve(model), resolve(model).tower_kind.query
    for seed, layer in enumerate(parts.encoder_modules):
        module, name = layer.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        setattr(module, name, Adapted(getattr(module, name), seed))


def adapt_the_decoder(model: Any) -> None:
    for seed, attention in enumerate(resolve(model).attentions):
        attention.k_proj = Adapted(attention.k_proj, seed)


def other(module: nn.Module) -> nn.Module:
    """A new module of the same kind with other weights, and nothing that hangs on the old one."""
    new = type(module)(module.config, *([module.layer_idx] if hasattr(module, "layer_idx") else []))
    generator = torch.Generator().manual_seed(7)
    for parameter in new.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return new.eval()


def exchange_a_layer(model: Any) -> None:
    layers = model.model.vision_tower.get_submodule(resolve(model).tower_kind.layers)
    layers[1] = other(layers[1]) if hasattr(layers[1], "config") else copy_of(layers[1])


def copy_of(layer: nn.Module, flip: bool = True) -> nn.Module:
    """A copy of a layer with nothing that hangs on the old one, its weights turned round."""
    new = copy.copy(layer)
    new.__dict__ = {name: value for name, value in layer.__dict__.items() if name != "forward"}
    new._modules = {name: copy.deepcopy(module) for name, module in layer._modules.items()}
    for parameter in new.parameters():
        parameter.data = parameter.data.flip(0) if flip else parameter.data
    return new


def exchange_an_attention(model: Any) -> None:
    layer = model.model.language_model.layers[1]
    layer.self_attn = other(layer.self_attn)


class Wrapped(nn.Module):
    """Something around an attention layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = self.base(*args, **kwargs)
        return 1.5 * output, weights


def wrap_an_attention(model: Any) -> None:
    layer = model.model.language_model.layers[1]
    layer.self_attn = Wrapped(layer.self_attn)


def exchange_the_projector(model: Any) -> None:
    torch.manual_seed(3)
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(model.config).eval()


def exchange_the_tower(model: Any) -> None:
    tower = type(model.model.vision_tower)(model.config.vision_config).eval()
    torch.manual_seed(5)
    for parameter in tower.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    model.model.vision_tower = tower


def exchange_the_decoder(model: Any) -> None:
    torch.manual_seed(5)
    model.model.language_model = type(model.model.language_model)(model.config.text_config).eval()


def quantise(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


CHANGES: list[Change] = [
    adapt_the_encoder, adapt_the_decoder, exchange_a_layer, exchange_an_attention, wrap_an_attention,
    exchange_the_projector,
    exchange_the_tower, exchange_the_decoder, quantise,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_may_change_before_apply_and_after(model, change):
    inputs = asked(model)
    bare = model(**inputs).logits
    early = copy.deepcopy(model)
    change(early)
    stock, text = early(**inputs).logits, answer(early, **inputs)
    assert float((stock - bare).abs().max()) > 1e-3 * float(bare.abs().max()), "the change changes something"
    with dymu.apply(early, merge=NOTHING):
        tiny.close(early(**inputs).logits, stock, 1e-4)
    with dymu.apply(early, merge=SOME) as handle:
        merged, kept = early(**inputs).logits, handle.last.kept
    handle = dymu.apply(model, merge=SOME)
    assert model(**inputs).logits.shape == stock.shape
    change(model)
    tiny.close(model(**inputs).logits, merged, 1e-4)
    assert handle.last.kept == kept
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, stock)
        assert torch.equal(answer(model, **inputs), text)
    handle.remove()
    assert torch.equal(model(**inputs).logits, stock)
    with dymu.apply(model, merge=NOTHING):
        assert torch.equal(answer(model, **inputs), text)


def adapt_both(model: Any) -> None:
    adapt_the_encoder(model)
    adapt_the_decoder(model)


METHODS_AND_ALL = [
    ({"merge": FasterVLM(0.4)}, {"merge": FasterVLM(1.0)}),
    ({"merge": VScan(0.4, 3, 1)}, {"merge": VScan(1.0, 3, 1)}),
    ({"merge": SAINT(0.4)}, {"merge": SAINT(1.0)}),
    ({"merge": CDPruner(0.4)}, {"merge": CDPruner(1.0)}),
    ({"prune": FastV(0.4, 1)}, {"prune": FastV(1.0, 1)}),
    ({"prune": SparseVLM((0.5,), (0,), recycle=True)}, {"prune": SparseVLM((1.0,), (0,), recycle=True)}),
    ({"prune": DART(0.5, 1, pivots=2)}, {"prune": DART(1.0, 1)}),
    ({"merge": SOME, "prune": SkipFFN(0.4)}, {"merge": NOTHING, "prune": SkipFFN(1.0)}),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [adapt_both, quantise], ids=lambda change: change.__name__)
@pytest.mark.parametrize(("some", "everything"), METHODS_AND_ALL, ids=str)
def test_methods_read_layers_as_they_are_now(model, change, some, everything):
    """Attention, keys and hidden states come through adapters and quantised layers, whichever came first."""
    inputs = asked(model)
    early = copy.deepcopy(model)
    change(early)
    stock = early(**inputs).logits
    with dymu.apply(early, **everything):
        tiny.close(early(**inputs).logits, stock, 1e-4)
    with dymu.apply(early, **some) as handle:
        reduced, counts = early(**inputs).logits, (handle.last.kept, handle.last.ran)
    assert float((reduced - stock).abs().max()) > 1e-3 * float(stock.abs().max())
    with dymu.apply(model, **some) as handle:
        model(**inputs)
        change(model)
        tiny.close(model(**inputs).logits, reduced, 1e-4)
        assert (handle.last.kept, handle.last.ran) == counts
    assert torch.equal(model(**inputs).logits, stock)


def test_the_whole_inside_may_be_exchanged():
    model, inputs = tiny.llava(), asked(tiny.llava())
    new = tiny.llava(seed=9)
    with dymu.apply(new, merge=SOME):
        expected = new(**inputs).logits
    handle = dymu.apply(model, merge=SOME)
    model.model, model.lm_head = new.model, new.lm_head
    tiny.close(model(**inputs).logits, expected)
    assert dymu.handle_of(model) is handle
    handle.remove()
    assert dymu.handle_of(model) is None


def test_an_exchanged_part_that_computes_something_else_is_refused_by_every_call(model):
    class Other(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.__dict__.update(layer.__dict__)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * x

    inputs, layers = asked(model), model.model.vision_tower.get_submodule(resolve(model).tower_kind.layers)
    with dymu.apply(model, merge=SOME) as handle:
        expected, before = model(**inputs).logits, layers[2]
        del before.__dict__["forward"]
        layers[2] = Other(before)
        for _ in range(2):
            with pytest.raises(UnsupportedModel, match="layer 2 of the vision encoder does not compute"):
                model(**inputs)
        text = {"input_ids": torch.arange(3, 9)[None]}
        with pytest.raises(UnsupportedModel, match="layer 2 of the vision encoder does not compute"):
            model(**text)
        layers[2] = before
        assert torch.isfinite(model(**text).logits).all()
        assert torch.equal(model(**inputs).logits, expected)
        assert handle.last.kept
    assert "forward" not in before.__dict__


def test_attention_within_a_wrapper_may_be_exchanged(model):
    inputs = asked(model)
    wrap_an_attention(model)
    layer = model.model.language_model.layers[1]
    new = other(layer.self_attn.base)
    with dymu.apply(model, merge=NOTHING):
        model(**inputs)
        layer.self_attn.base = new
        merged = model(**inputs).logits
    tiny.close(merged, model(**inputs).logits, 1e-4)


def test_an_exchanged_attention_of_the_encoder_is_refused_as_before_apply(model):
    """DyMU computes it from its parts, so that another forward of it would be left out."""
    inputs, path = asked(model), resolve(model).tower_kind.query.rpartition(".")[0]
    layer = resolve(model).encoder_modules[1]
    attention = layer.get_submodule(path)
    stock = type(attention).forward
    with dymu.apply(model, merge=SOME):
        expected = model(**inputs).logits
        attention.forward = lambda *args, **kwargs: (3 * stock(attention, *args, **kwargs)[0], None)
        for ask in (model, lambda **kwargs: answer(model, **kwargs)):
            with pytest.raises(UnsupportedModel, match="layer 1 of the vision encoder"):
                ask(**inputs)
        del attention.forward
        assert torch.equal(model(**inputs).logits, expected)


def test_what_is_taken_out_is_put_in_again(model):
    """As accelerate's hooks do, which restore a forward when they go."""
    inputs, parts = asked(model, 3), resolve(model)
    hooked = (parts.inner, parts.tower, parts.projector, parts.rotary, parts.language_model, parts.encoder_modules[1])
    with dymu.apply(model, merge=SOME) as handle:
        expected, text = model(**inputs).logits, answer(model, **inputs)
        for module in hooked:
            del module.__dict__["forward"]
            assert torch.equal(model(**inputs).logits, expected)
            before = module.forward
            module.forward = lambda *args, before=before, **kwargs: before(*args, **kwargs)
            assert torch.equal(answer(model, **inputs), text)
        parts.attentions[0].config = copy.copy(parts.attentions[0].config)
        assert torch.equal(model(**inputs).logits, expected)
        handle.remove()
        for module in hooked:
            module.__dict__.pop("forward", None)
    with dymu.apply(model, merge=SOME):
        assert torch.equal(model(**inputs).logits, expected)


def test_parts_may_be_exchanged_between_two_tokens(model):
    inputs = {**asked(model), "max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}

    def run() -> Tensor:
        other_layers = copy.deepcopy(layers)
        tokens = iter(range(9))

        def exchange(*_: Any) -> None:
            if next(tokens) == 2:
                model.model.language_model.layers[1].self_attn = other(layers[1].self_attn)

        hook = model.lm_head.register_forward_hook(exchange)
        logits = torch.stack(answer(model, **inputs).logits)
        hook.remove()
        model.model.language_model.layers = other_layers
        return logits

    layers = copy.deepcopy(model.model.language_model.layers)
    stock = run()
    layers = copy.deepcopy(model.model.language_model.layers)
    with dymu.apply(model, merge=NOTHING):
        tiny.close(run(), stock, 1e-4)


def test_thresholds_must_fit_the_exchanged_tower():
    model = tiny.llava("siglip")
    inputs, photos = asked(model), tiny.photos(4)
    thresholds = dymu.calibrate(model, tiny.processor(), photos, [20], progress=False)
    with dymu.apply(model, thresholds):
        config = copy.deepcopy(model.config.vision_config)
        config.num_hidden_layers += 2
        model.model.vision_tower = type(model.model.vision_tower)(config).eval()
        for _ in range(2):
            with pytest.raises(UnsupportedModel, match="another vision encoder"):
                model(**inputs)


def test_one_layer_in_two_places_is_refused(model):
    layers = model.model.vision_tower.get_submodule(resolve(model).tower_kind.layers)
    layers[3] = layers[2]
    with pytest.raises(UnsupportedModel, match="same layer in several places"):
        dymu.apply(model, merge=SOME)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("part", ["model", "model.language_model", "model.multi_modal_projector"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_parts_may_be_put_in_their_place(part, order):
    torch._dynamo.reset()
    model = tiny.llava()
    inputs, (inside, _, name) = asked(model, 3), part.rpartition(".")
    with dymu.apply(model, merge=SOME):
        merged = model(**inputs).logits

    def put() -> None:
        setattr(model.get_submodule(inside), name, torch.compile(model.get_submodule(part), backend="eager"))

    if order == "before":
        put()
    with dymu.apply(model, merge=SOME) as handle:
        if order == "after":
            put()
        tiny.close(model(**inputs).logits, merged, 1e-4)
        assert handle.last.kept


def test_a_hook_may_ask_the_same_model(model):
    inputs, other_inputs = asked(model, 3), asked(model, 4)
    text = tiny.prompt(model, 6, seed=5)[None]
    places = [model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model.layers[1]]
    with dymu.apply(model, merge=SOME):
        expected = [model(**one).logits for one in (inputs, other_inputs, {"input_ids": text})]
        for place in places:
            for question, answer_to_it in zip(({"input_ids": text}, other_inputs), reversed(expected[1:]), strict=True):
                inside = []

                def ask(*_: Any, inside: list[Tensor] = inside, question: Any = question) -> None:
                    if not inside:
                        inside.append(text)
                        inside.append(model(**question).logits)

                hook = place.register_forward_pre_hook(ask)
                assert torch.equal(model(**inputs).logits, expected[0])
                hook.remove()
                assert torch.equal(inside[1], answer_to_it)


def test_what_somebody_else_put_or_removed_does_not_stop_removal(model):
    inputs, tower = asked(model), model.model.vision_tower
    stock = model(**inputs).logits
    handle = dymu.apply(model, merge=SOME)
    merged, calls = tower.forward, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return merged(*args, **kwargs)

    tower.forward = wrapped  # as accelerate's hooks do
    del model.model.multi_modal_projector.__dict__["forward"]
    del model.model.__dict__["_dymu_handle"]
    handle.remove()
    assert tower.forward is wrapped
    assert torch.equal(model(**inputs).logits, stock)
    assert calls
    del tower.forward
    with dymu.apply(model, merge=NOTHING):
        tiny.close(model(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


def test_the_attention_implementation_may_be_set_while_applied(model):
    inputs = asked(model)
    with dymu.apply(model, merge=SOME) as handle:
        merged = model(**inputs).logits
        model.set_attn_implementation("eager")
        tiny.close(model(**inputs).logits, merged)
        with handle.disabled():
            tiny.close(model(**inputs).logits, _eager(model, inputs))
    assert model.config.text_config._attn_implementation == "eager"
    tiny.close(model(**inputs).logits, _eager(model, inputs))


def _eager(model: Any, inputs: dict[str, Any]) -> Tensor:
    stock = type(model)(model.config)
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation("eager")
    return stock.eval()(**inputs).logits


# ------------------------------------------------------------------------------------------------------------- adapters


def lora(model: Any, seed: int = 1) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "linear_1"]))
    _strengthen(wrapped)
    return wrapped.eval()


def _strengthen(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("order", ["lora then apply to the wrapper", "lora then apply to the model", "apply then lora"])
def test_lora_in_any_order(model, order):
    inputs, bare = asked(model), model(**asked(model)).logits
    reference = lora(copy.deepcopy(model))
    stock = reference(**inputs).logits
    assert not torch.allclose(stock, bare, atol=1e-2)
    if order == "apply then lora":
        handle = dymu.apply(model, merge=NOTHING)
        wrapped = lora(model)
    else:
        wrapped = lora(model)
        handle = dymu.apply(wrapped if order.endswith("wrapper") else model, merge=NOTHING)
    assert dymu.handle_of(wrapped) is dymu.handle_of(model) is handle
    tiny.close(wrapped(**inputs).logits, stock, 1e-4)
    assert torch.equal(answer(wrapped, **inputs), answer(reference, **inputs))
    with wrapped.disable_adapter():
        tiny.close(wrapped(**inputs).logits, bare, 1e-4)
    with handle.disabled():
        assert torch.equal(wrapped(**inputs).logits, stock)
    handle.remove()
    assert torch.equal(wrapped(**inputs).logits, stock)
    tiny.close(wrapped.merge_and_unload()(**inputs).logits, stock, 1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_of_transformers_may_be_added_and_loaded_while_applied(model, tmp_path):
    peft = pytest.importorskip("peft")
    inputs, config = asked(model), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    reference = copy.deepcopy(model)
    try:
        reference.add_adapter(config)
    except ValueError as error:
        pytest.skip(str(error))  # this transformers wants a newer PEFT than there is
    _strengthen(reference)
    reference.save_pretrained(tmp_path)
    with dymu.apply(reference.eval(), merge=SOME):
        merged = reference(**inputs).logits
    with dymu.apply(model, merge=SOME):
        bare = model(**inputs).logits
        model.load_adapter(str(tmp_path))
        tiny.close(model.eval()(**inputs).logits, merged, 1e-4)
        model.disable_adapters()
        tiny.close(model(**inputs).logits, bare, 1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_that_copy_modules_are_refused_while_applied(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    inputs, reference = asked(model), copy.deepcopy(model)
    wrapped = peft.get_peft_model(reference, config).eval()
    with dymu.apply(wrapped, merge=NOTHING):
        tiny.close(wrapped(**inputs).logits, model(**inputs).logits, 1e-4)
    with dymu.apply(model, merge=NOTHING), pytest.raises(DymuError, match="for adapters that copy modules"):
        peft.get_peft_model(model, config)


def test_accelerates_mixed_precision_wraps_and_unwraps_while_applied(model):
    accelerate = pytest.importorskip("accelerate")
    inputs, accelerator = asked(model, 3), accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    stock = model(**inputs).logits
    handle = dymu.apply(model, merge=SOME)
    merged = model(**inputs).logits
    prepared = accelerator.prepare(model)
    prepared(**inputs)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**inputs).logits, merged)
    handle.remove()
    assert torch.equal(unwrapped(**inputs).logits, stock)
    assert torch.equal(copy.deepcopy(unwrapped)(**inputs).logits, stock)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrappers_are_looked_through_or_named(model):
    torch._dynamo.reset()
    inputs = asked(model)
    compiled = torch.compile(model, backend="eager")
    with dymu.apply(compiled, merge=SOME) as handle:
        assert dymu.handle_of(model) is dymu.handle_of(compiled) is handle
        assert handle.last.kept == []
        tiny.close(compiled(**inputs).logits, model(**inputs).logits)
        assert handle.last.kept
    with pytest.raises(UnsupportedModel, match="DataParallel copies the model"):
        dymu.apply(nn.DataParallel(model), merge=SOME)
    with pytest.raises(UnsupportedModel, match="is not described"):
        dymu.apply(nn.Sequential(model), merge=SOME)


def test_a_missing_part_is_not_put_down_to_a_version_of_transformers(model):
    del model.model.multi_modal_projector
    with pytest.raises(UnsupportedModel, match="somebody exchanged that part") as error:
        dymu.apply(model, merge=SOME)
    assert "transformers" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------- threads

THREADS, REQUESTS = 4, 100


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_every_thread_gets_its_own_answers_and_reports(how):
    """All threads meet at a barrier ahead of every request and within it, so that their calls always overlap."""
    model = tiny.llava("dinov2_with_registers", "qwen3")
    requests = REQUESTS if how == "forward" else 10
    inputs = [asked(model, seed) for seed in range(THREADS * requests)]

    def ask(number: int) -> Tensor:
        return model(**inputs[number]).logits if how == "forward" else answer(model, **inputs[number])

    with dymu.apply(model, merge=SOME) as handle:
        alone = []
        for number in range(len(inputs)):
            alone.append((ask(number), handle.last.kept, handle.last.group(0), handle.last.cache_bytes))
        meet = threading.Barrier(THREADS)

        def wait(*_: Any) -> None:
            meet.wait(60)

        within = model.model.language_model.layers[0].register_forward_pre_hook(wait)

        def requests_of(thread: int) -> list[int]:
            wrong = []
            for number in range(thread, len(inputs), THREADS):
                meet.wait(60)
                output, (expected, kept, group, stored) = ask(number), alone[number]
                last = handle.last
                same = torch.allclose(output, expected, atol=1e-5) and torch.equal(last.group(0), group)
                if not same or last.kept != kept or last.cache_bytes != stored:
                    wrong.append(number)
            return wrong

        with ThreadPoolExecutor(THREADS) as pool:
            assert [wrong for each in pool.map(requests_of, range(THREADS)) for wrong in each] == []
        within.remove()
    assert len({tuple(kept) for _, kept, _, _ in alone}) > 1


def test_disabled_is_of_one_thread_and_touches_no_running_call(model):
    inputs = asked(model, 3)
    stock = model(**inputs).logits
    handle = dymu.apply(model, merge=SOME)
    merged, text = model(**inputs).logits, answer(model, **inputs)
    inside, over = threading.Event(), threading.Event()

    def wait_inside(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            over.wait(60)

    hook = model.model.language_model.layers[1].register_forward_pre_hook(wait_inside)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(answer, model, **inputs)
        assert inside.wait(60)
        with handle.disabled():
            assert torch.equal(model(**inputs).logits, stock)
            over.set()
            assert torch.equal(running.result(60), text)
            assert torch.equal(model(**inputs).logits, stock)
    hook.remove()
    assert torch.equal(model(**inputs).logits, merged)
    handle.remove()


def test_removal_waits_for_running_calls(model):
    inputs = asked(model, 3)
    stock, handle = model(**inputs).logits, dymu.apply(model, merge=SOME)
    text = answer(model, **inputs)
    inside, order = threading.Event(), []

    def slowly(*_: Any) -> None:
        inside.set()
        order.append("call")
        threading.Event().wait(0.02)

    hook = model.model.language_model.layers[0].register_forward_pre_hook(slowly)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(answer, model, **inputs)
        assert inside.wait(60)
        handle.remove()
        order.append("removed")
        assert torch.equal(running.result(60), text)
    hook.remove()
    assert order[-1] == "removed"
    assert torch.equal(model(**inputs).logits, stock)


def test_removal_does_not_wait_for_ever_for_a_busy_model():
    model = tiny.llava()
    inputs, stop = asked(model, 3), threading.Event()

    def ask_on() -> None:
        while not stop.is_set():
            model(**inputs)

    handle = dymu.apply(model, merge=SOME)
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask_on) for _ in range(8)]
        thread = threading.Thread(target=handle.remove)
        thread.start()
        thread.join(20)
        stop.set()
        assert not thread.is_alive()
        for one in asking:
            one.result()


def test_parts_are_exchanged_for_all_threads_at_once():
    """Between calls; the calls of all threads follow."""
    model = tiny.llava()
    inputs, meet = asked(model, 3), threading.Barrier(4)
    with dymu.apply(model, merge=SOME):
        expected = model(**inputs).logits

        def ask(thread: int) -> list[bool]:
            right = []
            for _ in range(20):
                if thread == 0:
                    model.model.multi_modal_projector = copy_of(model.model.multi_modal_projector, flip=False)
                meet.wait(60)
                right.append(torch.allclose(model(**inputs).logits, expected, atol=1e-5))
                meet.wait(60)
            return right

        with ThreadPoolExecutor(4) as pool:
            assert all(all(right) for right in pool.map(ask, range(4)))


def test_disabled_may_be_left_in_another_thread(model):
    inputs = asked(model, 3)
    stock = model(**inputs).logits
    with dymu.apply(model, merge=SOME) as handle, ThreadPoolExecutor(1) as pool:
        merged, disabled = model(**inputs).logits, handle.disabled()
        disabled.__enter__()
        assert torch.equal(model(**inputs).logits, stock)
        pool.submit(disabled.__exit__, None, None, None).result()
        assert torch.equal(model(**inputs).logits, merged)
        assert torch.equal(pool.submit(lambda: model(**inputs).logits).result(), merged)


def test_others_may_ask_while_thresholds_are_calibrated():
    model = tiny.llava()
    inputs, photos = asked(model, 3), tiny.photos(6)
    expected, stop, right = model(**inputs).logits, threading.Event(), []

    def ask_on() -> None:
        while not stop.is_set():
            right.append(torch.allclose(model(**inputs).logits, expected, atol=1e-5))

    thresholds = dymu.calibrate(model, tiny.processor(), photos, [20], progress=False)
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask_on) for _ in range(2)]
        again = [dymu.calibrate(model, tiny.processor(), photos, [20], progress=False) for _ in range(5)]
        stop.set()
        for one in asking:
            one.result()
    assert all(right)
    assert all(one.calibrated == thresholds.calibrated for one in again)


def test_removal_from_within_a_call_is_refused(model):
    inputs = asked(model)
    with dymu.apply(model, merge=SOME) as handle:
        expected = model(**inputs).logits
        hook = model.model.language_model.register_forward_pre_hook(lambda *_: handle.remove())
        with pytest.raises(DymuError, match="when the call is over"):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**inputs).logits, expected)


def test_a_report_is_of_the_calling_thread(model):
    first, second = asked(model, 3), asked(model, 4, images=2)
    with dymu.apply(model, merge=SOME) as handle, ThreadPoolExecutor(1) as pool:
        pool.submit(model, **second).result()
        assert len(handle.last.kept) == 2, "a thread that made no call sees the newest, as with a streamer"
        model(**first)
        pool.submit(model, **second).result()
        assert len(handle.last.kept) == 1
        assert len(pool.submit(lambda: handle.last.kept).result()) == 2


def test_a_budget_set_meanwhile_counts_from_the_next_call():
    model = tiny.llava("siglip")
    entries = tuple(dymu.thresholds.Calibrated(keep, (level,) * tiny.LAYERS) for keep, level in ((10, 0.7), (40, 2.0)))
    inputs = asked(model, 2)
    with dymu.apply(model, dymu.Thresholds(entries), budget=40) as handle:
        whole = model(**inputs).logits

        def lower(*_: Any) -> None:
            handle.budget = 10

        hook = model.model.vision_tower.register_forward_hook(lower)
        assert torch.equal(model(**inputs).logits, whole)
        assert not torch.equal(model(**inputs).logits, whole)
        hook.remove()


# ---------------------------------------------------------------------------------------------------------- interrupted

PLACES = {
    "tower": lambda model: model.model.vision_tower,
    "encoder layer": lambda model: resolve(model).encoder_modules[1].get_submodule("mlp"),
    "projector": lambda model: model.model.multi_modal_projector,
    "decoder": lambda model: model.model.language_model,
    "first layer": lambda model: model.model.language_model.layers[0],
    "last layer": lambda model: model.model.language_model.layers[-1],
    "head": lambda model: model.lm_head,
}


@contextmanager
def interrupted(module: nn.Module, error: type[BaseException]) -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error

    hook = module.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        yield
    hook.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError])
@pytest.mark.parametrize("place", PLACES)
def test_a_call_that_is_interrupted_leaves_nothing(model, place, error):
    inputs, more = asked(model, 3), tiny.prompt(model, 1, seed=5)[None]
    text = tiny.prompt(model, inputs["input_ids"].shape[1], seed=6)[None]
    model(**inputs)
    before = _attributes(model)
    with dymu.apply(model, merge=SOME):
        old = model(**inputs, use_cache=True)
        cache = going_on(model, old)
        calls = {
            "text as long": lambda: {"input_ids": text},
            "shorter text": lambda: {"input_ids": text[:, :9]},
            "next token": lambda: {"input_ids": more, **copy.deepcopy(cache)},
            "the same": lambda: inputs,
        }
        expected = {name: model(**call()).logits for name, call in calls.items()}
        for way in (model, lambda **kwargs: answer(model, **kwargs)):
            for name, call in calls.items():
                with interrupted(PLACES[place](model), error):
                    way(**inputs)
                assert torch.equal(model(**call()).logits, expected[name]), name
        # The very cache that a call was to fill goes on from what it held.
        if place != "head":
            if place in ("decoder", "first layer", "last layer"):
                with interrupted(PLACES[place](model), error):
                    model(input_ids=more, **cache)
            assert torch.equal(model(input_ids=more, **cache).logits, expected["next token"])
    assert _attributes(model) == before


def _attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


# ------------------------------------------------------------------------------------------------------ global settings


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unmerge", ["exact", "compact", "none"])
def test_the_default_type_is_no_business_of_a_model(model, default, own, unmerge):
    model = model.to(own)
    inputs = {name: x.to(own) if x.is_floating_point() else x for name, x in asked(model, 3, images=2).items()}
    rules = (SOME, dymu.FixedMerge(20), RandomKeep(20), AveragePool(2))
    for rule in rules if unmerge == "exact" else (SOME,):
        with dymu.apply(model, merge=rule, unmerge=unmerge) as handle:
            logits, text, items = model(**inputs).logits, answer(model, **inputs), handle.last.items
            locations = [item.location for item in items]
            with default_dtype(default):
                assert torch.equal(model(**inputs).logits, logits)
                assert torch.equal(answer(model, **inputs), text)
                for item, before, location in zip(handle.last.items, items, locations, strict=True):
                    assert torch.equal(item.leaders, before.leaders)
                    assert torch.equal(item.location.nan_to_num(), location.nan_to_num())


def test_the_default_device_is_no_business_of_a_model(model):
    inputs = asked(model, 3)
    for rule in (SOME, dymu.FixedMerge(20), RandomKeep(20), AveragePool(2)):
        with dymu.apply(model, merge=rule):
            expected, text = model(**inputs).logits, answer(model, **inputs)
        with torch.device("meta"), dymu.apply(model, merge=rule):
            assert torch.equal(model(**inputs).logits, expected)
        with dymu.apply(model, merge=rule):
            assert torch.equal(answer(model, **inputs), text)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_apply_and_calibrate_under_another_default_type(default):
    model, photos = tiny.llava(), tiny.photos(4)
    thresholds = dymu.calibrate(model, tiny.processor(), photos, [20], progress=False)
    inputs = asked(model, 3)
    with dymu.apply(model, thresholds):
        logits = model(**inputs).logits
    with default_dtype(default):
        again = dymu.calibrate(model, tiny.processor(), photos, [20], progress=False)
        assert again.calibrated == thresholds.calibrated
        with dymu.apply(model, thresholds):
            assert torch.equal(model(**inputs).logits, logits)


# ------------------------------------------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize("form", ["merged", "fast"])
def test_an_adopted_cache_is_copied_and_pickled(model, form):
    inputs, more = asked(model, 3), tiny.prompt(model, 2, seed=5)[None]
    with dymu.apply(model, merge=SOME, cache=form) as handle:
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            kept = going_on(model, model(**inputs, past_key_values=cache, use_cache=True))
            buffer = io.BytesIO()
            torch.save(kept, buffer)
            buffer.seek(0)
            copies = [copy.deepcopy(kept), pickle.loads(pickle.dumps(kept)), torch.load(buffer, weights_only=False)]
            expected = model(input_ids=more, **kept).logits
            kept_tokens, stored = handle.last.kept, handle.last.cache_bytes
            for again in copies:
                model(input_ids=more)
                assert torch.equal(model(input_ids=more, **again).logits, expected)
                assert (handle.last.kept, handle.last.cache_bytes) == (kept_tokens, stored)
            assert kept_tokens


@pytest.mark.parametrize("part", ["", "model", "model.vision_tower", "model.language_model"])
def test_a_model_is_neither_copied_nor_pickled_while_applied(model, part):
    inputs = asked(model)
    with dymu.apply(model, merge=SOME) as handle:
        expected = model(**inputs).logits
        for take in (copy.deepcopy, pickle.dumps, lambda whole: torch.save(whole, io.BytesIO())):
            with pytest.raises(DymuError, match=r"handle\.remove\(\) first"):
                take(model.get_submodule(part))
        pickle.loads(pickle.dumps(copy.deepcopy(handle.last)))
        assert torch.equal(model(**inputs).logits, expected)
    copy.deepcopy(model)


def test_nothing_keeps_a_model_or_a_cache_alive():
    import weakref

    model = tiny.llava()
    with dymu.apply(model, merge=SOME):
        output = model(**asked(model), use_cache=True)
        cache = weakref.ref(next(iter(going_on(model, output).values())))
        del output
        gc.collect()
        assert cache() is None
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# ----------------------------------------------------------------------------------------------------- against by hand


def test_merged_logits_with_an_adapter_equal_an_independent_implementation():
    model = tiny.llava()
    inputs = asked(model, 3)
    with dymu.apply(model, merge=SOME) as handle:
        adapt_the_encoder(model)
        adapt_the_decoder(model)
        out = model(**inputs)
        group = handle.last.group(0)
        features = tiny.features_in(out)
    by_hand = unmerged_by_hand(copy.deepcopy(model).double(), inputs["input_ids"][0], features.double(), group)
    tiny.close(out.logits[0], by_hand.float(), 1e-4)


def test_threads_do_not_share_what_a_model_remembers_of_a_call():
    """Qwen-VL keeps on itself by how much positions lag behind tokens, which differs from image to image."""
    model = tiny.build("qwen2_5_vl")
    large, small = (tiny.uneven(model, 2)[number : number + 1] for number in range(2))
    asked, other = (tiny.inputs(model, tiny.prompt(model, 4, picture[0], 7), picture) for picture in (large, small))

    def answered(between: bool) -> Tensor:
        out = model(**asked, use_cache=True)
        if between:
            thread = threading.Thread(target=lambda: model(**other))
            thread.start()
            thread.join()
        return model(input_ids=torch.tensor([[5]]), **going_on(model, out)).logits

    alone = answered(between=False)
    assert not torch.allclose(answered(between=True), alone), "the stock model mixes them up"
    with dymu.apply(model, merge=ThresholdMerge((0.8,) * tiny.LAYERS)):
        assert torch.equal(answered(between=True), answered(between=False))
    assert type(model.model) is type(tiny.build("qwen2_5_vl").model)


REMEMBER = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl"]
"""Families that keep something of a call on the model."""


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(call)).result()


def exchange_attention(model: Any) -> None:
    layer = model.model.language_model.layers[-1]
    again = type(layer.self_attn)(model.config.text_config, layer.self_attn.layer_idx).eval()
    again.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = again


def exchange_encoder_layer(model: Any) -> None:
    layers = resolve(model).encoder_modules
    layers[0].mlp = torch.nn.Sequential(layers[0].mlp)


@pytest.mark.parametrize("name", REMEMBER)
def test_a_cache_goes_on_in_another_thread_and_with_other_parts(name):
    """By what the model kept of the call that filled the cache, whatever ran since."""
    model = tiny.build(name)
    large, small = (tiny.uneven(model, 2)[number : number + 1] for number in range(2))
    asked, other = (tiny.inputs(model, tiny.prompt(model, 4, picture[0], 7), picture) for picture in (large, small))
    more = torch.tensor([[5, 6]])
    out = model(**asked, use_cache=True)
    expected = model(input_ids=more, **going_on(model, out)).logits

    def turn(cache: dict[str, Any]) -> Tensor:
        return model(input_ids=more, **copy.deepcopy(cache)).logits

    model(**other)
    with dymu.apply(model, merge=dymu.FixedMerge(1.0)) as handle:
        cache = going_on(model, in_a_thread(lambda: model(**asked, use_cache=True)))
        for run in (in_a_thread, lambda call: call()):
            run(lambda: model(**other))
            tiny.close(run(lambda: turn(cache)), expected)
        for exchange in () if name == "qwen3_5" else (exchange_attention, exchange_encoder_layer):
            exchange(model)
            tiny.close(turn(cache), expected)

        def untouched() -> Any:
            with handle.disabled():
                return model(**asked, use_cache=True)

        stock = going_on(model, in_a_thread(untouched))
        with handle.disabled():
            tiny.close(turn(stock), expected)


def test_layers_without_attention_and_calls_that_end_early():
    """What they remember is fresh after a first call, and lost after a later one; a wrong argument costs nothing."""
    model = tiny.build("qwen3_5")
    asked, more = tiny.asked(model), torch.tensor([[5, 6]])
    with dymu.apply(model, merge=SOME):
        cache = DynamicCache(config=model.config.get_text_config())
        named = {"past_key_values": cache}
        expected = model(**asked).logits
        with interrupted(model.model.language_model.layers[-1].mlp, KeyboardInterrupt):
            model(**asked, **named)
        assert torch.equal(model(**asked, **named).logits, expected)
        with pytest.raises(ValueError, match="the attention_mask is"):
            model(input_ids=more, attention_mask=torch.ones(1, 5), **named)
        going = copy.deepcopy(named)
        model(input_ids=more, **going)
        with interrupted(model.model.language_model.layers[-1].mlp, KeyboardInterrupt):
            model(input_ids=more, **named)
        with pytest.raises(dymu.UnsupportedCache, match="cannot be taken back"):
            model(input_ids=more, **named)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma"])
def test_a_language_model_by_itself_takes_its_own_mask(name):
    model = tiny.build(name)
    ids = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = tiny_families.PAD
    text = model.model.language_model
    expected = text(input_ids=ids, attention_mask=mask).last_hidden_state
    with dymu.apply(model, merge=SOME):
        found = text(input_ids=ids, attention_mask=mask).last_hidden_state
    tiny.close(found[mask.bool()], expected[mask.bool()])
