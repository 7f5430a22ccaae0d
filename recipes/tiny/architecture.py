"""Make `recipes/tiny/architecture/`: the tokenizer and the configuration of the embedded model, without weights.

    python -m coupled.recipes.tiny.architecture

The model is Qwen2-shaped with Dream's shift and bidirectional attention; `ar.yaml` then `adapt.yaml` fill it.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from coupled.rl.likelihood.samples import RESPONSE

HERE = Path(__file__).parent
VOCABULARY = 896
PAD, USER, ASSISTANT, END, MASK = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|im_end|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    + USER + "{{ message['content'] }}"
    "{% else %}" + ASSISTANT + "{{ message['content'] }}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip
# Digits stay single, so that numbers can be copied from prompt to program; a new line takes its indentation along;
# words keep the space before them. A comprehension's head is one token: canvases are then short, which a CPU needs.
SPLIT = (
    r"```python\n|[a-z] for [a-z] in [a-z]+(?: if [a-z])?|\n *(?:return)?"
    r"| ?\d| ?[A-Za-z_]+| ?[^\sA-Za-z_\d]+| +"
)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts, with the special tokens of the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, USER, ASSISTANT, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "tasks" / "train.jsonl.gz")
    parser.add_argument("--out", type=Path, default=HERE / "architecture")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in gzip.decompress(arguments.data.read_bytes()).splitlines()]
    tokenizer = train_tokenizer(text for r in rows for text in (r["prompt"], RESPONSE.format(solution=r["solution"])))
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        is_causal=False,
        diffusion={"family": "dream", "shift": 1},
        use_cache=False,
    )
    config.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
