"""Chat templates of several families, small tokenizers that have them, and rows to encode."""

import json

from conftest import CHAT_TEMPLATE, CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dvpo_ray.config.schema import DataConfig
from dvpo_ray.data.encoding import Encoder
from dvpo_ray.data.preferences import PreferencePair

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end_header_id|>"]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# What Qwen3, Qwen3-Thinking-2507, DeepSeek-R1's distilled models, GLM 4.5 and the first of these in simple form make of reasoning.
SPLIT = (
    "{% set r = '' %}{% set c = m['content'] %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}" + SPLIT + "{% if loop.last %}"
    "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}{% else %}{{ c }}{% endif %}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_THINKING = QWEN3.removesuffix("{% endif %}") + "{{ '<think>\n' }}{% endif %}"
R1 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] }}</s>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\n' }}{% endif %}"
)
GLM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
    + SPLIT
    + "{{ '\n<think>' + r.strip() + '</think>\n' + c.strip() }}"
    "{% else %}{{ '\n' + m['content'] }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
CUTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNELS = (  # as in gpt-oss: special tokens before an answer, and a date
    "<|im_start|>system\n{{ strftime_now('%Y-%m-%d') }}<|im_end|>{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}{% if '<|im_start|>' in m['content'] %}{{ raise_exception('tags') }}{% endif %}"
    "<|end_header_id|>final<|eot_id|>{% else %}<|eot_id|>{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
NO_END = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"


def byte_level() -> Tokenizer:
    """Like GPT-2's: every byte has a token and decoding is exact; puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Like SentencePiece's: spaces are ▁, a text gets one in front, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *fallback]))
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIAL]  # the byte tokens are ordinary ones
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def build(base: Tokenizer, *, eos="</s>", pad="<pad>", template=None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


# name -> (tokenizer, end token)
ZOO = {
    "plain": (build(byte_level()), "</s>"),
    "plain-pad-is-eos": (build(byte_level(), pad="</s>"), "</s>"),
    "plain-metaspace": (build(metaspace()), "</s>"),
    "chatml": (build(byte_level(), eos="<|im_end|>", pad="<|im_end|>", template=CHAT_TEMPLATE), "<|im_end|>"),
    "llama3": (build(byte_level(), eos="</s>", pad="</s>", template=LLAMA3), "<|eot_id|>"),
    "llama2": (build(metaspace(), pad="</s>", template=LLAMA2), "</s>"),
    "qwen3": (build(byte_level(), eos="<|im_end|>", template=QWEN3), "<|im_end|>"),
    "qwen3-thinking": (build(byte_level(), eos="<|im_end|>", template=QWEN3_THINKING), "<|im_end|>"),
    "r1": (build(byte_level(), template=R1), "</s>"),
    "glm": (build(byte_level(), eos="<|im_end|>", template=GLM), "<|im_end|>"),
    "cuts": (build(byte_level(), eos="<|im_end|>", template=CUTS), "<|im_end|>"),
    "channels": (build(byte_level(), eos="<|im_end|>", template=CHANNELS), "<|im_end|>"),
    "no-end": (build(byte_level(), template=NO_END), "</s>"),
}
SHORT = DataConfig(max_prompt_tokens=100, max_response_tokens=100)
LONG = DataConfig(max_prompt_tokens=10_000, max_response_tokens=10_000)
LONG_TEXT = "the big dog was sad " * 20


def encoder(name="chatml", data=SHORT, context=10_000, chat_template="auto") -> Encoder:
    return Encoder(ZOO[name][0], data, chat_template, context)


def pair(prompt="What is it?", chosen="A good day.", rejected="A bad day.", **extra) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, where="pairs.jsonl:7", **extra)


def message(role, content):
    return {"role": role, "content": content}


def limits(**settings_) -> DataConfig:
    return DataConfig(**{"max_prompt_tokens": 30, "max_response_tokens": 12, **settings_})
