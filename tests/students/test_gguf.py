"""GGUF files: read again by transformers and by `gguf`, held against the model, and against figures published for others."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from llmdistill.config.export import Export
from llmdistill.errors import InputError
from llmdistill.students.formats import FORMATS, Source
from llmdistill.students.gguf_file import check_gguf, write_gguf
from llmdistill.students.gguf_types import encode, fitting_type, wanted_type
from llmdistill.students.ollama import modelfile, turns_of

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {
    "vocab_size": 520, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
STUDENTS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama wide heads": LlamaConfig(**SIZES, head_dim=96),
    "llama biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama 3": LlamaConfig(**SIZES, rope_parameters={**ROPE, "original_max_position_embeddings": 64}),
    "llama linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=128, rms_norm_eps=1e-5),
}
READ_FROM_THE_FILE_ALONE = ["llama", "llama tied", "llama wide heads", "qwen2", "qwen3"]  # by transformers


def trained(pre_tokenizer):
    """A tokenizer that merges bytes, with three special tokens and one that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the dog's 12345 things, and then 2024 WE'LL go\n\n  to the other side of the naïve façade!!! 世界 " * 20
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


def byte_level(regex):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
WAYS = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": byte_level(LLAMA3),
    "qwen2": byte_level(PRETOKENIZE_REGEX),
}


def fast(way="qwen2", template=CHATML):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained(WAYS[way]), bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return fast()


def student_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(STUDENTS[name]).to(dtype).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """A student and its form, written once: the model, and the directory."""
    made = {}

    def export(name, form):
        if (name, form) not in made:
            source, target = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("export")
            model = student_of(name)
            model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.6)
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
            check_gguf(model, tokenizer)
            how = FORMATS[form].write(Source(str(source), tokenizer, Export(), []), target)
            made[name, form] = model, target, how
        return made[name, form]

    return export


def file_of(directory):
    (file,) = directory.glob("*.gguf")
    return file


def values(directory):
    return {name: field.contents() for name, field in gguf.GGUFReader(file_of(directory)).fields.items()}


def decoded(directory):
    """The weights as the `gguf` package decodes them."""
    reader = gguf.GGUFReader(file_of(directory))
    return {tensor.name: (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}


IDS = torch.randint(0, 500, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "alone"), [(name, False) for name in STUDENTS] + [(name, True) for name in READ_FROM_THE_FILE_ALONE]
)
def test_transformers_reads_the_students_logits_from_a_file_in_16_bits(exported, name, alone):
    """With the configuration beside it, as it is measured, and from the file alone."""
    model, directory, _ = exported(name, "gguf-f16")
    rounded = student_of(name)
    with torch.no_grad():
        for weight in rounded.parameters():
            if weight.ndim > 1:
                weight.copy_(weight.half().float())
    if alone:
        read = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file_of(directory).name, dtype=torch.float32)
    else:
        read = FORMATS["gguf-f16"].load(str(directory), "float32")
    with torch.inference_mode():
        ours, theirs, whole = (each(IDS).logits for each in (rounded, read, model))
    assert (ours - theirs).abs().max() < 1e-4
    assert 0 < (whole - theirs).abs().max() < 0.05
    assert whole.std() > 0.5


def test_what_llama_cpp_needs_to_know_is_in_the_file(exported):
    _, directory, _ = exported("qwen3", "gguf-f16")
    found = values(directory)
    expected = {
        "general.architecture": "qwen3", "general.file_type": 1, "qwen3.block_count": 3, "qwen3.context_length": 256,
        "qwen3.embedding_length": 256, "qwen3.feed_forward_length": 512, "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 128, "qwen3.attention.value_length": 128,
        "qwen3.rope.dimension_count": 128, "qwen3.rope.freq_base": 10000.0, "qwen3.vocab_size": 520,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert values(exported("llama linear", "gguf-f16")[1])["llama.rope.scaling.factor"] == 2


def test_the_frequencies_of_llama_3(exported):
    """By the formula of Llama 3.1: long wavelengths are stretched by the factor, short ones kept, those between blended."""
    _, directory, _ = exported("llama 3", "gguf-f16")
    kind, found = decoded(directory)["rope_freqs.weight"]
    expected = []
    for number in range(32):
        wavelength = 2 * math.pi * 10000 ** (number / 32)
        smooth = min(max((64 / wavelength - 1) / (4 - 1), 0), 1)
        expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert kind == "F32"
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["gguf-q8_0", "gguf-q4_k_m"])
@pytest.mark.parametrize("name", ["llama tied", "qwen2"])
def test_what_is_measured_are_the_weights_in_the_file(exported, form, name):
    pytest.importorskip("libgguf", reason="the extra `gguf` is not installed")
    model, directory, how = exported(name, form)
    read, inside = FORMATS[form].load(str(directory), "float32").state_dict(), decoded(directory)
    assert {kind for kind, _ in inside.values()} == {"Q8_0", "F32"} if form == "gguf-q8_0" else {"Q4_K", "Q6_K", "F32"}
    assert sum(int(number) for number in re.findall(r"(\d+) in", how)) == len(inside)
    same = ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"), ("model.embed_tokens.weight", "token_embd.weight")
    for own, other in same:
        np.testing.assert_array_equal(read[own].numpy(), inside[other][1])
    for key, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(weight, read[key])
            continue
        off, blocks = (weight - read[key]).abs().double().numpy(), weight.double().numpy().reshape(len(weight), -1, 32)
        if form == "gguf-q8_0":  # half a step of the block's scale, which itself is rounded to 11 bits
            step = np.abs(blocks).max(-1, keepdims=True) / 127
            assert (off.reshape(blocks.shape) <= step * (0.5 + 127 * 2**-11)).all()
        else:
            assert off.max() > 0
            assert np.sqrt((off**2).mean()) < 0.1 * weight.std().item()


