"""Make a small BERT and its own tokenizer from nothing, for machines that reach no model hub."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast


SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_word_pieces(texts: list[str], vocab_size: int, n_positions: int) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer as BERT's: in lower case, with [CLS] before a text and [SEP] after it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = list(SPECIAL.values())
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=n_positions, **SPECIAL)


def new_encoder(
    tokenizer: PreTrainedTokenizerFast, *, n_positions: int, n_layer: int, n_embd: int, n_head: int, dropout: float
) -> BertForMaskedLM:
    """Return a BERT of this shape with random weights."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=n_positions,
            num_hidden_layers=n_layer,
            hidden_size=n_embd,
            intermediate_size=4 * n_embd,
            num_attention_heads=n_head,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
