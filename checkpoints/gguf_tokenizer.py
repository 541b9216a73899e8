"""The tokenizer inside a GGUF file, built with the tokenizers package."""

import itertools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from checkpoints.error_text import short_repr
from checkpoints.gguf_chat import TokenType, chat_templates, turn_ends
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_vocabulary import REMEDY, GgufVocabulary
from checkpoints.rust_errors import as_value_error

_SPACE = "\u2581"  # how sentencepiece writes a space

# The time to find a piece's merges grows with the square of its length. Real vocabularies are far below both bounds.
_MAX_PIECE_LENGTH = 128
_MAX_MERGES_PER_PIECE = 16


def load_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The file's tokenizer, with its special tokens and chat templates.

    Byte-level BPE (`tokenizer.ggml.model` "gpt2") and sentencepiece BPE ("llama") are read; ValueError names any other
    model or pre-tokeniser, and metadata that no tokenizer can be built from.
    """
    vocabulary = GgufVocabulary(file)
    with as_value_error(file.path, "has a tokenizer that cannot be built", REMEDY):
        return _build(file, vocabulary)


def _build(file: GgufFile, vocabulary: GgufVocabulary) -> PreTrainedTokenizerFast:
    model = vocabulary.get("ggml.model")
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(vocabulary)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(vocabulary)
    else:
        raise ValueError(
            f"{vocabulary.path} has the tokenizer model {short_repr(model)}; supported: gpt2, llama. {REMEDY}"
        )
    # Some converters gave end-of-turn tokens another type.
    control = dict.fromkeys([*vocabulary.of_type(TokenType.CONTROL), *turn_ends(file)])
    others = [token for token in vocabulary.of_type(TokenType.USER_DEFINED) if token not in control]
    tokenizer.add_special_tokens([_added(token, special=True) for token in control])
    tokenizer.add_tokens([_added(token, special=False) for token in others])
    special = {
        "bos_token": vocabulary.token("bos"),
        "eos_token": vocabulary.token("eos"),
        "unk_token": vocabulary.token("unknown"),
        "pad_token": vocabulary.token("padding"),
    }
    first = special["bos_token"] if vocabulary.optional("ggml.add_bos_token", bool, add_bos) else None
    last = special["eos_token"] if vocabulary.optional("ggml.add_eos_token", bool, False) else None
    tokenizer.post_processor = _template_processing(tokenizer, first, last)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_templates(file),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )


def _byte_level(vocabulary: GgufVocabulary) -> tuple[Tokenizer, bool]:
    pre = vocabulary.pre_tokenizer()
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.list_of("ggml.merges", str)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(vocabulary: GgufVocabulary) -> tuple[Tokenizer, bool]:
    prefix = vocabulary.optional("ggml.add_space_prefix", bool, True)
    unknown = vocabulary.of_type(TokenType.UNKNOWN)
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary.ids,
            merges=_merges(vocabulary),
            unk_token=unknown[0] if unknown else vocabulary.token("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces] if prefix else [spaces])
    restored = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*restored, decoders.Strip(" ", 1, 0)] if prefix else restored)
    return tokenizer, True


def _merges(vocabulary: GgufVocabulary) -> list[tuple[str, str]]:
    """The merges that a scored vocabulary implies: any two tokens whose concatenation is a token, best score first."""
    ids, scores = vocabulary.ids, vocabulary.per_token("ggml.scores", float)
    longest = max(vocabulary.tokens, key=len)
    if len(longest) > _MAX_PIECE_LENGTH:
        raise ValueError(
            f"{vocabulary.path}: 'tokenizer.ggml.tokens' has {short_repr(longest)} of {len(longest)} characters; at "
            f"most {_MAX_PIECE_LENGTH} are read. {REMEDY}"
        )
    merges = (
        (-scores[i], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    )
    max_merges = _MAX_MERGES_PER_PIECE * len(ids)
    found = sorted(itertools.islice(merges, max_merges + 1))
    if len(found) > max_merges:
        raise ValueError(f"{vocabulary.path}: 'tokenizer.ggml.tokens' implies more than {max_merges} merges. {REMEDY}")
    return [(left, right) for *_, left, right in found]


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _template_processing(tokenizer: Tokenizer, first: str | None, last: str | None) -> processors.TemplateProcessing:
    """Adds the tokens that every encoded text starts and ends with."""
    before = [f"{first}:0"] if first is not None else []
    after = [f"{last}:0"] if last is not None else []
    again = [piece.replace(":0", ":1") for piece in before]
    return processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *again, "$B:1", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last) if token is not None],
    )