@pytest.mark.parametrize(
    ("layers", "tied", "expected"),
    [
        (32, False, {"Q4_K": 193, "Q6_K": 33}),  # Llama-2-7B-Chat
        (28, False, {"Q4_K": 169, "Q6_K": 29}),  # Qwen2.5-7B-Instruct
        (16, True, {"Q4_K": 96, "Q6_K": 17}),  # Llama-3.2-1B-Instruct
    ],
)
def test_the_mixture_is_that_of_published_files(layers, tied, expected):
    """As llama.cpp prints the number of tensors of each type when it loads their Q4_K_M."""
    inner = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{layer}.{name}.weight" for layer in range(layers) for name in inner]
    names += ["token_embd.weight"] if tied else ["token_embd.weight", "output.weight"]
    assert Counter(wanted_type(name, (256, 256), "Q4_K_M", layers, tied) for name in names) == expected
    assert {wanted_type(name, (256,), "Q4_K_M", layers, tied) for name in ("blk.0.attn_norm.weight", "blk.0.attn_q.bias")} == {
        "F32"
    }


def test_rows_that_are_no_whole_blocks_have_another_type():
    """As llama.cpp has them: 576 is a multiple of 32 but not of 256, 24 of neither."""
    assert [fitting_type(kind, 576) for kind in ("Q4_K", "Q6_K", "Q8_0", "F16")] == ["Q5_0", "Q8_0", "Q8_0", "F16"]
    assert [fitting_type(kind, 24) for kind in ("Q4_K", "Q6_K", "Q8_0", "F32")] == ["F16", "F16", "F16", "F32"]
    assert [fitting_type(kind, 512) for kind in ("Q4_K", "Q6_K")] == ["Q4_K", "Q6_K"]


@pytest.mark.parametrize(("kind", "most"), [("Q4_K", 0.1), ("Q5_0", 0.07), ("Q6_K", 0.03), ("Q8_0", 0.01)])
def test_a_type_loses_what_its_bits_say(kind, most):
    pytest.importorskip("libgguf", reason="the extra `gguf` is not installed")
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    found = gguf.dequantize(encode(weight, kind), gguf.GGMLQuantizationType[kind])
    assert most / 4 < np.sqrt(((found - weight) ** 2).mean()) < most


@pytest.fixture(scope="module")
def read_again(tmp_path_factory):
    """A tokenizer, and what transformers makes of it from a file, by the way in which it splits."""
    made, model = {}, student_of("llama tied")

    def read(way):
        if way not in made:
            directory, tokenizer = tmp_path_factory.mktemp("tokenizer"), fast(way)
            write_gguf(model, tokenizer, [1], "F16", directory / "model.gguf")
            made[way] = tokenizer, AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf"), values(directory)
        return made[way]

    return read


