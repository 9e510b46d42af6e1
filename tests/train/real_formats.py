"""Small data sets and tokenizers with the columns, splits and special tokens of the ones that the recipes name."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT, NUMBER = datasets.Value("string"), datasets.Value("int32")
MESSAGES = [{"content": TEXT, "role": TEXT}]
INFO = dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"), TEXT)

# What the Hub says of the data sets: the original fields, and some of those that were worked out from them.
REFERENCES = datasets.Features(
    dict.fromkeys(("id", "subreddit", "title", "post", "summary", "query", "reference_response"), TEXT)
)
COMPARISONS = datasets.Features(
    {
        "info": INFO,
        "summaries": [{"text": TEXT, "policy": TEXT, "note": TEXT}],
        "choice": NUMBER,
        **dict.fromkeys(("worker", "batch", "split"), TEXT),
        "extra": {"confidence": NUMBER},
        **dict.fromkeys(("query", "chosen", "rejected", "chosen_policy", "rejected_policy", "policies"), TEXT),
    }
)
ULTRAFEEDBACK = datasets.Features(
    {
        "prompt": TEXT,
        "prompt_id": TEXT,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "messages": MESSAGES,
        "score_chosen": datasets.Value("float64"),
        "score_rejected": datasets.Value("float64"),
    }
)

_POSTS = [
    ("relationships", "My [24F] flatmate [25M] eats my food and says he does not", "He smiles when I ask."),
    ("AskReddit", "What do I do with forty kilos of plums?", "My aunt's tree has had a good year."),
    ("tifu", "TIFU by sending my boss a voice note for my dog", "She answered. She asked how he is."),
    ("legaladvice", "Neighbour built his fence half a metre on my side", "The old fence is still in my garage."),
    ("running", "First marathon in three weeks and my knee clicks", "It does not hurt. It only clicks."),
    ("personalfinance", "Pay back the car or the student loan first?", "The car is at 7 %, the other one at 4 %."),
    ("dogs", "Rescue dog is afraid of the kitchen floor", "He jumps from rug to rug like a goat."),
    ("jobs", "They offered me less than the advert said", "I have until Friday noon to say yes."),
]
_MORE = [
    "It began in the spring and I thought nothing of it.",
    "My sister says I should leave it, my brother says I should not.",
    "I have asked twice, and both times I got another answer.",
    "We have known each other for six years.",
    "Money is not the point, although it would help.",
    "I don't sleep well since, and it shows at work.",
    "Edit: thank you all, I did not expect so many answers!",
]
_NEWS = "(CNN) -- A ferry with 62 people on board ran aground on Monday. Nobody was hurt, the company said."


def _post(rng: random.Random, number: int) -> dict[str, str]:
    subreddit, title, first = _POSTS[number % len(_POSTS)]
    paragraphs = [" ".join(rng.sample(_MORE, rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    if number % 11 == 10:  # more than 512 tokens: a prompt that has to be cut
        paragraphs *= 12
    return {"id": f"t3_{number}", "subreddit": subreddit, "title": title, "post": "\n\n".join([first, *paragraphs])}


def references(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Posts with the summary of their author, which has no space in front."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        post = _post(rng, number)
        summary = f"{post['title'].lower()}, and I do not know what to do."
        query = f"SUBREDDIT: r/{post['subreddit']} ... TL;DR:"  # cut and written by others: not to be read
        rows.append({**post, "summary": summary, "query": query, "reference_response": f" {summary}<|endoftext|>"})
    return rows


def comparisons(count: int, *, seed: int = 1) -> list[dict]:
    """Posts with two summaries, either of which may be the better one; each has a space in front."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        post = _post(rng, number)
        good, bad = f" {post['title']}: what now?", f" {rng.choice(_MORE)}"
        choice = rng.randrange(2)
        texts = [good, bad] if choice == 0 else [bad, good]
        rows.append(_comparison({**post, "site": None, "article": None}, texts, choice, batch="batch3"))
    return rows


