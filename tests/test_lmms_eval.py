"""dymu as a model of lmms-eval. Where that is not installed, an empty base class stands in for it; only the last test
needs the real one (docs/lmms-eval.md says how to install it)."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast

import dymu
import tiny
from dymu.evaluation.methods import applying
from dymu.prompting import answers, processed
from tiny_processors import OF_EACH_KIND, processor_for

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz ?:"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} answer:"
)
INSTALLED = find_spec("lmms_eval") is not None
BUDGET = 20


@pytest.fixture(scope="module")
def plugin():
    """The plug-in's module."""
    stand_ins = {
        "lmms_eval.api.model": {"lmms": type("lmms", (), {"rank": 0, "clean": lambda self: None})},
        "lmms_eval.api.instance": {"GenerationResult": SimpleNamespace},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in {} if INSTALLED else stand_ins.items():
            module = ModuleType(name)
            module.__dict__.update(members)
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("dymu.integrations.lmms_eval")
    if not INSTALLED:
        del sys.modules["dymu.integrations.lmms_eval"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random LLaVA that reads letters, with thresholds beside it."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<pad>", "<unk>", "</s>", *LETTERS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<image>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", extra_special_tokens=["<image>"]
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        tiny.processor(),
        tokenizer,
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    with torch.no_grad():
        model = tiny.llava()
        model.config.image_token_id = image_token
        no_letters = [i for i in range(tiny.VOCAB) if i not in core.encode(LETTERS).ids]
        model.lm_head.weight[no_letters] = 0  # never the likeliest
        path = tmp_path_factory.mktemp("model")
        model.save_pretrained(path)
        processor.save_pretrained(path)
        thresholds = dymu.calibrate(model, tiny.processor(), tiny.photos(6), budgets=[BUDGET, 40])
        thresholds.save(path / "thresholds.json")
    return path


@pytest.fixture(scope="module")
def documents():
    """Questions about one image, none, and two."""
    photos = tiny.photos(6)
    shown = [photos[:1], [], photos[1:3], photos[3:4], photos[4:5], photos[5:]]
    questions = ["what is it?", "why?", "are both red?", "a cat", "is this a longer question?", "who"]
    return [{"images": images, "question": question} for images, question in zip(shown, questions, strict=True)]


def make(plugin, folder, documents, **options):
    given = {"device": "cpu", "dtype": "float64", "budget": BUDGET, "batch_size": 4} | options
    model = plugin.Dymu(pretrained=str(folder), **given)
    model.task_dict = {"task": {"test": documents}}
    return model


def request(documents, index, second, context=None):
    """As lmms-eval builds it for a simple model."""
    context = documents[index]["question"] if context is None else context
    return SimpleNamespace(args=(context, second, lambda doc: doc["images"], index, "task", "test"))


def asked(documents, **settings):
    return [request(documents, index, {"max_new_tokens": 6, **settings}) for index in range(len(documents))]


def scored(documents, continuations=(" cat", " a dog", "")):
    return [request(documents, index, text) for index in range(len(documents)) for text in continuations]


def pairs(results):
    return [result.text for result in results]


@pytest.fixture(scope="module")
def stock(folder):
    """The model and its processor, as a user of transformers has them."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoProcessor.from_pretrained(folder)


def inputs_of(processor, document, more=""):
    text = "<image>" * len(document["images"]) + document["question"] + " answer:" + more
    inputs = processor(text=text, images=document["images"] or None, return_tensors="pt")
    return inputs.to("cpu", dtype=torch.float64)


def one_by_one(model, processor, document, continuation):
    """What `loglikelihood` must give, token by token."""
    ids = inputs_of(processor, document, continuation)
    logits = model(**ids).logits[0].log_softmax(-1)
    total, greedy = 0.0, True
    for place in range(ids["input_ids"].shape[1] - len(continuation), ids["input_ids"].shape[1]):
        token = ids["input_ids"][0, place]
        total += logits[place - 1, token].item()
        greedy &= bool(logits[place - 1].argmax() == token)
    return total, greedy


@pytest.fixture(params=[None, BUDGET], ids=["untouched", "merged"])
def budget(request):
    return request.param


@pytest.fixture
def reference(stock, folder, budget):
    if budget is None:
        yield stock
    else:
        with dymu.apply(stock[0], folder / "thresholds.json", budget=budget):
            yield stock


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_transformers(plugin, folder, documents, reference, budget, batch_size):
    model, processor = reference
    wanted = []
    for document in documents:
        inputs = inputs_of(processor, document)
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        wanted.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    ours = make(plugin, folder, documents, budget=budget, batch_size=batch_size)
    assert ours.generate_until(asked(documents)) == wanted
    assert len(set(wanted)) > 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_the_plain_sums(plugin, folder, documents, reference, budget, batch_size):
    continuations = (" cat", " a dog", "")
    wanted = [one_by_one(*reference, document, text) for document in documents for text in continuations]
    ours = make(plugin, folder, documents, budget=budget, batch_size=batch_size)
    losses, greedy = zip(*pairs(ours.loglikelihood(scored(documents, continuations))), strict=True)
    assert losses == pytest.approx([-total for total, _ in wanted], abs=1e-4)
    assert greedy == tuple(flag for _, flag in wanted)


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_families_with_processors_of_their_own(plugin, family, monkeypatch):
    """A batch of questions gets what the model says of each alone: answers, and log-likelihoods of one token."""
    with torch.no_grad():
        model = tiny.build(family).double()
    processor = processor_for(family)
    monkeypatch.setattr(plugin.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr(plugin.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model)
    sizes = [(96, 72), (60, 80), (120, 48)]
    photos = [photo.resize(size) for photo, size in zip(tiny.photos(3), sizes, strict=True)]
    questions = ["what", "is this", "?"]
    documents = [{"images": [photo], "question": text} for photo, text in zip(photos, questions, strict=True)]
    ours = make(plugin, "nowhere", documents, budget=0.4, method="tome", batch_size=3)
    ours.max_length = 2000
    found = pairs(ours.loglikelihood(scored(documents, [" cat"])))
    texts = ours.generate_until(asked(documents))
    (cat,) = processor.tokenizer("cat", add_special_tokens=False)["input_ids"]
    for index, (loss, _) in enumerate(found):
        prompt, images = ours._prompt(questions[index], lambda doc: doc["images"], index, "task", "test")
        inputs = processed(model, processor, [prompt], images=images)
        (alone,) = answers(model, processor, inputs, 6)
        assert texts[index].strip() == alone.text
        assert loss == pytest.approx(-float(model(**inputs).logits[0, -1].log_softmax(-1)[cat]), abs=1e-6)


def test_the_models_own_answer_is_the_greedy_continuation(plugin, folder, documents):
    ours = make(plugin, folder, documents)
    answers = ours.generate_until(asked(documents))
    own = [request(documents, index, answer) for index, answer in enumerate(answers)]
    other = [request(documents, index, "zz" + answer) for index, answer in enumerate(answers)]
    assert [greedy for _, greedy in pairs(ours.loglikelihood(own))] == [True] * len(documents)
    assert [greedy for _, greedy in pairs(ours.loglikelihood(other))] == [False] * len(documents)


def test_a_continuation_may_be_given_as_a_function_and_a_prompt_without_a_document(plugin, folder, documents):
    ours = make(plugin, folder, documents)
    named = pairs(ours.loglikelihood([request(documents, 0, lambda doc: " " + doc["question"])]))
    assert named == pairs(ours.loglikelihood([request(documents, 0, " what is it?")]))
    [(loss, _)] = pairs(ours.loglikelihood([SimpleNamespace(args=("", " cat"))]))
    assert loss > 0


def test_requests_of_different_settings_are_answered_apart(plugin, folder, documents):
    ours = make(plugin, folder, documents)
    lengths = [2, 6, 2, 6, 3, 3]
    mixed = [request(documents, i, {"max_new_tokens": length, "until": []}) for i, length in enumerate(lengths)]
    longest = ours.generate_until(asked(documents))
    cut = [answer[:length] for answer, length in zip(longest, lengths, strict=True)]
    assert [answer[: len(short)] for answer, short in zip(ours.generate_until(mixed), cut, strict=True)] == cut
    assert any(map(len, cut))


def test_answers_end_before_what_they_are_to_end_at(plugin, folder, documents):
    ours = make(plugin, folder, documents)
    whole = ours.generate_until(asked(documents))
    stop = whole[0][2]
    assert ours.generate_until(asked(documents, until=[stop])) == [answer.split(stop)[0] for answer in whole]
    assert ours.generate_until(asked(documents, until=stop)) == [answer.split(stop)[0] for answer in whole]
    before = ours._new_tokens
    assert ours.generate_until(asked(documents, until=list(LETTERS))) == [""] * len(documents)
    assert ours._new_tokens - before == len(documents)  # not six each


def test_settings(plugin):
    greedy = {"max_new_tokens": 1024, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert plugin._settings({}) == (greedy, [])
    assert plugin._settings({"temperature": 0, "do_sample": True, "top_p": 0.9, "until": ["x"]}) == (greedy, ["x"])
    assert plugin._settings({"temperature": 0.7, "do_sample": False, "until": "x"}) == (greedy, ["x"])
    beams = {**greedy, "num_beams": 3}
    assert plugin._settings({"num_beams": 3, "image_aspect_ratio": "original"}) == (beams, [])
    sampled = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "do_sample": True}
    assert plugin._settings({"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9}) == (sampled, [])


def test_sampling(plugin, folder, documents):
    ours = make(plugin, folder, documents)
    torch.manual_seed(0)
    hot = asked(documents, do_sample=True, temperature=5.0)
    assert ours.generate_until(hot) != ours.generate_until(hot)


def test_a_question_may_place_its_images_itself(plugin, folder, documents):
    ours = make(plugin, folder, documents)
    assert ours._prompt("a <image> b <image>", lambda doc: doc["images"], 2, "task", "test")[0] == (
        "a <image> b <image> answer:"
    )
    assert ours._prompt("see <image>", lambda doc: doc["images"], 2, "task", "test")[0] == (
        "<image><image>see  answer:"
    )


def test_what_was_kept_is_said_at_the_end(plugin, folder, documents, monkeypatch):
    said = []
    monkeypatch.setattr(plugin, "log_metrics", lambda *given: said.append(given))
    ours = make(plugin, folder, documents)
    ours.generate_until(asked(documents))
    ours.loglikelihood(scored(documents, [" cat"]))
    ours.clean()
    [(_, tokens, _, more)] = said
    assert tokens > 0
    assert more["images"] == 2 * 6
    assert more["image_tokens_full"] == tiny.PATCHES
    assert more["image_tokens_kept"] == pytest.approx(BUDGET, abs=1)  # the images that were calibrated on
    untouched = make(plugin, folder, documents, budget=None)
    untouched.clean()
    assert said[-1][-1] == {}


def test_kept_within_the_language_model_is_the_mean_over_layers(plugin, folder, documents, monkeypatch):
    said = []
    monkeypatch.setattr(plugin, "log_metrics", lambda *given: said.append(given[-1]["image_tokens_kept"]))
    ours = make(plugin, folder, documents, budget=0.4, method="'fast-v:layer=1,fill=nearest'")  # as the parser has it
    ours.generate_until(asked(documents[:2]))
    ours.clean()
    assert said == [pytest.approx(0.4 * tiny.PATCHES, abs=1)]


def test_fixed_merging_and_no_unmerging(plugin, folder, documents, monkeypatch):
    said = []
    monkeypatch.setattr(plugin, "log_metrics", lambda *given: said.append(given[-1]["image_tokens_kept"]))
    fixed = make(plugin, folder, documents, budget=12, method="tome")
    with_unmerging = pairs(fixed.loglikelihood(scored(documents)))
    fixed.clean()
    assert said == [12]
    without = make(plugin, folder, documents, budget=12, method="tome", unmerge="none")
    assert pairs(without.loglikelihood(scored(documents))) != with_unmerging


def test_merging_by_thresholds_takes_a_layer_to_unmerge_from(plugin, folder, documents):
    found = []
    for options in ({"method": "dtome:unmerge_from=1"}, {"method": "dtome"}, {}):
        ours = make(plugin, folder, documents, **options)
        found.append(pairs(ours.loglikelihood(scored(documents))))
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize("method", ["cd-pruner", "fast-v:layer=1"])
def test_a_method_reads_the_question_and_not_the_answer(plugin, folder, documents, stock, method):
    model, processor = stock
    ours = make(plugin, folder, documents, budget=0.4, method=method)
    losses = [loss for loss, _ in pairs(ours.loglikelihood(scored(documents)))]
    wanted = []
    with dymu.apply(model, **applying(method, 0.4, "exact", len(model.model.language_model.layers))):
        for document in documents:
            for continuation in (" cat", " a dog", ""):
                inputs = inputs_of(processor, document)
                first = inputs["input_ids"].shape[1]
                said = inputs_of(processor, document, continuation)["input_ids"][0, first:].tolist()
                output, loss = model(**inputs, use_cache=True), 0.0
                for number, token in enumerate(said):
                    loss -= output.logits[0, -1].log_softmax(0)[token].item()
                    there = torch.ones(1, first + number + 1, dtype=torch.long)
                    output = model(
                        input_ids=torch.tensor([[token]]), attention_mask=there, past_key_values=output.past_key_values
                    )
                wanted.append(loss)
    assert losses == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": None, "unmerge": "none"}, "needs something merged"),
        ({"method": "tome", "thresholds": "some"}, "without thresholds="),
        ({"budget": 5}, "outside 20 to 40"),
        ({"budget": 5, "method": "dtome"}, "outside 20 to 40"),
        ({"thresholds": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_options_that_do_not_fit(plugin, folder, documents, options, sentence):
    with pytest.raises(dymu.DymuError, match=sentence):
        make(plugin, folder, documents, **options)


def test_a_model_without_thresholds_or_template(plugin, folder, documents, tmp_path):
    for file in folder.iterdir():
        if file.name != "thresholds.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(dymu.BadThresholds, match=r"ships no thresholds\.json: name one with thresholds=FILE"):
        make(plugin, tmp_path, documents)
    named = make(plugin, tmp_path, documents, thresholds=str(folder / "thresholds.json"))
    assert named.generate_until(asked(documents)) == make(plugin, folder, documents).generate_until(asked(documents))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(dymu.BadPrompt, match="chat_template=FILE"):
        make(plugin, tmp_path, documents, budget=None)
    given = make(plugin, tmp_path, documents, budget=None, chat_template=str(folder / "chat_template.jinja"))
    assert given._prompt("why?")[0] == "why? answer:"


def test_what_cannot_be_answered_says_so(plugin, folder, documents):
    ours = make(plugin, folder, documents, max_length=60)
    video = SimpleNamespace(args=("why?", {}, lambda doc: ["film.mp4"], 0, "task", "test"))
    with pytest.raises(dymu.DymuError, match="video and sound are not supported"):
        ours.generate_until([video])
    with pytest.raises(NotImplementedError, match="several rounds"):
        ours.generate_until_multi_round([])
    with pytest.raises(dymu.BadPrompt, match="max_length is 60"):
        ours.generate_until(asked(documents))
    with pytest.raises(dymu.BadPrompt, match="max_length is 60"):
        ours.loglikelihood(scored(documents))
    assert len(ours.generate_until([request(documents, 1, {"max_new_tokens": 1000})])[0]) <= 60


def test_nothing_of_it_is_imported_unasked():
    ours = "[m for m in sys.modules if m.startswith(('lmms', 'dymu.integrations'))]"
    code = f"import sys, dymu; dymu.apply; print({ours})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_entry_point_leads_here():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, function = named["dymu"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed; docs/lmms-eval.md says how")
@pytest.mark.skipif(
    INSTALLED and not any(point.name == "dymu" for point in entry_points(group="lmms_eval.models")),
    reason="dymu was installed before it had this entry point; install it again",
)
def test_the_real_lmms_eval_scores_a_local_task(plugin, folder, documents, tmp_path):
    documents = [document for document in documents if len(document["images"]) < 2]
    ours = make(plugin, folder, documents, dtype="float32")
    answers = [answer.strip() for answer in ours.generate_until(asked(documents))]
    choices = [" cat", " dog", " red car"]
    losses = [loss for loss, _ in pairs(ours.loglikelihood(scored(documents, choices)))]
    rows = []
    for index, document in enumerate(documents):
        likely = sorted(range(3), key=losses[3 * index : 3 * index + 3].__getitem__)
        image = tmp_path / f"{index}.png"
        for picture in document["images"]:
            picture.save(image)
        rows.append(
            {
                "question": document["question"],
                "image": str(image) if document["images"] else None,
                "answer": answers[index] if index != 1 else "wrong",
                "choices": [choice.strip() for choice in choices],
                "choice": likely[0] if index not in (0, 3) else likely[-1],
            }
        )
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['image'])] if doc['image'] else []\n"
    )
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\ntest_split: test\n"
        "doc_to_visual: !function utils.visual\ndoc_to_text: question\nmetadata:\n  version: 1.0\n"
    )
    metric = "metric_list:\n  - metric: {}\n    aggregation: mean\n    higher_is_better: true\n"
    (tmp_path / "tiny_answers.yaml").write_text(
        common
        + metric.format("exact_match")
        + "task: tiny_answers\noutput_type: generate_until\ndoc_to_target: answer\n"
        + "generation_kwargs:\n  max_new_tokens: 6\n  temperature: 0\n"
    )
    (tmp_path / "tiny_choices.yaml").write_text(
        common
        + metric.format("acc")
        + "task: tiny_choices\noutput_type: multiple_choice\ndoc_to_target: choice\ndoc_to_choice: choices\n"
    )
    arguments = f"pretrained={folder},budget={BUDGET}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "dymu", "--model_args", arguments]
    command += ["--include_path", str(tmp_path), "--tasks", "tiny_answers,tiny_choices", "--batch_size", "4"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path / "cache"))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    paths = list((tmp_path / "out").rglob("*results.json"))
    assert paths, done.stdout[-4000:] + done.stderr[-4000:]  # it may fail and exit with 0
    results = json.loads(paths[0].read_text())
    assert results["results"]["tiny_answers"]["exact_match,none"] == pytest.approx(1 - 1 / len(rows))
    assert results["results"]["tiny_choices"]["acc,none"] == pytest.approx(1 - 2 / len(rows))
    assert 0 < results["throughput"]["avg_image_tokens_kept"] < tiny.PATCHES
