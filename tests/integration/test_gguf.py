"""GGUF files in llama.cpp itself, as xllamacpp carries it."""

import ctypes
import math
import subprocess
import sys
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch

from llmdistill.config.export import Export
from llmdistill.models.loading import continue_prompts, load_model, load_tokenizer
from llmdistill.students.formats import FORMATS, Source
from llmdistill.students.gguf_types import encode
from tests.integration.servers import free_port
from tests.integration.test_llama_cpp import BESIDE, SERVE
from tests.students.test_gguf import STUDENTS, WAYS, fast, student_of

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
pytestmark = pytest.mark.skipif(
    not BESIDE.is_dir(), reason="xllamacpp is not beside the environment; `make .llamacpp` puts it there"
)
LENGTH = 24
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a sentence about a cat.",
    "What is 12 + 30?",
    "Who wrote Hamlet?",
    "Say hello in Spanish.",
    "What do bees make?",
    "List the days of the week.",
    "Why is the sky blue?",
    "What is water made of?",
    "Give me a synonym for happy.",
    "How many legs has a spider?",
    "Translate 'good night' to French.",
    "What is the largest ocean?",
    "Finish the sentence: the early bird",
    "What does a doctor do?",
    "Is ice colder than steam?",
    "Name a planet.",
    "How do I boil an egg?",
    "What comes after spring?",
]


@contextmanager
def serving(file, log):
    """llama.cpp's server for a file: its address."""
    port = free_port()
    with log.open("w") as stream:
        command = [sys.executable, "-c", SERVE, str(BESIDE), str(file), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
    try:
        assert process.stdout.readline().strip() == "listening", log.read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(30)


def asked(address, path, **body):
    answer = httpx.post(f"{address}/{path}", json=body, timeout=300)
    answer.raise_for_status()
    return answer.json()


def file_of(directory):
    (file,) = directory.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def real(smollm2, tmp_path_factory):
    """The real small model as a file in 16 bits."""
    directory = tmp_path_factory.mktemp("real")
    tokenizer = load_tokenizer(str(smollm2), None)
    FORMATS["gguf-f16"].write(Source(str(smollm2), tokenizer, Export(), []), directory)
    return directory, tokenizer


def test_the_same_text_as_transformers(real, smollm2, tmp_path):
    """Greedy answers to twenty questions, asked through the chat template in the file."""
    directory, tokenizer = real
    model = load_model(str(smollm2), dtype="float32")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=True)["input_ids"] for each in conversations
    ]
    end = tokenizer.eos_token_id
    written = [ids[: ids.index(end)] if end in ids else ids for ids in continue_prompts(model, prompts, LENGTH, [end]).tolist()]
    expected = [tokenizer.decode(ids) for ids in written]
    with serving(file_of(directory), tmp_path / "log") as address:
        found = [
            asked(address, "v1/chat/completions", messages=each, temperature=0, max_tokens=LENGTH)["choices"][0]["message"][
                "content"
            ]
            for each in conversations
        ]
        template = asked(address, "apply-template", messages=conversations[0])["prompt"]
    assert template == tokenizer.apply_chat_template(conversations[0], tokenize=False, add_generation_prompt=True)
    assert found == [text.removesuffix("\ufffd") for text in expected]  # cut inside a character
    assert len(set(found)) > 15


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A random student as a form in llama.cpp: its address, and what transformers makes of the same file."""

    @contextmanager
    def serve(name, form, tokenizer=None):
        source, directory = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("export")
        tokenizer = tokenizer or fast()
        student_of(name).save_pretrained(source)
        tokenizer.save_pretrained(source)
        FORMATS[form].write(Source(str(source), tokenizer, Export(), []), directory)
        with serving(file_of(directory), directory / "log") as address:
            yield address, FORMATS[form].load(str(directory), "float32")

    return serve


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("form", ["gguf-f16", "gguf-q4_k_m"])
def test_llama_cpp_computes_what_transformers_does(served, name, form):
    """All next-token log-probabilities; llama.cpp multiplies in 16 bits, with quantised weights in 8.

    It says none for a token that is no whole text, so a letter is made the one that it draws, which does not change them.
    """
    if form == "gguf-q4_k_m":
        pytest.importorskip("libgguf", reason="the extra `gguf` is not installed")
    ids = torch.randint(0, 250, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    with served(name, form) as (address, model):
        answer = asked(address, "completion", prompt=ids, n_predict=1, n_probs=520, temperature=0, logit_bias=[["a", 100]])
    found = {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    divergence = sum(expected[number].exp().item() * (expected[number].item() - logprob) for number, logprob in found.items())
    assert sum(math.exp(logprob) for logprob in found.values()) == pytest.approx(1, abs=0.01)
    assert expected.std() > 0.3
    assert abs(divergence) < (1e-4 if form == "gguf-f16" else 0.02)


@pytest.mark.parametrize("way", WAYS)
def test_llama_cpp_finds_the_same_tokens(served, way):
    tokenizer = fast(way)
    letters = "aeé'’ \n\t0123456789.,!/_(){}世界ñ<>👍İſ\u0301\u00a0\u3000THEdog"
    numbers = np.random.default_rng(0)
    texts = ["".join(numbers.choice(list(letters), 40)) for _ in range(40)]
    texts += ["<|im_start|>user\nDON'T, we'll go 12345 <think> <|im_end|>", "  naïve   façade\r\n\n the dogs' ... !!!"]
    with served("llama tied", "gguf-f16", tokenizer) as (address, _):
        for text in texts:
            found = asked(address, "tokenize", content=text, add_special=False, parse_special=True)["tokens"]
            assert found == tokenizer(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_0", "Q8_0"])
def test_weights_are_rounded_as_llama_cpp_rounds_them(kind):
    """Byte for byte, by the function that its own tool calls."""
    pytest.importorskip("libgguf", reason="the extra `gguf` is not installed")
    (library,) = (BESIDE / "xllamacpp").glob("*.so")
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype, quantize.argtypes = (
        ctypes.c_size_t,
        [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    )
    weight = (np.random.default_rng(0).standard_t(4, size=(64, 512)) * 0.05).astype(np.float32)
    found = encode(weight, kind)
    expected = np.zeros_like(found)
    size = quantize(gguf.GGMLQuantizationType[kind], weight.ctypes.data, expected.ctypes.data, 0, *weight.shape, None)
    assert size == found.nbytes
    np.testing.assert_array_equal(found, expected)