@pytest.mark.parametrize("way", ["gpt-2", "llama-bpe", "qwen2"])  # transformers knows no `smollm`
@settings(max_examples=60, deadline=None)
@given(
    text=st.text(max_size=60), joined=st.sampled_from(["", "<|im_start|>user\n12345 don't <think> ", "é e\u0301 WE'LL  \n\n x"])
)
def test_the_tokenizer_in_the_file_has_the_same_ids(read_again, way, text, joined):
    own, other, _ = read_again(way)
    assert (
        own(joined + text, add_special_tokens=False)["input_ids"] == other(joined + text, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_vocabulary_in_the_file(read_again, way):
    own, other, found = read_again(way)
    assert found["tokenizer.ggml.pre"] == way
    assert found["tokenizer.ggml.model"] == "gpt2"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 520
    assert {tokens[number]: number for number in own.get_vocab().values()} == own.get_vocab()
    special = {"<|begin|>": 3, "<|im_end|>": 3, "<|im_start|>": 3, "<think>": 4, "[PAD519]": 5, "a": 1}
    assert {token: kinds[tokens.index(token)] for token in special} == special
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert other.chat_template == found["tokenizer.chat_template"] == CHATML
    conversation = [{"role": "user", "content": "hé <think>"}]
    texts = [each.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) for each in (own, other)]
    assert texts[0] == texts[1]


def test_every_token_that_ends_an_answer_is_named(tmp_path):
    write_gguf(student_of("llama tied"), fast(), [1, 2], "F16", tmp_path / "model.gguf")
    found = values(tmp_path)
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (1, 2)


def test_a_tokenizer_that_begins_texts_says_so(tmp_path):
    tokenizer = fast("llama-bpe")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    write_gguf(student_of("llama tied"), tokenizer, [1], "F16", tmp_path / "model.gguf")
    assert values(tmp_path)["tokenizer.ggml.add_bos_token"] is True


def changed(name, **fields):
    return type(STUDENTS[name])(**{**STUDENTS[name].to_dict(), **fields})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=520), "for llama, qwen2, qwen3: the student is of type gpt2"),
        (changed("llama", hidden_act="gelu"), "whose hidden_act is gelu"),
        (changed("llama", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), "whose rope_type is yarn"),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
            "layer_types is sliding_attention",
        ),
        (changed("llama", vocab_size=200), r"the tokenizer has a token \d+, the student only 200 tokens"),
    ],
)
def test_a_student_that_the_file_cannot_hold_is_refused(tokenizer, config, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        check_gguf(AutoModelForCausalLM.from_config(config), tokenizer)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused():
    model = student_of("llama")
    others = [trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), trained(byte_level(LLAMA3.replace("{1,3}", "{1,2}")))]
    others.append(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    lower = trained(GPT2)
    lower.normalizer = normalizers.Lowercase()
    for other in [*others, lower]:
        with pytest.raises(InputError, match="merge bytes and split text as gpt-2, smollm, llama-bpe, qwen2 do"):
            check_gguf(model, PreTrainedTokenizerFast(tokenizer_object=other))


def test_a_weight_beyond_16_bits_is_refused(tokenizer, tmp_path):
    model = student_of("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight has a weight of magnitude 1e\+05"):
        write_gguf(model, tokenizer, [1], "F16", tmp_path / "model.gguf")


def as_ollama(text, messages):
    """What Go makes of the few actions that a written template has."""
    start, turns, prompt = re.fullmatch(r"(.*){{ range .Messages }}(.*){{ end }}{{ end }}(.*)", text, re.DOTALL).groups()
    branches = dict(re.findall(r'{{ (?:else )?if eq .Role "(\w+)" }}(.*?{{ .Content }}.*?)(?={{ else|\Z)', turns, re.DOTALL))
    return start + "".join(branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + prompt


SYSTEM_FIRST = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m['role'] + '<|e|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|e|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, SYSTEM_FIRST, LLAMA3_CHAT])
@pytest.mark.parametrize("asked", [["user"], ["system", "user"], ["system", "user", "assistant", "user", "assistant", "user"]])
def test_the_template_for_ollama_writes_the_same_prompt(template, asked):
    tokenizer = fast(template=template)
    text = modelfile("model.gguf", tokenizer, [1], None)
    (go,) = re.findall(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    messages = [{"role": role, "content": f"{role} says\n{number}."} for number, role in enumerate(asked)]
    system = re.findall(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    assert system == (["Be kind."] if template == SYSTEM_FIRST else [])
    given = [{"role": "system", "content": system[0]}, *messages] if system and asked[0] != "system" else messages
    assert as_ollama(go, given) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['role'] + m['content'] }}{% endfor %}",
        "{{ strftime_now('%d') }}" + CHATML,
        "{{ raise_exception('no') }}",
        CHATML.replace("im_start", "{{ x"),
        None,
    ],
)
def test_other_templates_are_left_to_ollama(template):
    tokenizer = fast(template=template)
    assert turns_of(tokenizer) is None
    text = modelfile("model.gguf", tokenizer, [1], None)
    assert 'TEMPLATE "' not in text
    assert ("# TEMPLATE is left to Ollama" in text) == (template is not None)


def test_the_modelfile(exported):
    _, directory, _ = exported("llama", "gguf-f16")
    text = (directory / "Modelfile").read_text()
    assert text.splitlines()[0] == "FROM ./model-F16.gguf"
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.6\n')
    assert json.loads((directory / "generation_config.json").read_text())["temperature"] == 0.6
    assert AutoConfig.from_pretrained(directory).model_type == "llama"
