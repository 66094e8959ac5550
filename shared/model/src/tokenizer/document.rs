//! Writing a tokenizer.json: a canonical document with vocabulary, merges and added tokens in order. It is what we
//! export and what participants receive. Our own engine is made of the same rules, and of the same tokens directly; a
//! test compares it with the one that is read from the whole document.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::vocabulary::{LeadingSpace, Scheme, Split, Token, Vocabulary};

/// What Qwen 2 takes for a word: digits alone, a word with the character before it, white space before a line's end.
pub(super) const QWEN2_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// What Llama 3 does: the same with up to three digits together.
pub(super) const LLAMA_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Writes a tokenizer.json. `bos` is put in front of every text by programs that ask for special tokens.
pub(super) fn write(vocabulary: &Vocabulary, bos: Option<&str>) -> Vec<u8> {
    let unknown = vocabulary.unknown().and_then(|id| vocabulary.text(id));
    written(vocabulary, bos, vocabulary.tokens(), vocabulary.merges(), unknown)
}

/// The same without any token.
pub(super) fn write_rules(vocabulary: &Vocabulary, bos: Option<&str>) -> Vec<u8> {
    written(vocabulary, bos, &[], &[], None)
}

/// How merging goes beside the merges themselves.
pub(super) struct Flags {
    pub fuse_unk: bool,
    pub byte_fallback: bool,
    pub ignore_merges: bool,
}

impl Flags {
    pub(super) fn of(vocabulary: &Vocabulary) -> Self {
        let is_sentence_piece = matches!(vocabulary.scheme(), Scheme::SentencePiece { .. });
        let ignore_merges = matches!(vocabulary.scheme(), Scheme::ByteLevel { split: Split::LlamaBpe, .. });
        Self { fuse_unk: is_sentence_piece, byte_fallback: is_sentence_piece, ignore_merges }
    }
}

fn written(
    vocabulary: &Vocabulary,
    bos: Option<&str>,
    tokens: &[Token],
    merges: &[(String, String)],
    unknown: Option<&str>,
) -> Vec<u8> {
    let Flags { fuse_unk, byte_fallback, ignore_merges } = Flags::of(vocabulary);
    let (normalizer, pre_tokenizer) = rules(*vocabulary.scheme());
    let is_sentence_piece = matches!(vocabulary.scheme(), Scheme::SentencePiece { .. });
    let post_processor = match bos {
        Some(bos) => bos_processor(vocabulary, bos),
        None if is_sentence_piece => Value::Null,
        None => byte_level(true),
    };
    let added_tokens = (0u32..).zip(tokens).filter(|(_, token)| token.kind.is_added());
    let document = WrittenFile {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: added_tokens
            .map(|(id, token)| WrittenAddedToken {
                id,
                content: &token.text,
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: token.normalized,
                special: token.kind.is_special(),
            })
            .collect(),
        normalizer,
        pre_tokenizer,
        post_processor,
        decoder: decoder(*vocabulary.scheme()),
        model: WrittenModel {
            kind: "BPE",
            dropout: None,
            unk_token: unknown,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk,
            byte_fallback,
            ignore_merges,
            vocab: OrderedVocabulary(tokens),
            merges,
        },
    };
    serde_json::to_vec(&document).expect("strings, numbers and maps with string keys always serialize")
}

/// How text is normalized and cut into words.
fn rules(scheme: Scheme) -> (Value, Value) {
    let marks_spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let metaspace =
        |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let words = |regex: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    };
    match scheme {
        Scheme::ByteLevel { split, nfc } => {
            let pre_tokenizer = match split {
                Split::Gpt2 => byte_level(true),
                Split::SmolLm => {
                    let digits = json!({"type": "Digits", "individual_digits": true});
                    json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]})
                }
                Split::Qwen2 => words(QWEN2_WORDS),
                Split::LlamaBpe => words(LLAMA_WORDS),
            };
            (if nfc { json!({"type": "NFC"}) } else { Value::Null }, pre_tokenizer)
        }
        Scheme::SentencePiece { space } => match space {
            LeadingSpace::Never => (marks_spaces, Value::Null),
            LeadingSpace::EveryPiece => {
                let prepend = json!({"type": "Prepend", "prepend": "▁"});
                (json!({"type": "Sequence", "normalizers": [prepend, marks_spaces]}), Value::Null)
            }
            LeadingSpace::Start => (Value::Null, metaspace("first")),
            LeadingSpace::EveryPieceWithout => (Value::Null, metaspace("always")),
        },
    }
}

/// How tokens become text again, for other programs; ours decodes by itself.
fn decoder(scheme: Scheme) -> Value {
    if matches!(scheme, Scheme::ByteLevel { .. }) {
        return byte_level(true);
    }
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if scheme.prepends_space() {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}

/// Spelling in byte letters, after GPT-2's rule for words if `use_regex`.
fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn bos_processor(vocabulary: &Vocabulary, bos: &str) -> Value {
    let id = vocabulary.tokens().iter().position(|token| token.text == bos);
    let special = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let text = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    let second = json!({"SpecialToken": {"id": bos, "type_id": 1}});
    json!({
        "type": "TemplateProcessing",
        "single": [special, text("A", 0)],
        "pair": [special, text("A", 0), second, text("B", 1)],
        "special_tokens": BTreeMap::from([(bos, json!({"id": bos, "ids": [id], "tokens": [bos]}))]),
    })
}

/// The document in the order in which the tokenizers library writes it.
#[derive(Serialize)]
struct WrittenFile<'a> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<WrittenAddedToken<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: WrittenModel<'a>,
}

#[derive(Serialize)]
struct WrittenAddedToken<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct WrittenModel<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: Option<()>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<()>,
    end_of_word_suffix: Option<()>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: OrderedVocabulary<'a>,
    merges: &'a [(String, String)],
}

struct OrderedVocabulary<'a>(&'a [Token]);

impl Serialize for OrderedVocabulary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, token) in self.0.iter().enumerate() {
            map.serialize_entry(&token.text, &id)?;
        }
        map.end()
    }
}
