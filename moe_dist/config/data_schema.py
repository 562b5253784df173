"""The sections of the config tree about data: its sources, cleaning, duplicates, tokenizer, shards and rows."""

from __future__ import annotations

from typing import Literal

from moe_dist.config.section import Section, key, section


class TokenizerConfig(Section):
    path: str | None = key(
        None,
        "A tokenizer.json, tekken.json or tiktoken ranks file to use; null trains a byte-level BPE on the input.",
        "path",
    )
    kind: Literal["auto", "tokenizer.json", "tekken", "gpt2", "cl100k_base", "o200k_base"] = key(
        "auto",
        "What `path` is: told by its contents, or as named. A tiktoken ranks file does not say how it cuts text, so "
        "its encoding must be named.",
    )
    train_bytes: int = key(16_000_000, "The tokenizer is trained on at most this much text.", "bytes", ge=1_000)


QUALITY_RULES = (
    ("c4_citations", "c4_javascript", "c4_policy_lines", "c4_terminal_punctuation", "c4_line_words")
    + ("c4_lorem_ipsum", "c4_curly_bracket", "c4_sentences")
    + ("gopher_word_count", "gopher_mean_word_length", "gopher_symbols", "gopher_bullet_lines")
    + ("gopher_ellipsis_lines", "gopher_alphabetic_words", "gopher_stop_words")
    + ("gopher_duplicate_lines", "gopher_duplicate_paragraphs", "gopher_duplicate_line_characters")
    + ("gopher_duplicate_paragraph_characters", "gopher_top_ngrams", "gopher_duplicate_ngrams")
)


class CleanConfig(Section):
    normalize: Literal["none", "NFC", "NFKC"] = key("none", "Unicode normal form that text is brought to first.")
    mask: tuple[Literal["email", "ip"], ...] = key(
        (), "Personal data that a placeholder replaces: `email` addresses, `ip` addresses.", strict=False
    )
    languages: tuple[Literal["en", "zh", "other"], ...] = key(
        (),
        "Only documents guessed to be in one of these languages (`en`, `zh`, `other`) stay; empty keeps all.",
        strict=False,
    )
    rules: tuple[str, ...] = key(
        (), "Quality rules that documents must pass, in any order: " + ", ".join(QUALITY_RULES) + ".", strict=False
    )


class NearDuplicateConfig(Section):
    similarity: float | None = key(
        None,
        "A document goes where an earlier one that stays shares at least this part of both their shingles (Jaccard "
        "similarity, estimated by MinHash); null looks for no near-duplicates.",
        "fraction",
        gt=0,
        le=1,
    )
    shingle_words: int = key(
        5, "Words of a shingle; in scripts written without spaces, such as Chinese, characters.", "words", ge=1, le=64
    )
    bands: int = key(
        14,
        "Bands of a signature. Documents of similarity s share one, and are compared, with probability "
        "1 - (1 - s^rows)^bands; docs/data.md has a table.",
        "bands",
        ge=1,
        le=256,
    )
    rows: int = key(8, "Hash functions of a band, of one byte each for every document.", "rows", ge=2, le=64)


class DedupConfig(Section):
    exact: bool = key(False, "Of documents with the same text (after `data.clean`), only the first of the input stays.")
    near: NearDuplicateConfig = section(NearDuplicateConfig, "Which documents are too similar to an earlier one.")


class DecontaminateConfig(Section):
    against: tuple[str, ...] = key(
        (),
        "Files or folders of evaluation text, in any format that data.input takes; documents that share a run of words "
        "with it are left out. Empty leaves out none.",
        "paths",
        strict=False,
    )
    ngram_words: int = key(
        13, "Words of such a run; in scripts written without spaces, such as Chinese, characters.", "words", ge=4, le=64
    )
    text_field: str | None = key(
        None, "Field or column of a record of evaluation text that holds its text; null is data.text_field."
    )