def news_comparisons(count: int) -> list[dict]:
    """The same of news articles (CNN/DM), which have no post."""
    info = {**dict.fromkeys(INFO), "id": "cnn_1", "site": "cnn", "article": _NEWS, "title": "Ferry runs aground"}
    return [_comparison(info, [" A ferry ran aground.", " Monday."], 0, batch="cnndm0") for _ in range(count)]


def _comparison(info: dict, texts: list[str], choice: int, *, batch: str) -> dict:
    return {
        "info": info,
        "summaries": [{"text": text, "policy": f"sup{i}", "note": None} for i, text in enumerate(texts)],
        "choice": choice,
        "worker": "w1",
        "batch": batch,
        "split": "train",
        "extra": {"confidence": None},
        "query": "SUBREDDIT: ... TL;DR:",
        "chosen": f"{texts[choice]}<|endoftext|>",
        "rejected": f"{texts[1 - choice]}<|endoftext|>",
        "chosen_policy": f"sup{choice}",
        "rejected_policy": f"sup{1 - choice}",
        "policies": "sup0--sup1",
    }


def ultrafeedback(count: int, *, seed: int = 2) -> list[dict]:
    """Questions with a better and a worse answer; ``prompt`` repeats the question as text."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        _, question, _ = _POSTS[number % len(_POSTS)]
        question = f"{question} {rng.choice(_MORE)}"
        texts = [" ".join([start, *rng.sample(_MORE, rng.randint(0, 2))]) for start in ("Surely.", "No idea.")]
        chosen, rejected = (
            [{"content": question, "role": "user"}, {"content": text, "role": "assistant"}] for text in texts
        )
        scores = {"score_chosen": 8.5, "score_rejected": 6.0}
        row = {"prompt": question, "prompt_id": f"{number:064x}", "chosen": chosen, "rejected": rejected}
        rows.append({**row, "messages": chosen, **scores})
    return rows


def write_dataset(folder: Path, features: datasets.Features, splits: dict[str, list[dict]]) -> Path:
    """A folder as the Hub serves it: a parquet file a split, which the README names."""
    (folder / "data").mkdir(parents=True)
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, rows in splits.items():
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: data/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return folder


def _bytes(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of a few hundred tokens, learned on the texts above; special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{title}\n\n{first}" for _, title, first in _POSTS] + _MORE + ["SUBREDDIT: r/\n\nTITLE: POST: TL;DR:"] * 2
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pythia_tokenizer() -> PreTrainedTokenizerFast:
    """As Pythia's: one special token for beginning, end and what is unknown, and none set for padding."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=_bytes([end, "<|padding|>"]), bos_token=end, eos_token=end, unk_token=end
    )


LLAMA_3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def llama_3_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-3-Instruct's: a turn ends with <|eot_id|>, the template writes the BOS, padding has no token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bytes(LLAMA_3_SPECIAL), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    tokenizer.chat_template = LLAMA_3
    return tokenizer


def write_all(folder: Path) -> None:
    """The data sets that the recipes name, under their names."""
    stem = folder / "vwxyzjn"
    write_dataset(
        stem / "summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144",
        REFERENCES,
        {"train": references(24), "validation": references(8, seed=7)},
    )
    write_dataset(
        stem / "summarize_from_feedback_oai_preprocessing_1706381144",
        COMPARISONS,
        {
            "train": comparisons(24) + news_comparisons(2),
            "validation": comparisons(8, seed=8),
            "validation_cnndm": news_comparisons(4),
        },
    )
    questions = ultrafeedback(24)
    write_dataset(
        folder / "HuggingFaceH4" / "ultrafeedback_binarized",
        ULTRAFEEDBACK,
        {
            "train_prefs": questions,
            "train_sft": questions[:3],
            "test_prefs": questions[:6],
            "test_sft": questions[:2],
        },
    )