class SourceConfig(Section):
    input: str = key(..., "Where its text is: anything that `data.input` takes.", "path")
    text_field: str | None = key(
        None, "Field of its .jsonl or .parquet records that holds their text; null takes data.text_field."
    )
    license: str | None = key(None, "Licence of its text, which the manifest of the build keeps with it.")


class MixtureStage(Section):
    tokens: int | None = key(
        None, "Length of a stage by weights, in tokens of the run; null goes on to the end.", "tokens", ge=1
    )
    weights: dict[str, float] = key({}, "Share of each source in the rows, as numbers in any proportion.")
    epochs: dict[str, float] = key(
        {}, "How often each source is read in the stage, such as 1 or 2.5; the stage is as long as that takes."
    )


class DataConfig(Section):
    input: str = key(
        "python-library",
        "A folder or file (.txt .md .py ..., .jsonl, .jsonl.zst, .jsonl.gz, .parquet), a folder that save_to_disk of "
        "datasets wrote, a pattern of files (texts/**/*.md), any of them on an object store (s3://bucket/texts), or "
        "`python-library`: the sources of the interpreter's own library.",
        "path",
    )
    sources: dict[str, SourceConfig] = key({}, "Several inputs with names, in place of `data.input`.")
    mixture: tuple[MixtureStage, ...] = key(
        (),
        "Stages of the run, one after the other, each with a mixture of sources; empty reads every source once in an "
        "epoch, as often as the run lasts.",
        strict=False,
    )
    dir: str = key("runs/data", "Where built shards go, each build in a folder named by its fingerprint.", "path")
    suffixes: tuple[str, ...] = key(
        (".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".js", ".ts", ".java", ".go", ".rs")
        + (".sh", ".rb", ".tex", ".org"),
        "Endings of the files in a folder that are read as plain text.",
        strict=False,
    )
    text_field: str = key("text", "Field of a .jsonl or .parquet record that holds its text.")
    unreadable: Literal["error", "skip"] = key(
        "error", "What a file or record that cannot be read does: stop, or be listed in the manifest and left out."
    )
    holdout_fraction: float = key(
        0.03, "Share of documents, chosen by a hash of their path, kept for evaluation.", "fraction", gt=0, lt=0.5
    )
    clean: CleanConfig = section(CleanConfig, "What is changed in documents, and which are left out.")
    dedup: DedupConfig = section(DedupConfig, "Which copies of the same text are left out.")
    decontaminate: DecontaminateConfig = section(DecontaminateConfig, "Which documents would leak evaluation text.")
    count_languages: bool = key(
        False,
        "The manifest counts documents, bytes and tokens by source and language; with clean, dedup or decontaminate it "
        "always does.",
    )
    shard_bytes: int = key(2_000_000, "Text that goes into one shard.", "bytes", ge=10_000)
    sequence_length_tokens: int = key(256, "Length of a training row.", "tokens", ge=2)
    shuffle_window_tokens: int = key(
        8_388_608,
        "Tokens of a source that are shuffled together. The order of blocks of text is random over the whole source; "
        "decoded, a window lies in memory.",
        "tokens",
        ge=1,
    )
    prefetch_batches: int = key(
        2, "Batches of a rank that are made ahead of the one it trains on; 0 makes none.", "batches", ge=0
    )
    damaged_shards: Literal["stop", "quarantine"] = key(
        "stop",
        "What a training shard that is missing or damaged does: stop, or leave the rows that touch it empty in their "
        "places, recorded by number in progress.jsonl; all other rows stay where they were.",
    )
    documents: Literal["joined", "separate"] = key(
        "joined",
        "Documents in one row: joined, a token sees all before it in its row; or separate, it sees its own document "
        "alone, whose positions begin at 0.",
    )
    packing: Literal["concatenate", "best_fit"] = key(
        "concatenate",
        "How rows are filled: one document after the other, cut where a row ends; or documents whole where they fit, "
        "each into the fullest row that has room, and the rest of a row padded. The latter is another build.",
    )
    tokenizer: TokenizerConfig = section(TokenizerConfig, "The tokenizer.")
